"""The training step that the experiments share, as the flags say; nothing about any data set.

What is random in a step, the noise, the pairing and the times, is drawn for the global batch
by `draw`, before the step is spread over the devices; `loss_fn` sees only its result. So the jit
and pmap train on the same numbers, whatever the number of devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fmjax import training
from fmjax.harness.config import RunConfig, mesh
from fmjax.training import sharding

Draw = Callable[[jax.Array, Any], Any]
Steps = Callable[
    [training.TrainState, jax.Array, Any], tuple[training.TrainState, training.Metrics]
]


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Adam as the flags say; with `max_skipped_steps` one that leaves bad steps out."""
    tx = training.adam(
        config.learning_rate, warmup_steps=config.warmup_steps, clip_norm=config.clip_norm
    )
    if not config.max_skipped_steps:
        return tx
    return optax.chain(_spoil(), optax.apply_if_finite(tx, config.max_skipped_steps))


def init_state(
    config: RunConfig,
    init_params: Callable[[jax.Array], Any],
    key: jax.Array,
    tx: optax.GradientTransformation,
) -> training.TrainState:
    """The first state, made on every device: replicated, or split over `fsdp` of them."""

    def init(key: jax.Array) -> training.TrainState:
        return training.init_train_state(init_params(key), tx)

    devices = mesh(config)
    shardings = sharding.state_sharding(jax.eval_shape(init, key), devices)
    # It runs once: on a CPU, to optimise it would take longer than many steps.
    on_cpu = devices.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if on_cpu else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(key)


def make_steps(
    config: RunConfig,
    draw: Draw,
    loss_fn: training.LossFn,
    tx: optax.GradientTransformation,
    state: training.TrainState,
) -> Steps:
    """The compiled steps `(state, key, batches) -> (state, metrics)` on all devices.

    Args:
      config: the run's flags; `parallel` chooses jit or pmap.
      draw: `(key, batch) -> drawn`, all that is random, `[batch, ...]`; both are pytrees.
      loss_fn: `(params, key, drawn) -> scalar`; its key is for dropout.
      tx: an Optax transformation.
      state: from `init_state`; only its shardings are read.

    Returns:
      Steps that take the batches of this process, a pytree of NumPy arrays `[num_steps,
      local_batch, ...]`; each of the metrics is `[num_steps]`.
    """
    if config.parallel == "pmap":
        return _pmap_steps(config, draw, loss_fn, tx)
    step = training.make_train_step(loss_fn, tx, ema_decay=config.ema_decay)

    def whole_step(state, key, batch):
        key_draw, key_loss = jax.random.split(key)
        return step(state, key_loss, draw(jax.random.fold_in(key_draw, state.step), batch))

    devices, shardings = mesh(config), jax.tree.map(lambda x: x.sharding, state)
    jitted = sharding.jit_train_step(
        training.many_steps(whole_step), devices, state=shardings, batch_axis=1
    )
    return lambda state, key, batches: jitted(
        state, key, sharding.shard_batch(batches, devices, axis=1)
    )


def _pmap_steps(
    config: RunConfig, draw: Draw, loss_fn: training.LossFn, tx: optax.GradientTransformation
) -> Steps:
    devices = mesh(config)
    mapped = sharding.pmap_train_step(
        training.make_train_step(
            loss_fn, tx, ema_decay=config.ema_decay, axis_name=sharding.DATA_AXIS
        ),
        list(devices.devices.flat),
    )
    draw_batch = jax.jit(draw, out_shardings=sharding.batch_sharding(devices))

    def steps(state, key, batches):
        key_draw, key_loss = jax.random.split(key)
        metrics = []
        for index in range(len(jax.tree.leaves(batches)[0])):
            batch = jax.tree.map(lambda x, index=index: x[index], batches)
            drawn = draw_batch(jax.random.fold_in(key_draw, state.step), batch)
            state, one = mapped(state, key_loss, drawn)
            metrics.append(one)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *metrics)

    return steps


def _spoil() -> optax.GradientTransformationExtraArgs:
    """NaN for the whole gradient where the loss or its norm is not finite: all is left out then."""

    def update(updates, state, params=None, **extra_args):
        del params
        finite = jnp.isfinite(extra_args["value"]) & jnp.isfinite(optax.tree.norm(updates))
        factor = jnp.where(finite, 1.0, jnp.nan)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
