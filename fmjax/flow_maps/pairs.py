"""Pairs of ends of a flow's paths, on which another flow is trained, and how straight paths are.

A velocity u carries x0 to x1 = phi(0, 1, x0) along one path. Flow matching on the pairs (x0, x1)
instead of independent ones ("reflow") keeps the distribution of x1, lowers the cost of transport
and straightens the paths. How straight they are is

    S(x0) = integral over t in [0, 1] of |u(t, x_t) - (x1 - x0)|^2 / D dt,    x_t = phi(0, t, x0):

zero if and only if the path is a straight line passed at a constant speed, which one Euler step
follows exactly.

Source: Liu et al. 2022, arXiv 2209.03003.
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from ..solve import SolveOptions, sample
from ..solve.call import backwards, solve
from ..types import Velocity, as_batch, checked, wider


def flow_pairs(
    velocity: Velocity, x0: jax.Array, **options: Unpack[SolveOptions]
) -> tuple[jax.Array, jax.Array]:
    """Source samples and where the flow carries them: (x0, phi(0, 1, x0)).

    Args:
      velocity: the teacher, `(t, x) -> u`, `t` of shape `[]`.
      x0: source samples, `[batch, *event]`.
      **options: `SolveOptions`, as `fm.sample` takes them.

    Returns:
      `(x0, x1)`, each `[batch, *event]` in the dtype of `x0`.

    Raises:
      ValueError: as `fm.integrate` does; for a teacher of another event shape for instance.

    Example:
      >>> x0, x1 = flow_pairs(lambda t, x: jnp.ones_like(x), jnp.zeros((1, 2)))
      >>> bool(jnp.allclose(x1, 1.0))
      True

    Source: arXiv 2209.03003, algorithm 1.
    """
    x0 = as_batch("x0", x0)
    return x0, sample(velocity, x0, **options)


def invert_pairs(
    velocity: Velocity, x1: jax.Array, **options: Unpack[SolveOptions]
) -> tuple[jax.Array, jax.Array]:
    """Data and where the flow brings them from: (phi(1, 0, x1), x1), by the solve backwards.

    Pairs of real data do not drift, as those do that a teacher made.

    Args:
      velocity: the teacher, `(t, x) -> u`, `t` of shape `[]`.
      x1: data, `[batch, *event]`.
      **options: `SolveOptions` of the solve from source to data; t0 and t1 change places here.

    Returns:
      `(x0, x1)`, each `[batch, *event]` in the dtype of `x1`.

    Raises:
      ValueError: as `fm.integrate` does; for a teacher of another event shape for instance.

    Example:
      >>> x0, x1 = invert_pairs(lambda t, x: jnp.ones_like(x), jnp.ones((1, 2)))
      >>> bool(jnp.allclose(x0, 0.0, atol=1e-6))
      True

    Source: Seong et al. 2025, arXiv 2510.25229.
    """
    x1 = as_batch("x1", x1)
    return sample(velocity, x1, **backwards(options)), x1


def straightness(velocity: Velocity, x0: jax.Array, **options: Unpack[SolveOptions]) -> jax.Array:
    """How far the paths from x0 are from straight lines: the integral S(x0) of the module.

    The flow is solved twice: once for x1, once for the integral along the path.

    Args:
      velocity: `(t, x) -> u`, `t` of shape `[]`.
      x0: source samples, `[batch, *event]`.
      **options: `SolveOptions`. The integral is one more state of the solve, with its tolerance.

    Returns:
      `[batch]`, over the times of the solve, [0, 1] without options, whichever way it goes; in at
      least float32, in the unit of x squared, not negative; 0 for straight paths.
      Its mean over x0 divided by the mean of `transport_cost` has no unit.

    Raises:
      ValueError: as `fm.integrate` does.

    Example:
      >>> bool(straightness(lambda t, x: jnp.ones_like(x), jnp.zeros((1, 2)))[0] < 1e-9)
      True

    Source: arXiv 2209.03003, equation 6.
    """
    given = as_batch("x0", x0)
    dtype = wider(given.dtype, jnp.float32)
    velocity, x0 = checked(velocity, dtype), given.astype(dtype)
    ends = options.get("t0", 0.0), options.get("t1", 1.0)
    speed = (sample(velocity, x0, **options) - x0) / (ends[1] - ends[0])

    def field(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u = velocity(t, state[0])
        return u, jnp.mean(jnp.square(u - speed), axis=range(1, u.ndim))

    _, (_, integral), _ = solve(field, (x0, jnp.zeros(x0.shape[:1], dtype)), **options)
    return jnp.abs(integral[-1])  # which backwards in time counts down
