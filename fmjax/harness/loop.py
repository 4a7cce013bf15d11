"""The training loop that the experiments share: batches, steps, and what may end them.

The host stays ahead of the device: it gathers and sends the next batches while the device works on
the last ones, and looks at metrics only when the next dispatch is under way. So a step that is not
finite is noticed one dispatch later, and never saved.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax import data, training
from fmjax.harness import cluster
from fmjax.harness.config import RunConfig, mesh
from fmjax.harness.failures import NotFinite
from fmjax.harness.progress import progress
from fmjax.harness.run import Run
from fmjax.harness.step import Steps
from fmjax.training import sharding

Batch = Callable[[np.ndarray], Any]  # rows `[num]` of the data -> a pytree of arrays `[num, ...]`


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
    state: training.TrainState,
    steps: Steps,
    key: jax.Array,
    num_examples: int,
    batch: Batch,
) -> tuple[training.TrainState, float | None]:
    """Trains from the last checkpoint to `num_steps`, with a progress bar.

    Args:
      run: the open run folder.
      state: a fresh state, which also says what a checkpoint must look like.
      steps: from `make_steps`.
      key: the run's training key.
      num_examples: of the data.
      batch: reads rows of the data, on the host: memory, disk or network is its own affair.

    Returns:
      The state, and examples per second of this start without its first dispatch (which compiles),
      or None if there were fewer than two.

    Raises:
      FloatingPointError: at a loss or a gradient that is not finite, more often than
        `max_skipped_steps`; nothing after the last good checkpoint is saved.
      ValueError: as `gather` does.
      SystemExit: after SIGTERM (143) or SIGINT (130), when the state has been saved.
    """
    config, state = run.config, run.restore(state)
    start = int(state.step)
    watch = Watch(run, NotFinite(run, state), start)
    pending, first_end = None, start
    with watch.progress, cluster.Preemption().watch() as preemption:
        for count, dispatch in enumerate(dispatches(config, num_examples, start)):
            batches = gather(batch, dispatch.rows)
            state, metrics = steps(state, key, batches)
            if pending is not None:  # the one before, while this one is running
                watch.look(*pending)
            pending = (dispatch, metrics, batches)
            if count == 0:
                jax.block_until_ready(metrics)
                watch.compiled, first_end = time.perf_counter(), dispatch.last
            stop = preemption.reached(count)
            done = dispatch.last == config.num_steps
            if dispatch.last % config.checkpoint_every == 0 or done or stop:
                watch.look(*pending)
                pending = None
                run.save(state, wait=done or stop)
            if stop or (done and preemption.came()):  # also during the last save
                raise preemption.exit(run.folder, dispatch.last)
    return state, watch.rate(config.num_steps - first_end)


class Watch:
    """Looks at the metrics that came back: finite, logged, shown."""

    def __init__(self, run: Run, not_finite: NotFinite, start: int):
        self._run, self._not_finite = run, not_finite
        self._seconds_before = run.seconds
        self._seen = start
        self._began = self._last = self.compiled = time.perf_counter()
        num, quiet = run.config.num_steps, not cluster.is_main()
        self.progress = progress(total=num, initial=start, unit="step", disable=quiet)

    def look(self, dispatch: Dispatch, metrics: training.Metrics, batches: Any) -> None:
        """Waits for a dispatch's metrics, `[num_steps]` each."""
        config, metrics = self._run.config, jax.device_get(metrics)
        now, rate = time.perf_counter(), 0.0
        wanted = {*range(dispatch.first, dispatch.last + 1)}
        wanted = {n for n in wanted if n % config.log_every == 0 or n == config.num_steps}
        if wanted:  # the steps of one dispatch come back together and have one rate
            rate = (dispatch.last - self._seen) * config.batch_size / max(now - self._last, 1e-9)
            self._last, self._seen = now, dispatch.last
            self._run.seconds = self._seconds_before + now - self._began
        for index, step in enumerate(range(dispatch.first, dispatch.last + 1)):
            one = training.Metrics(*(values[index] for values in metrics))
            # The gradient as well: it made the state that would be saved next.
            if not (math.isfinite(one.loss) and math.isfinite(one.gradient_norm)):
                examples = jax.tree.map(lambda x, index=index: x[index], batches)
                self._not_finite.note(step, one, dispatch.rows[index], examples)
            if step in wanted:
                self._run.log(step, one, rate)
                text = f"loss {one.loss:.4f}, {rate:.0f} examples/s"
                self.progress.set_postfix_str(text, refresh=False)
        self.progress.update(len(dispatch.rows))

    def rate(self, num_steps: int) -> float | None:
        """Examples per second of the `num_steps` since `compiled`, or None where there are none."""
        seconds = time.perf_counter() - self.compiled
        return num_steps * self._run.config.batch_size / seconds if num_steps > 0 else None
