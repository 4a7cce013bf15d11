"""The training loop that the experiments share: batches, steps, and what may end them.

The host stays ahead of the device: it gathers and sends the next batches while the device works on
the last ones, and looks at metrics only when the next dispatch is under way. So a step that is not
finite is noticed one dispatch later, and never saved.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax import data, training
from fmjax.harness.config import RunConfig, mesh
from fmjax.harness.failures import NotFinite
from fmjax.harness.pods import cluster
from fmjax.harness.pods.preemption import Preemption
from fmjax.harness.progress import progress
from fmjax.harness.run import Run
from fmjax.harness.step import Steps
from fmjax.harness.task import Batch, Task
from fmjax.training import sharding

OnMetrics = Callable[[int, dict[str, float]], Any]


class Dispatch(NamedTuple):
    """Steps of one dispatch.

    Attributes:
      first: the first step, counted from 1.
      last: the last one.
      rows: this process's examples of each step, `[num_steps, local_batch]`.
    """

    first: int
    last: int
    rows: np.ndarray


def dispatches(config: RunConfig, num_examples: int, start: int) -> Iterator[Dispatch]:
    """The steps after `start`, cut at the multiples of `steps_per_dispatch`."""
    batches = data.batches(num_examples, config.batch_size, seed=config.seed, start_step=start)
    local = sharding.local_rows(config.batch_size, mesh(config))
    while start < config.num_steps:
        size = config.steps_per_dispatch
        last = min((start // size + 1) * size, config.num_steps)
        rows = np.stack([next(batches)[local] for _ in range(last - start)])
        yield Dispatch(start + 1, last, rows)
        start = last


def gather(batch: Batch, rows: np.ndarray) -> Any:
    """The examples of several steps, read at once.

    Args:
      batch: `rows [num] -> pytree` of host arrays `[num, ...]`.
      rows: `[num_steps, local_batch]`.

    Returns:
      The pytree, its leaves `[num_steps, local_batch, ...]`.

    Raises:
      ValueError: if a leaf has another number of examples than was asked for.
    """
    examples = batch(rows.ravel())
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(examples)]
    if not shapes or any(shape[:1] != (rows.size,) for shape in shapes):
        raise ValueError(
            f"batch must return arrays [num, ...] of the {rows.size} rows asked for; got {shapes}."
        )
    return jax.tree.map(lambda x: np.reshape(x, (*rows.shape, *np.shape(x)[1:])), examples)


def train(
    run: Run,
    task: Task,
    state: training.TrainState,
    steps: Steps,
    key: jax.Array,
    *,
    preview: Callable[[training.TrainState], dict[str, float]] | None = None,
    on_metrics: OnMetrics | None = None,
) -> tuple[training.TrainState, float | None]:
    """Trains from the state, the last checkpoint's, to `num_steps`, with a progress bar.

    Args:
      run: the open run folder.
      task: its data are trained on.
      state: from `run.restore`.
      steps: from `jit_steps`.
      key: the run's training key.
      preview: called every `preview_every` steps; what it returns stands in metrics.jsonl.
      on_metrics: `(step, row)` is called with every line of metrics.jsonl, by process 0.

    Returns:
      The state, and examples per second of this start without its first dispatch (which compiles),
      or None if there were fewer than two.

    Raises:
      FloatingPointError: at a loss or a gradient that is not finite, more often than
        `max_skipped_steps`; nothing after the last good checkpoint is saved.
      ValueError: as `gather` does.
      SystemExit: after SIGTERM (143) or SIGINT (130), when the state has been saved.
    """
    config, start = run.config, int(state.step)
    watch = Watch(run, NotFinite(run, state), start, on_metrics)
    pending, first_end = None, start
    with watch.progress, Preemption().watch() as preemption:
        for count, dispatch in enumerate(dispatches(config, task.num_examples, start)):
            batches = gather(task.batch, dispatch.rows)
            state, metrics = steps(state, key, batches)
            if pending is not None:  # the one before, while this one is running
                watch.look(*pending)
            pending = (dispatch, metrics, batches)
            if count == 0:
                jax.block_until_ready(metrics)
                run.begin()
                watch.compiled, first_end = time.perf_counter(), dispatch.last
            stop = preemption.reached(count)
            done = dispatch.last == config.num_steps
            shown = preview is not None and (_passes(dispatch, config.preview_every) or done)
            if _passes(dispatch, config.checkpoint_every) or shown or done or stop:
                watch.look(*pending, watch.preview(preview, state) if shown else None)
                pending = None
            if dispatch.last % config.checkpoint_every == 0 or done or stop:
                watch.keep(dispatch.last)
                run.save(state, wait=done or stop)
            if stop or (done and preemption.came()):  # also during the last save
                raise preemption.exit(run.address, dispatch.last)
    return state, watch.rate(config.num_steps - first_end)


def _passes(dispatch: Dispatch, every: int) -> bool:
    """Whether one of the dispatch's steps is a multiple of `every`; 0 has none."""
    return bool(every) and dispatch.last // every > (dispatch.first - 1) // every


