"""The training loop that the experiments share: a step, a loop, nothing about any data set.

What is random in a step, the noise, the pairing and the times, is drawn for the whole global batch
by `draw`, before the step is spread over the devices; `loss_fn` sees only its result. So the jit
and the pmap road train on the same numbers, whatever the number of devices.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import tqdm

from experiments.run import Run, RunConfig
from fmjax import data, sharding, training

Draw = Callable[[jax.Array, jax.Array], Any]


def make_step(
    config: RunConfig, draw: Draw, loss_fn: training.LossFn, tx: Any
) -> training.TrainStep:
    """The compiled step `(state, key, x1) -> (state, metrics)` on all devices.

    Args:
      config: the run's flags; `parallel` chooses the road.
      draw: `(key, x1) -> drawn`, all that is random, `[batch, ...]`.
      loss_fn: `(params, key, drawn) -> scalar`; its key is for dropout.
      tx: an Optax transformation.
    """
    mesh = sharding.make_mesh()
    if config.parallel == "pmap":
        step = training.make_train_step(
            loss_fn, tx, ema_decay=config.ema_decay, axis_name=sharding.DATA_AXIS
        )
        mapped = sharding.pmap_train_step(step)
        draw_batch = jax.jit(draw, out_shardings=sharding.batch_sharding(mesh))

        def pmap_step(state, key, x1):
            key_draw, key_loss = jax.random.split(key)
            return mapped(state, key_loss, draw_batch(jax.random.fold_in(key_draw, state.step), x1))

        return pmap_step

    step = training.make_train_step(loss_fn, tx, ema_decay=config.ema_decay)

    def whole_step(state, key, x1):
        key_draw, key_loss = jax.random.split(key)
        return step(state, key_loss, draw(jax.random.fold_in(key_draw, state.step), x1))

    jitted = sharding.jit_train_step(whole_step, mesh)
    return lambda state, key, x1: jitted(state, key, sharding.shard_batch(x1, mesh))


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Adam as the flags say."""
    return training.adam(
        config.learning_rate, warmup_steps=config.warmup_steps, clip_norm=config.clip_norm
    )


def init_state(
    init_params: Callable[[jax.Array], Any], key: jax.Array, tx: Any
) -> training.TrainState:
    """The first state, made in place on every device."""
    whole = sharding.replicated(sharding.make_mesh())
    init = jax.jit(lambda key: training.init_train_state(init_params(key), tx), out_shardings=whole)
    return init(key)


def train(
    run: Run,
    state: training.TrainState,
    step_fn: training.TrainStep,
    key: jax.Array,
    x1: np.ndarray,
) -> tuple[training.TrainState, float | None]:
    """Trains from the last checkpoint to `num_steps`, with a progress bar.

    Args:
      run: the open run folder.
      state: a fresh state, which also says what a checkpoint must look like.
      step_fn: from `make_step`.
      key: the run's training key.
      x1: the data, `[num_examples, *event]`.

    Returns:
      The state, and examples per second of this start without its first step (which compiles), or
      None if there were fewer than two steps to take.

    Raises:
      FloatingPointError: at a loss or a gradient that is not finite; nothing after the last good
        checkpoint is saved.
    """
    config, state = run.config, run.restore(state)
    start = int(state.step)
    batches = data.batches(len(x1), config.batch_size, seed=config.seed, start_step=start)
    progress = tqdm.tqdm(
        total=config.num_steps,
        initial=start,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,  # a log file wants few lines
    )
    began = last = compiled = time.perf_counter()
    pending, logged, seconds_before = None, start, run.seconds

    def fetch(step: int, metrics: training.Metrics) -> None:
        nonlocal last, logged
        metrics = jax.device_get(metrics)
        # The gradient as well: it made the state that would be saved next.
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.gradient_norm)):
            raise FloatingPointError(
                f"The loss of step {step} is {metrics.loss}, its gradient's norm "
                f"{metrics.gradient_norm}. The run stops; the checkpoints in {run.folder} are from "
                "before. A lower --learning-rate is the usual mend."
            )
        if step % config.log_every == 0 or step == config.num_steps:
            now = time.perf_counter()
            run.seconds = seconds_before + now - began
            rate = (step - logged) * config.batch_size / (now - last)
            last, logged = now, step
            run.log(step, metrics, rate)
            progress.set_postfix_str(
                f"loss {metrics.loss:.4f}, {rate:.0f} examples/s", refresh=False
            )

    with progress:
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = step_fn(state, key, x1[next(batches)])
            if pending is not None:  # the step before, while this one is running
                fetch(*pending)
            pending = (step, metrics)
            if step == start + 1:
                jax.block_until_ready(metrics)
                compiled = time.perf_counter()
            if step % config.checkpoint_every == 0 or step == config.num_steps:
                fetch(*pending)
                pending = None
                run.save(state, wait=step == config.num_steps)
            progress.update()
    steps = config.num_steps - start - 1
    rate = steps * config.batch_size / (time.perf_counter() - compiled) if steps > 0 else None
    return state, rate
