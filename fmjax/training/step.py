"""One training step: gradient, optimiser, running average. It knows no path and no model.

At step n, with parameters p_n, a batch B and the key k_n = fold_in(key, n):

    g_n     = d/dp loss(p_n, k_n, B)
    p_{n+1} = p_n + tx(g_n)                              (any Optax transformation)
    e_{n+1} = d_n e_n + (1 - d_n) p_{n+1},   e_0 = p_0   (exponential moving average, EMA)
    d_n     = min(ema_decay, (1 + n) / (10 + n))         (warmed, unless a schedule is given)

The average is kept in at least float32: 1 - d_n is far below the spacing of half precision, in
which it would stand still.

Since k_n depends on the key and the step alone, the state holds nothing random: a restored run
draws what the run that never stopped would have drawn.

Data parallelism asks for the mean over the global batch. Under `jax.jit` with shardings it is the
loss's own mean. Under `pmap`, `vmap` or `shard_map` with an axis name each of D replicas holds
B / D examples, and loss and gradients are averaged over the replicas: a mean of equal-sized means
is the mean.

Nothing here is jitted; see `fmjax.training.sharding` for one device or many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from ..types import at_least_float32, kind, returned


class TrainState(NamedTuple):
    """All that a run needs in order to resume.

    Attributes:
      step: steps done so far, int32 `[]`.
      params: parameters, any pytree of floating-point arrays.
      ema_params: their exponential moving average, the same pytree in at least float32.
      opt_state: the state of the Optax transformation.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any


class Metrics(NamedTuple):
    """What one step reports: float32 scalars `[]` on the device.

    Attributes:
      loss: the loss at the parameters before the update, over the global batch.
      gradient_norm: global L2 norm of the gradient, before any clipping in `tx`.
      learning_rate: the rate of this very step, as `optax.inject_hyperparams` recorded it; None
        where `tx` records none, or more than one.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array | None = None


class LossFn(Protocol):
    """`loss_fn(params, key, batch) -> loss`, a scalar: the mean over the examples of `batch`."""

    def __call__(self, params: Any, key: jax.Array, batch: Any, /) -> jax.Array: ...


TrainStep = Callable[[TrainState, jax.Array, Any], tuple[TrainState, Metrics]]
"""`(state, key, batch) -> (state, metrics)`, what `make_train_step` and `many_steps` return."""


def init_train_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step: step 0, EMA equal to the parameters.

    Args:
      params: pytree of floating-point arrays.
      tx: an Optax transformation, the one that `make_train_step` is given.

    Returns:
      A `TrainState`. For a mesh, call it under
      `jax.jit(..., out_shardings=sharding.replicated(mesh))`.

    Raises:
      ValueError: if a leaf of `params` is no floating-point array, which is named, or `tx` is no
        Optax transformation.

    Example:
      >>> state = init_train_state({"w": jnp.zeros(2)}, optax.adam(1e-3))
      >>> int(state.step)
      0
    """
    _check_transformation(tx)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.floating):
            raise ValueError(
                "params must be a pytree of floating-point arrays; got "
                f"{kind(leaf)} at params{jax.tree_util.keystr(path)}. Of an Equinox model take the "
                "arrays: params, static = eqx.partition(model, eqx.is_inexact_array)."
            )
    # Copies: a donated state must not hold one buffer twice, nor take the caller's own.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.result_type(leaf)), params)
    ema_params = jax.tree.map(lambda leaf: jnp.copy(at_least_float32(leaf)), params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, tx.init(params))


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float | optax.Schedule = 0.9999,
    axis_name: str | None = None,
) -> TrainStep:
    """Builds `train_step(state, key, batch) -> (state, metrics)`, a pure function to jit.

    The key is the run's, the same at every step: the step folds `state.step` into it. The state
    may be donated. The equations stand in the module's docstring; a NaN in the loss is kept, not
    hidden, and is the caller's to notice in the metrics.

    Args:
      loss_fn: `loss_fn(params, key, batch) -> scalar`, a mean over the batch.
      tx: an Optax transformation; `adam` below is one that also reports its rate.
      ema_decay: a float in [0, 1], warmed as min(ema_decay, (1 + n) / (10 + n)) with n the steps
        done before this one, so that the first update weighs the new parameters by 0.9; or a
        schedule `n -> decay`, used as it is (`optax.constant_schedule(0.999)`: no warm-up).
      axis_name: the name of the mapped axis where the step runs under `jax.pmap`, `jax.vmap` or
        `jax.shard_map`; None under `jax.jit` alone. With a name, each replica folds its index on
        that axis into the key, and gradients and loss are averaged over the axis.

    Returns:
      The step. Its metrics are `Metrics(loss, gradient_norm, learning_rate)`.

    Raises:
      ValueError: if a float `ema_decay` is outside [0, 1], or `tx` is no Optax transformation; by
        the step, if the loss or a schedule's decay is no floating scalar.

    Example:
      >>> def loss_fn(params, key, x):
      ...     return jnp.mean((x - params["w"]) ** 2)
      >>> tx = optax.adam(1e-3)
      >>> step = jax.jit(make_train_step(loss_fn, tx), donate_argnums=0)
      >>> state = init_train_state({"w": jnp.zeros(())}, tx)
      >>> state, metrics = step(state, jax.random.key(0), jnp.ones(8))
      >>> float(metrics.loss)
      1.0
    """
    ema_weight = _ema_weight(ema_decay)
    _check_transformation(tx)
    tx = optax.with_extra_args_support(tx)  # `value` is for those that look at the loss

    def mean(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def global_loss(params: Any, key: jax.Array, batch: Any) -> jax.Array:
        fix = "It is the mean over the batch: jnp.mean(losses)."
        return mean(returned("loss_fn", loss_fn(params, key, batch), (), fix))

    def train_step(state: TrainState, key: jax.Array, batch: Any) -> tuple[TrainState, Metrics]:
        key_step = jax.random.fold_in(key, state.step)
        if axis_name is not None:
            key_step = jax.random.fold_in(key_step, jax.lax.axis_index(axis_name))
        # The mean stands inside and outside: shard_map's gradient of replicated parameters is a
        # sum over the axis already, pmap's and vmap's is each replica's own. This is right for all.
        loss, gradients = jax.value_and_grad(global_loss)(state.params, key_step, batch)
        gradients = mean(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        wide = optax.tree.cast_like(params, state.ema_params)
        ema_params = optax.incremental_update(wide, state.ema_params, ema_weight(state.step))
        # A schedule's decay in another dtype would change the average's.
        ema_params = optax.tree.cast_like(ema_params, state.ema_params)
        norm = optax.tree.norm(jax.tree.map(at_least_float32, gradients))
        # Optax records in the new state the rate that it has just used.
        values = Metrics(loss, norm, _learning_rate(opt_state))
        metrics = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), values)
        return TrainState(state.step + 1, params, ema_params, opt_state), metrics

    return train_step


