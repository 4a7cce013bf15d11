"""Optimisers: Optax's, with the choices that this project makes."""

import math
from typing import Any

import jax
import optax

from ..types import at_least_float32


def adam(
    learning_rate: float, *, warmup_steps: int = 0, clip_norm: float | None = None
) -> optax.GradientTransformation:
    """Adam with a linear warm-up and clipping, whose learning rate the metrics show.

    The rate of step n is learning_rate * min(n / warmup_steps, 1): zero at the first step of a
    warm-up. It is computed from the step at every step, so a restored run follows the rate that it
    is given, not the one in the checkpoint. Norms and moments are taken in at least float32,
    whatever the parameters' dtype.

    Args:
      learning_rate: the rate after the warm-up, finite and not negative.
      warmup_steps: steps from zero to `learning_rate`; 0 for a constant rate.
      clip_norm: the largest global L2 norm that a gradient keeps, positive; None for no clipping.

    Returns:
      An Optax transformation with Adam's default decays (0.9, 0.999).

    Raises:
      ValueError: if an argument is NaN or out of these bounds.

    Example:
      >>> tx = adam(2e-4, warmup_steps=5000, clip_norm=1.0)
    """
    if not 0 <= warmup_steps < math.inf:
        raise ValueError(
            f"warmup_steps must be finite and not negative; got {warmup_steps}. 0 is no warm-up."
        )
    if not 0 <= learning_rate < math.inf:
        raise ValueError(f"learning_rate must be finite, 0 or more; got {learning_rate}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive; got {clip_norm}. None is no clipping.")
    # optax.linear_schedule over zero steps would stay at its first value, zero.
    schedule = (
        optax.linear_schedule(0.0, learning_rate, warmup_steps)
        if warmup_steps
        else optax.constant_schedule(learning_rate)
    )
    # Static decays are kept out of the state, hence out of the checkpoints.
    inject = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    return _in_float32(optax.chain(clip, inject(learning_rate=schedule)))


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
