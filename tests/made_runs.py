"""Run folders of networks that have learnt nothing, and tasks of which all is known."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fmjax import harness
from fmjax.harness import step, task
from fmjax.harness.run import Run
from fmjax.harness.task import Task, Trained
from fmjax.training import checkpoints


def untrained(config, make_task):
    """A run folder with a checkpoint of a network that has learnt nothing; its average differs."""
    made = make_task(config)
    state = step.init_state(config, made.init, jax.random.key(0))
    key = jax.random.key(1)  # the last layer of a U-Net begins at zero
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), state.params)
    data = {"num_examples": made.num_examples} | (made.data() if made.data else {})
    name = make_task.__module__.rpartition(".")[2]
    with Run(name, config, data, make_task) as run:
        run.restore(state)  # nothing is there yet; it begins the folder's record
        run.save(state._replace(ema_params=moved, step=jnp.asarray(30)), wait=True)
    return config.workdir


def known(velocity, samples=None):
    """A task that was trained, so to speak: `velocity(params, condition)`, without parameters."""

    def nothing(*args):
        raise AssertionError("a known velocity is not trained")

    made = Task(0, nothing, nothing, nothing, velocity, samples=samples)
    return Trained(made, "known", None, 0, {})


def final_state(folder):
    """The step of a folder's latest checkpoint and all of its state, on the host."""
    with checkpoints.open_manager(folder / "checkpoints") as manager:
        last = checkpoints.latest_step(manager)
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(last, args=args)["state"]
    return last, jax.tree.map(np.asarray, state)


def rows(folder):
    """The lines of metrics.jsonl that are whole."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


def parts(module, config):
    """An experiment's `draw` and `loss`, which its `make_task` hands to `harness.from_loss`."""
    found = {}

    def from_loss(draw, loss, *args, **kwargs):
        found.update(draw=draw, loss=loss)
        return task.from_loss(draw, loss, *args, **kwargs)

    with mock.patch.object(harness, "from_loss", from_loss):
        module.make_task(config)
    return found["draw"], found["loss"]