def many_steps(train_step: TrainStep) -> TrainStep:
    """Several training steps in one dispatch: `jax.lax.scan` over a stack of batches.

    Small steps are dominated by their dispatch; the device then waits for the host.

    Args:
      train_step: from `make_train_step`.

    Returns:
      `steps(state, key, batches) -> (state, metrics)`, where `batches` is a pytree of arrays
      `[num_steps, batch, ...]` and each of the metrics is `[num_steps]`. It takes the very steps
      that `num_steps` calls of `train_step` would take, up to rounding.

    Example:
      >>> tx, loss_fn = optax.adam(1e-3), lambda params, key, x: jnp.mean((x - params) ** 2)
      >>> steps = jax.jit(many_steps(make_train_step(loss_fn, tx)), donate_argnums=0)
      >>> state = init_train_state(jnp.zeros(()), tx)
      >>> state, metrics = steps(state, jax.random.key(0), jnp.ones((5, 8)))
      >>> metrics.loss.shape
      (5,)
    """

    def steps(state: TrainState, key: jax.Array, batches: Any) -> tuple[TrainState, Metrics]:
        if len(jax.tree.leaves(batches)[0]) == 1:  # one step needs no loop
            state, metrics = train_step(state, key, jax.tree.map(lambda x: x[0], batches))
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(lambda state, batch: train_step(state, key, batch), state, batches)

    return steps


def _check_transformation(tx: Any) -> None:
    if not isinstance(tx, optax.GradientTransformation):
        raise ValueError(
            f"tx must be an Optax transformation; got {kind(tx)}. A function such as optax.adam "
            "makes one: optax.adam(1e-3)."
        )


def _ema_weight(ema_decay: float | optax.Schedule) -> Callable[[jax.Array], jax.typing.ArrayLike]:
    """1 - d_n as a function of n: the weight of the new parameters in the average."""
    if callable(ema_decay):
        return lambda step: 1.0 - returned("ema_decay", 1.0 * ema_decay(step), ())
    if not 0.0 <= ema_decay <= 1.0:
        raise ValueError(
            f"ema_decay must be in [0, 1]; got {ema_decay}. Slow averages are close to 1, as "
            "0.9999 does."
        )
    # 1 - min(d, (1 + n) / (10 + n)), without float32's cancellation near d = 1.
    return lambda step: jnp.maximum(1.0 - ema_decay, 9.0 / (10.0 + step))


def _learning_rate(opt_state: Any) -> Any:
    # The name is also a key of the schedules' states and may be a parameter's: the path tells.
    rates = optax.tree.get_all_with_path(
        opt_state,
        "learning_rate",
        filtering=lambda path, _: len(path) > 1 and getattr(path[-2], "name", "") == "hyperparams",
    )
    return rates[0][1] if len(rates) == 1 else None
