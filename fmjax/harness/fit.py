"""Training without a run folder: for a notebook."""

from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax import data, training
from fmjax.harness import keys
from fmjax.harness.loop import gather
from fmjax.harness.progress import progress
from fmjax.harness.task import Task
from fmjax.training import sharding


class Fitted(NamedTuple):
    """What `fit` gives: the last state, and the loss of every step, `[num_steps]`."""

    state: training.TrainState
    losses: np.ndarray


def fit(
    task: Task,
    num_steps: int,
    *,
    batch_size: int = 128,
    seed: int = 0,
    state: training.TrainState | None = None,
    bar: bool = True,
) -> Fitted:
    """Trains a task on the devices of this process, and keeps nothing on disk.

    Args:
      task: its data are trained on.
      num_steps: steps in all, those of `state` included.
      batch_size: examples per step, over all devices.
      seed: of the parameters, the order of the data and what the steps draw.
      state: where to go on, what an earlier `fit` returned; it is used up. None for a new one.
      bar: whether there is a progress bar.

    Returns:
      `(state, losses)`: parameters in `state.params`, their moving average in `state.ema_params`,
      which `task.velocity` takes; and the loss of each of the steps taken.

    Raises:
      ValueError: for a batch that the data or the devices can't fill.
      FloatingPointError: at a loss that is not finite, named by its step.

    Example:
      >>> state, losses = fit(task, num_steps=500)  # doctest: +SKIP
      >>> velocity = task.velocity(state.ema_params, None)  # doctest: +SKIP
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size(batch_size, mesh.size)
    begin = jax.jit(task.init, out_shardings=sharding.replicated(mesh))
    last = begin(keys.key(seed, "parameters")) if state is None else state
    start = int(last.step)
    order = data.batches(task.num_examples, batch_size, seed=seed, start_step=start)
    step, key = sharding.jit_train_step(task.step, mesh), keys.key(seed, "training")
    losses: list[Any] = []
    with progress(
        total=num_steps, initial=start, unit="step", leave=False, disable=not bar
    ) as shown:
        for number in range(start + 1, num_steps + 1):
            batch = jax.tree.map(lambda x: x[0], gather(task.batch, next(order)[None]))
            last, metrics = step(last, key, sharding.shard_batch(batch, mesh))
            losses.append(metrics.loss)
            if len(losses) > 1:  # the one before, while this one is running
                losses[-2] = _finite(losses[-2], number - 1)
                shown.set_postfix_str(f"loss {losses[-2]:.4f}", refresh=False)
            shown.update()
    if losses:
        losses[-1] = _finite(losses[-1], num_steps)
    return Fitted(last, np.asarray(losses, np.float32))


def _finite(loss: Any, step: int) -> float:
    value = float(loss)
    if not np.isfinite(value):
        raise FloatingPointError(
            f"The loss of step {step} is {value}. A lower learning rate is the usual fix."
        )
    return value
