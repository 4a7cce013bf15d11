"""Guidance: functions from velocities to a velocity.

The score of p(x | c)^scale p(x)^(1 - scale) is a straight combination of two scores, and for an
affine path and independent pairs so is the velocity: u + scale (c - u).
"""

import jax

from .types import Velocity


def classifier_free_guidance(
    conditional: Velocity, unconditional: Velocity, scale: float | jax.Array
) -> Velocity:
    """Classifier-free guidance: u + scale (c - u).

    Args:
      conditional: velocity with its condition closed over, `c`.
      unconditional: velocity of the null condition, `u`.
      scale: 0 is unconditional, 1 conditional, above 1 guided. A number or an array `[]`.

    Returns:
      A velocity `(t, x) -> u`; each call costs one of either.

    Example:
      >>> velocity = classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, 3.0)

    Source: Ho and Salimans 2022, arXiv 2207.12598; Zheng et al. 2023, arXiv 2311.13443.
    """

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        u = unconditional(t, x)
        return u + scale * (conditional(t, x) - u)

    return velocity
