"""The optimiser that the flags describe, and a task's steps on all devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from fmjax import training
from fmjax.harness.config import RunConfig, mesh
from fmjax.harness.task import Init, LossStep, Task
from fmjax.training import sharding

Steps = Callable[
    [training.TrainState, jax.Array, Any], tuple[training.TrainState, training.Metrics]
]
HeldOut = Callable[[training.TrainState, jax.Array, Any], jax.Array]


def optimizer(config: RunConfig) -> optax.GradientTransformation:
    """The optimiser that the flags name; with `max_skipped_steps` one that leaves bad steps out."""
    make = training.muon if config.optimizer == "muon" else training.adam
    tx = make(
        config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.decay_steps,
        clip_norm=config.clip_norm,
    )
    return skip_not_finite(tx, config.max_skipped_steps)


def skip_not_finite(tx: optax.GradientTransformation, most: int) -> optax.GradientTransformation:
    """`tx`, which leaves out up to `most` steps whose loss or gradient is not finite."""
    return optax.chain(_spoil(), optax.apply_if_finite(tx, most)) if most else tx


def init_state(config: RunConfig, init: Init, key: jax.Array) -> training.TrainState:
    """The first state, made on every device: replicated, or split over `fsdp` of them."""
    devices = mesh(config)
    shardings = sharding.state_sharding(jax.eval_shape(init, key), devices)
    # It runs once: on a CPU, to optimise it would take longer than many steps.
    return jax.jit(init, out_shardings=shardings, compiler_options=unoptimised(devices))(key)


def unoptimised(devices: Mesh) -> dict[str, Any] | None:
    """Compiler options of what hardly runs: on a CPU it compiles in about half of the time."""
    on_cpu = devices.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0} if on_cpu else None


def in_parts(config: RunConfig, task: Task) -> Task:
    """The task, its step's batch taken in the parts that `--accumulate` asks for.

    Raises:
      ValueError: if the task has a step of its own, which can't be divided from outside.
    """
    if config.accumulate == 1:
        return task
    if not isinstance(task.step, LossStep):
        raise ValueError(
            "--accumulate needs a task whose step harness.from_loss makes; this one has a step of "
            f"its own and got {config.accumulate} parts. Leave the flag out; a smaller "
            "--batch-size fits too."
        )
    return task._replace(step=task.step.in_parts(config.accumulate, mesh(config)))


def jit_steps(config: RunConfig, step: training.TrainStep, state: training.TrainState) -> Steps:
    """The compiled steps `(state, key, batches) -> (state, metrics)` on all devices.

    Args:
      config: the run's flags.
      step: a task's.
      state: from `init_state`; only its shardings are read.

    Returns:
      Steps that take the batches of this process, a pytree of NumPy arrays `[num_steps,
      local_batch, ...]`; each of the metrics is `[num_steps]`. The state is donated.
    """
    devices, shardings = mesh(config), jax.tree.map(lambda x: x.sharding, state)
    jitted = sharding.jit_train_step(
        training.many_steps(step), devices, state=shardings, batch_axis=1
    )
    return lambda state, key, batches: jitted(
        state, key, sharding.shard_batch(batches, devices, axis=1)
    )


def jit_held_out(config: RunConfig, task: Task, state: training.TrainState) -> HeldOut:
    """The loss `(state, key, batch) -> []` of held-out examples, on all devices.

    It is what the step's metrics say at the state's parameters: the training loss, on other
    examples. What of the step does not lead to it, the gradient above all, XLA leaves out. It is
    always drawn as in step 0, so that it changes from one preview to the next by the parameters
    alone.
    """
    devices, shardings = mesh(config), jax.tree.map(lambda x: x.sharding, state)

    def loss(state: training.TrainState, key: jax.Array, batch: Any) -> jax.Array:
        return task.step(state._replace(step=jnp.zeros_like(state.step)), key, batch)[1].loss

    one = sharding.replicated(devices)
    jitted = jax.jit(
        loss, in_shardings=(shardings, one, sharding.batch_sharding(devices)), out_shardings=one
    )
    return lambda state, key, batch: jitted(state, key, sharding.shard_batch(batch, devices))


def _spoil() -> optax.GradientTransformationExtraArgs:
    """NaN for the whole gradient where the loss or its norm is not finite: all is left out then."""

    def update(updates, state, params=None, **extra_args):
        del params
        finite = jnp.isfinite(extra_args["value"]) & jnp.isfinite(optax.tree.norm(updates))
        factor = jnp.where(finite, 1.0, jnp.nan)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
