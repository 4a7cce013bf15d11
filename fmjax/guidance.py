"""Guidance: functions from velocities to a velocity.

The score of p(x | c)^scale p(x)^(1 - scale) is a straight combination of two scores, and for an
affine path and independent pairs so is the velocity: u + scale (c - u).
"""

import jax
import jax.numpy as jnp

from .types import Velocity, as_array, as_floating, broadcast_time, checked, wider


def classifier_free_guidance(
    conditional: Velocity, unconditional: Velocity, scale: float | jax.Array
) -> Velocity:
    """Classifier-free guidance: u + scale (c - u).

    Args:
      conditional: velocity with its condition closed over, `c`.
      unconditional: velocity of the null condition, `u`.
      scale: 0 is unconditional, 1 conditional, above 1 guided. A number or an array `[]`, or
        `[batch]`, one for each example.

    Returns:
      A velocity `(t, x) -> u`; each call costs one of either.

    Raises:
      ValueError: by the velocity, if `scale` is neither `[]` nor `[batch]`, or a branch returns
        another shape than that of x.

    Example:
      >>> velocity = classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, 3.0)

    Source: Ho and Salimans 2022, arXiv 2207.12598; Zheng et al. 2023, arXiv 2311.13443.
    """
    guided = checked(conditional, what="the conditional velocity")
    plain = checked(unconditional, what="the unconditional velocity")
    scale = as_array("scale", scale)
    if jnp.issubdtype(scale.dtype, jnp.integer):
        scale = scale.astype(jnp.float32)
    scale = as_floating("scale", scale)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        u, c = plain(t, x), guided(t, x)
        if scale.ndim > 1 or (scale.ndim and scale.shape != u.shape[:1]):
            raise ValueError(
                "scale must be a number or [batch], one for each example; got "
                f"{scale.shape} for x {u.shape}."
            )
        dtype = wider(u.dtype, c.dtype)
        wide = wider(dtype, jnp.float32)
        u, c = u.astype(wide), c.astype(wide)
        return (u + broadcast_time(scale, u).astype(wide) * (c - u)).astype(dtype)

    return velocity