class Watch:
    """Looks at the metrics that came back: finite, logged, shown."""

    def __init__(
        self, run: Run, not_finite: NotFinite, start: int, on_metrics: OnMetrics | None = None
    ):
        self._run, self._not_finite, self._on_metrics = run, not_finite, on_metrics
        self._seconds_before = run.seconds
        self._seen, self._window = start, run.window(start)
        self._began = self._last = self.compiled = time.perf_counter()
        self._warned, self._resting, self._rested = False, 0.0, 0.0
        num, quiet = run.config.num_steps, not cluster.is_main()
        self.progress = progress(total=num, initial=start, unit="step", disable=quiet)

    def preview(
        self,
        preview: Callable[[training.TrainState], dict[str, float]] | None,
        state: training.TrainState,
    ) -> dict[str, float]:
        """What a preview says; its time is none of the training's."""
        began = time.perf_counter()
        shown = preview(state) if preview is not None else {}
        self._resting += time.perf_counter() - began
        return shown

    def look(
        self,
        dispatch: Dispatch,
        metrics: training.Metrics,
        batches: Any,
        shown: dict[str, float] | None = None,
    ) -> None:
        """Waits for a dispatch's metrics, `[num_steps]` each.

        Args:
          dispatch: its steps.
          metrics: what they returned.
          batches: what they took.
          shown: of the preview that follows its last step, if there was one.
        """
        config, metrics = self._run.config, jax.device_get(metrics)
        now, rate = time.perf_counter(), 0.0
        wanted = {*range(dispatch.first, dispatch.last + 1)}
        wanted = {n for n in wanted if n % config.log_every == 0 or n == config.num_steps}
        wanted |= {dispatch.last} if shown else set()
        if wanted:  # the steps of one dispatch come back together and have one rate
            seconds = max(now - self._last - self._resting, 1e-9)
            rate = (dispatch.last - self._seen) * config.batch_size / seconds
            self._last, self._seen = now, dispatch.last
            self._rested, self._resting = self._rested + self._resting, 0.0
            self._run.seconds = self._seconds_before + now - self._began
        for index, step in enumerate(range(dispatch.first, dispatch.last + 1)):
            one = training.Metrics(*(_at(values, index) for values in metrics))
            # The gradient as well: it made the state that would be saved next.
            if math.isfinite(one.loss) and math.isfinite(one.gradient_norm):
                self._window.append([float(one.loss), float(one.gradient_norm)])
            else:
                examples = jax.tree.map(lambda x, index=index: x[index], batches)
                self._not_finite.note(step, one, dispatch.rows[index], examples)
            if step in wanted:
                last = shown if step == dispatch.last else None
                self._write(step, one, rate, last or {})
        self.progress.update(len(dispatch.rows))
        if wanted and dispatch.first > 1:
            self._tell(dispatch.last, rate)

    def _write(
        self, step: int, metrics: training.Metrics, rate: float, shown: dict[str, float]
    ) -> None:
        """A line: means over the finite steps since the line before, NaN where there are none."""
        loss, norm = np.mean(self._window, axis=0) if self._window else (math.nan, math.nan)
        self._window = []
        row = {"loss": float(loss), "gradient_norm": float(norm)}
        if metrics.learning_rate is not None:
            row |= {"learning_rate": float(metrics.learning_rate)}
        row |= {"examples_per_second": rate} | shown
        self._run.log(step, row)
        if self._on_metrics is not None and cluster.is_main():
            self._on_metrics(step, row)
        held_out = f", held out {shown['held_out_loss']:.4f}" if "held_out_loss" in shown else ""
        text = f"loss {loss:.4f}{held_out}, {rate:.0f} examples/s"
        self.progress.set_postfix_str(text, refresh=False)

    def _tell(self, step: int, rate: float) -> None:
        """Says once, and early, when a run would take days."""
        config = self._run.config
        left = (config.num_steps - step) * config.batch_size / max(rate, 1e-9)
        if not self._warned and left > 86_400 and cluster.is_main():
            print(
                f"\nAt {rate:.3g} examples/s the other {config.num_steps - step} steps take "
                f"{left / 86_400:.1f} days. Ctrl-C saves; fewer --num-steps or a smaller network "
                "end earlier.",
                file=sys.stderr,
                flush=True,
            )
        self._warned = True

    def keep(self, step: int) -> None:
        """Before a checkpoint: what a run that resumes from it needs for its next line."""
        self._run.keep_window(step, self._window)

    def rate(self, num_steps: int) -> float | None:
        """Examples per second of the `num_steps` since `compiled`, or None where there are none."""
        seconds = time.perf_counter() - self.compiled - self._rested
        return num_steps * self._run.config.batch_size / seconds if num_steps > 0 else None


def _at(values: Any, index: int) -> Any:
    return None if values is None else values[index]
