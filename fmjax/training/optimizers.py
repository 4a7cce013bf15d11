"""Optimisers: Optax's, with the choices that this project makes.

Both follow one rate, computed from the step n at every step, so that a restored run follows the
rate that it is given, not the one in the checkpoint:

    rate(n) = learning_rate n / warmup_steps                                     n < warmup_steps
    rate(n) = learning_rate (decay_steps - n) / (decay_steps - warmup_steps)     then, down to 0

Without a decay it stays at `learning_rate`. Norms and moments are taken in at least float32,
whatever the parameters' dtype.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from ..types import at_least_float32
from .matrices import apart, dimension_numbers, matrix_axes


def adam(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Adam with a warm-up, a decay and clipping, whose learning rate the metrics show.

    The rate is the module's: zero at the first step of a warm-up.

    Args:
      learning_rate: the rate after the warm-up, finite and not negative.
      warmup_steps: steps from zero to `learning_rate`; 0 for none.
      decay_steps: the step at which the rate has fallen to 0, above `warmup_steps`; None for a
        constant rate after the warm-up.
      clip_norm: the largest global L2 norm that a gradient keeps, positive; None for no clipping.

    Returns:
      An Optax transformation with Adam's default decays (0.9, 0.999).

    Raises:
      ValueError: if an argument is NaN or out of these bounds.

    Example:
      >>> tx = adam(2e-4, warmup_steps=5000, clip_norm=1.0)
    """
    schedule = _schedule("learning_rate", learning_rate, warmup_steps, decay_steps)
    # Static decays are kept out of the state, hence out of the checkpoints.
    inject = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))
    return _in_float32(optax.chain(_clip(clip_norm), inject(learning_rate=schedule)))


def muon(
    learning_rate: float,
    *,
    adam_learning_rate: float | None = None,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """Muon for the hidden matrices of a Flax network, Adam for all else.

    A matrix W [fan_in, fan_out] with momentum M = U S V' moves along the nearest orthogonal one:

        W <- W - rate 0.2 sqrt(max(fan_in, fan_out)) U V'

    with U V' by five Newton-Schulz steps, which leave singular values of about 0.7 to 1.2. By the
    factor before it the entries move by 0.2 rate in the root mean square, as Adam's do, so that one
    rate serves both. Which leaves are matrices `training.matrix_axes` says: kernels of hidden dense
    layers and convolutions, the queries', keys' and values' one by one; no biases, embeddings,
    first or last layers.

    Args:
      learning_rate: Muon's rate after the warm-up, finite and not negative; the one that the
        metrics show.
      adam_learning_rate: Adam's, which rises and falls with it; None for the same.
      warmup_steps: steps from zero to these rates; 0 for none.
      decay_steps: the step at which they have fallen to 0, above `warmup_steps`; None for constant
        rates after the warm-up.
      clip_norm: the largest global L2 norm that a gradient keeps, positive; None for no clipping.
        Muon's moves feel it only through the momentum, since they have no scale.

    Returns:
      An Optax transformation with Optax's own decays: 0.95 and Nesterov for the momentum, 0.9 and
      0.999 for Adam's.

    Raises:
      ValueError: if an argument is NaN or out of these bounds; by `init`, if the parameters hold no
        matrix.

    Example:
      >>> tx = muon(1e-3, warmup_steps=300, decay_steps=8000)

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the factor: Liu et al.
    2025, arXiv 2502.16982.
    """
    rates = {"learning_rate": learning_rate}
    if adam_learning_rate is not None:
        rates |= {"adam_learning_rate": adam_learning_rate}
    schedules = {
        name: _schedule(name, rate, warmup_steps, decay_steps) for name, rate in rates.items()
    }
    # One injection records both rates, under two names; all else stays out of the state.
    static = ("ns_coeffs", "ns_steps", "beta", "eps", "weight_decay", "adam_b1", "adam_b2")
    static += ("adam_eps_root", "adam_weight_decay", "consistent_rms")
    static += ("muon_weight_dimension_numbers",)
    inject = optax.inject_hyperparams(optax.contrib.muon, static_args=static)

    def make(numbers: Any) -> optax.GradientTransformation:
        return inject(**schedules, consistent_rms=0.2, muon_weight_dimension_numbers=numbers)

    return _in_float32(optax.chain(_clip(clip_norm), _on_matrices(make)))


def _schedule(name: str, rate: float, warmup_steps: int, decay_steps: int | None) -> optax.Schedule:
    """The rate of the module's docstring; `name` names it in the error."""
    if not 0 <= warmup_steps < math.inf:
        raise ValueError(
            f"warmup_steps must be finite and not negative; got {warmup_steps}. 0 is no warm-up."
        )
    if not 0 <= rate < math.inf:
        raise ValueError(f"{name} must be finite, 0 or more; got {rate}.")
    if decay_steps is not None and not warmup_steps < decay_steps < math.inf:
        raise ValueError(
            f"decay_steps must be above warmup_steps; got {decay_steps} and {warmup_steps}. None "
            "is no decay."
        )
    after = (
        optax.constant_schedule(rate)
        if decay_steps is None
        else optax.linear_schedule(rate, 0.0, decay_steps - warmup_steps)
    )
    # optax.linear_schedule over zero steps would stay at its first value, zero.
    if not warmup_steps:
        return after
    rising = optax.linear_schedule(0.0, rate, warmup_steps)
    return rising if decay_steps is None else optax.join_schedules([rising, after], [warmup_steps])


def _clip(clip_norm: float | None) -> optax.GradientTransformation:
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive; got {clip_norm}. None is no clipping.")
    return optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)


def _on_matrices(
    make: Callable[[Any], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """`make(dimension_numbers)` on trees in which several matrices in one leaf stand apart."""

    def init(params: Any) -> Any:
        matrices = matrix_axes(params)
        return make(dimension_numbers(matrices)).init(apart(matrices, params))

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args  # neither looks at the loss
        matrices = matrix_axes(updates)
        tx = make(dimension_numbers(matrices))
        params = None if params is None else apart(matrices, params)
        moves, state = tx.update(apart(matrices, updates), state, params)
        return jax.tree.map(lambda move, old: move.reshape(old.shape), moves, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` on gradients and parameters in at least float32: moments in half precision stand still.

    `optax.apply_updates` casts the updates back.
    """
    tx = optax.with_extra_args_support(tx)

    def wide(tree: Any) -> Any:
        return jax.tree.map(at_least_float32, tree)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        params = None if params is None else wide(params)
        return tx.update(wide(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)
