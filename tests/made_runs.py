"""Run folders of networks that have learnt nothing, and tasks of which all is known."""

import json
import struct
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

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
    return last, state_at(folder, last)


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


def state_at(folder, step):
    """The state of a checkpoint, names and arrays, on the host."""
    with checkpoints.open_manager(folder / "checkpoints") as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return jax.tree.map(np.asarray, manager.restore(step, args=args)["state"])


def params_at(folder, step, name="params"):
    """The parameters of a checkpoint, or with "ema_params" their average: those of a flat dict."""
    flat = state_at(folder, step)
    return {k.removeprefix(f"{name}."): x for k, x in flat.items() if k.startswith(f"{name}.")}


def events(folder):
    """TensorBoard's events of a run, lengths and checksums verified."""
    return [event for path in sorted(folder.glob("tensorboard/*")) for event in events_of(path)]


def events_of(path):
    """The events of one file."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body = data[12 : 12 + length]
        sums = struct.unpack("<I", data[8:12]) + struct.unpack("<I", data[12 + length :][:4])
        assert sums == (masked_crc32c(data[:8]), masked_crc32c(body))
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found
