"""Solving dx/dt = v(t, x) with Diffrax: from the source (t = 0) to the data (t = 1), or back.

Solvers, step-size controllers and adjoints are Diffrax's own objects. A solve either takes
`num_steps` equal steps or is adaptive; by default `PIDController(rtol=1e-5, atol=1e-5)`. A batch
shares one adaptive step, its error measured over the whole batch.

Wrap a solve in `jax.jit`: outside of it every call compiles anew, since the velocity may have
changed with what it closes over. A function of the parameters compiles once for all of them:

    draw = jax.jit(lambda params, x0: sample(functools.partial(model.apply, params), x0))

`num_evaluations` is the true cost: every call of the velocity, those of rejected steps included.
(Under `jax.vmap` the solves of a batch run in step with the longest, and each counts its own.)
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, checked, refuse_explicit_mesh, wider
from .call import SolveOptions, solve


class Trajectory(NamedTuple):
    """A solved ODE.

    Attributes:
      t: the times, `[num_times]`.
      x: the states at those times, `[num_times, batch, *event]`.
      num_evaluations: calls of the velocity that the solve made, `[]`, int32.
    """

    t: jax.Array
    x: jax.Array
    num_evaluations: jax.Array


def integrate(
    velocity: Velocity,
    x0: jax.Array,
    *,
    ts: jax.Array | None = None,
    **options: Unpack[SolveOptions],
) -> Trajectory:
    """Solves dx/dt = velocity(t, x) from x(t0) = `x0` to `t1`; `t1 < t0` solves backwards.

    Args:
      velocity: `(t, x) -> u`, with `t` of shape `[]`.
      x0: the state at `t0`, `[batch, *event]`. The solve runs in its dtype, in float32 at least.
      ts: times at which the state is wanted, `[num_times]`, in order from `t0` to `t1`; between
        steps it is interpolated by the solver's own rule. Without it, `t1` alone.
      **options: `SolveOptions`: t0, t1, solver, stepsize_controller, num_steps, max_steps, adjoint.

    Returns:
      `Trajectory(t, x, num_evaluations)`, `x` of shape `[num_times, batch, *event]` in the dtype of
      `x0`; `num_times` is 1 without `ts`.

    Raises:
      ValueError: `num_steps` together with a controller; `num_steps < 1`; neither with a solver
        that has no error estimate; a solver whose evaluations are not known; `t0` and `t1` equal or
        not finite; bad `ts`; a velocity that returns anything but a floating array of x's shape.
      RuntimeError: by the solve, if `max_steps` were taken, or the state, the velocity or a traced
        end is not finite; it says at which time.

    Example:
      >>> import diffrax
      >>> integrate(lambda t, x: -x, jnp.ones((1, 2)), solver=diffrax.Heun(), num_steps=10).x.shape
      (1, 1, 2)
    """
    x0 = as_batch("x0", x0)
    refuse_explicit_mesh("x0", x0)
    dtype = wider(x0.dtype, jnp.float32)
    t, x, num_evaluations = solve(checked(velocity, dtype), x0.astype(dtype), ts=ts, **options)
    return Trajectory(t, x.astype(x0.dtype), num_evaluations)


def sample(velocity: Velocity, x0: jax.Array, **options: Unpack[SolveOptions]) -> jax.Array:
    """The end point of `integrate`: samples x(t1) from source samples x(t0) = `x0`.

    Arguments and errors are those of `integrate`.

    Returns:
      `[batch, *event]`, in the dtype of `x0`.

    Example:
      >>> import diffrax
      >>> x0 = jax.random.normal(jax.random.key(0), (16, 2))
      >>> x1 = sample(lambda t, x: -x, x0, solver=diffrax.Euler(), num_steps=100)
    """
    return integrate(velocity, x0, **options).x[-1]
