"""From flags and a task to a run folder: an experiment's `main`.

if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from fmjax import training
from fmjax.harness import command, keys, loop, memory, places, step
from fmjax.harness.config import RunConfig, begin, check_num_examples, mesh
from fmjax.harness.pods import cluster
from fmjax.harness.read import restore_params
from fmjax.harness.records import address
from fmjax.harness.run import Run
from fmjax.harness.task import Task, Trained
from fmjax.training import sharding

MakeTask = Callable[[Any], Task]
HELD_OUT_BATCHES = 4  # of held-out examples in the held-out loss, at most


def main(
    config: type[RunConfig],
    make_task: MakeTask,
    doc: str | None,
    *,
    on_metrics: loop.OnMetrics | None = None,
    args: list[str] | None = None,
) -> None:
    """The command of an experiment: reads the flags, trains, measures, draws.

    Args:
      config: the dataclass of its flags.
      make_task: `config -> Task`, a function that can be imported.
      doc: what `--help` says first.
      on_metrics: as for `train`.
      args: the words of the command line; None for this process's.

    Raises:
      SystemExit: with the exit code, unless all went well.
    """
    module = address(make_task).partition(":")[0]
    command.run(
        lambda flags: train(flags, make_task, on_metrics=on_metrics),
        config,
        name=module,
        doc=doc,
        args=args,
    )


def train(
    config: RunConfig, make_task: MakeTask, *, on_metrics: loop.OnMetrics | None = None
) -> dict[str, Any]:
    """Trains a task in its run folder, which it resumes, and does what follows.

    Args:
      config: its flags.
      make_task: `config -> Task`, a function that can be imported.
      on_metrics: `(step, row)`, called with every line of metrics.jsonl, for other loggers.

    Returns:
      What stands in summary.json.

    Raises:
      ValueError: for flags, data or a folder that can't work, before anything is compiled.
      FloatingPointError, SystemExit: as `loop.train` does.
    """
    begin(config)
    name = address(make_task).partition(":")[0].rpartition(".")[2]
    config = dataclasses.replace(config, workdir=config.workdir or _folder(name, config))
    _warn_if_lost(address(make_task))
    task = step.in_parts(config, make_task(config))
    check_num_examples(config, task.num_examples)
    params = jax.eval_shape(task.init, jax.random.key(0)).params
    with Run(name, config, _data_of(task), make_task) as run:
        with memory.explained(config, make_task):
            state = step.init_state(config, task.init, keys.key(config.seed, "parameters"))
        _check_skipping(config, state)
        if run.saved_step is None and config.init_from is not None:
            state = _begin_with(state, restore_params(places.as_path(config.init_from), params)[0])
        state = run.restore(state)
        num_parameters = sum(x.size for x in jax.tree.leaves(params))
        _say_what_begins(config, task, num_parameters, int(state.step))
        steps = step.jit_steps(config, task.step, state)
        steps = memory.first_explained(steps, config, make_task)
        trained = Trained(task, name, config, int(state.step), None)
        state, rate = loop.train(
            run,
            task,
            state,
            steps,
            keys.key(config.seed, "training"),
            preview=_preview(run, trained, state) if config.preview_every else None,
            on_metrics=on_metrics,
        )
        trained = dataclasses.replace(trained, step=int(state.step), params=state.ema_params)
        summary = {"experiment": name, "step": trained.step, "num_parameters": num_parameters}
        if task.finish is not None:
            summary |= task.finish(trained, run.folder, keys.key(config.seed, "finish"))
        summary |= {"examples_per_second": rate, "wall_seconds": round(run.seconds, 1)}
        run.finish(summary)
    return summary


def _warn_if_lost(address: str) -> None:
    """Says what nobody will be able to import again."""
    if cluster.is_main() and ("<" in address or address.startswith("__main__:")):
        print(
            f"config.json will name {address} as what made the run, which can't be imported: "
            "evaluation, sampling and export won't find it. Define it at the top of a module.",
            file=sys.stderr,
        )


def _folder(name: str, config: RunConfig) -> pathlib.Path:
    """runs/EXPERIMENT-DATASET; an experiment named after its data set has the one name."""
    data = config.data_name()
    return pathlib.Path("runs") / (name if data in ("", name) else f"{name}-{data}")


def _data_of(task: Task) -> dict[str, Any]:
    return {"num_examples": task.num_examples} | (task.data() if task.data else {})


def _check_skipping(config: RunConfig, state: training.TrainState) -> None:
    """Refuses to skip steps where the optimiser would take them."""
    counted = optax.tree.get(state.opt_state, "total_notfinite", default=None)
    if config.max_skipped_steps and counted is None:
        raise ValueError(
            "--max-skipped-steps needs an optimiser that leaves such steps out; this task's takes "
            "them. harness.optimizer(config) makes one, harness.skip_not_finite(tx, "
            "config.max_skipped_steps) another."
        )


def _begin_with(state: training.TrainState, params: Any) -> training.TrainState:
    """The first state with other parameters, in the shardings of its own."""

    def put(x: Any, like: jax.Array) -> jax.Array:
        x = np.asarray(x, like.dtype)
        return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

    return state._replace(
        params=jax.tree.map(put, params, state.params),
        ema_params=jax.tree.map(put, params, state.ema_params),
    )


def _say_what_begins(config: RunConfig, task: Task, num_parameters: int, step: int) -> None:
    """The first line: device, parameters, data, batch, and where the run goes on."""
    if not cluster.is_main():
        return
    devices = mesh(config).devices
    count = "" if devices.size == 1 else f"{devices.size} x "
    where = (
        f"going on from step {step} to {config.num_steps}" if step else f"{config.num_steps} steps"
    )
    batch = f"batch {config.batch_size}"
    batch += f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    print(
        f"{count}{devices.flat[0].device_kind}, {num_parameters:,} parameters, "
        f"{task.num_examples:,} examples, {batch}, {where}, in {config.folder}"
        + (f"; {task.about}" if task.about else ""),
        flush=True,
    )


def _preview(
    run: Run, trained: Trained, state: training.TrainState
) -> Callable[[training.TrainState], dict[str, float]]:
    """`state -> row`: the held-out loss, and a picture that goes to the run folder."""
    task, config = trained.task, trained.config
    held_out = step.jit_held_out(config, task, state) if task.held_out is not None else None
    key = keys.key(config.seed, "held out")
    rows = _held_out_rows(config, task)

    def preview(state: training.TrainState) -> dict[str, float]:
        found = {}
        if held_out is not None and task.held_out is not None and rows:
            losses = [
                held_out(state, jax.random.fold_in(key, k), task.held_out(part))
                for k, part in enumerate(rows)
            ]
            found["held_out_loss"] = float(np.mean(jax.device_get(losses)))
        if task.preview is not None:
            now = dataclasses.replace(trained, step=int(state.step), params=state.ema_params)
            run.preview(now.step, task.preview(now, keys.key(config.seed, "preview")))
        return found

    return preview


def _held_out_rows(config: RunConfig, task: Task) -> list[np.ndarray]:
    """Whole batches of the first held-out examples, this process's rows of them."""
    size = config.batch_size
    local = sharding.local_rows(size, mesh(config))
    num = min(HELD_OUT_BATCHES, task.num_held_out // size)
    if not num and task.num_held_out:  # fewer than a batch: they come by turns
        return [np.arange(size)[local] % task.num_held_out]
    return [k * size + local for k in range(num)]


def say(text: str) -> None:
    """Prints a line, by process 0."""
    if cluster.is_main():
        print(text, file=sys.stdout, flush=True)
