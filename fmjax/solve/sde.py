"""Solving dx = f(t, x) dt + g(t) dB with Diffrax, in equal steps, forwards or backwards in time.

g does not depend on x, so that the Ito and the Stratonovich solution are the same and solvers of
either kind serve. The Brownian motion is `diffrax.UnsafeBrownianPath`, fresh normal draws for every
step: in equal steps none is asked for twice, and a `VirtualBrownianTree`, which could be, costs 20
to 100 times as much. Its draws depend on the key, the times of the step and nothing else. With it
goes `diffrax.ForwardMode`: derivatives are forward-mode, by `jax.jvp` or `jax.jacfwd`.

A solve that leaves the finite numbers stops with a RuntimeError that says at which time.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np

from ..types import Velocity, as_batch, checked, is_concrete, refuse_explicit_mesh, returned, wider
from .call import check_count, interval
from .failures import raise_if, stopped
from .watch import Watched, check_object

EULER = diffrax.Euler()
SDE_SOLVERS = (diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver)
# Three are for underdamped Langevin systems; Milstein's are Euler's here, with [batch, batch].
UNFIT = (
    diffrax.ALIGN,
    diffrax.QUICSORT,
    diffrax.ShOULD,
    diffrax.ItoMilstein,
    diffrax.StratonovichMilstein,
)


def sample_sde(
    key: jax.Array,
    drift: Velocity,
    diffusion: Callable[[jax.Array], Any],
    x0: jax.Array,
    *,
    t0: float | jax.Array = 0.0,
    t1: float | jax.Array = 1.0,
    solver: diffrax.AbstractSolver = EULER,
    num_steps: int,
) -> jax.Array:
    """Samples x(t1) of dx = drift(t, x) dt + diffusion(t) dB from x(t0) = `x0`.

    Args:
      key: random key of the Brownian motion.
      drift: `(t, x) -> [batch, *event]`, t of shape `[]`; `langevin_drift(...)` for instance.
      diffusion: `t -> g`, a number; `langevin_diffusion(...)` for instance.
      x0: the state at `t0`, `[batch, *event]`. The solve runs in its dtype, in float32 at least.
      t0: the time of `x0`, a number or a traced `[]`.
      t1: the time that is solved to; `t1 < t0` solves backwards, with a drift for that direction.
      solver: one of Diffrax's for SDEs: `Euler()` (one call of the drift in each step), `Heun()`,
        `SEA()`, `SRA1()`, `ShARK()` (two calls, and a smaller error) and others.
      num_steps: that many equal steps.

    Returns:
      `[batch, *event]`, in the dtype of `x0`.

    Raises:
      ValueError: if `drift` or `diffusion` can't be called or returns another shape, `solver` is
        none for SDEs, `num_steps < 1`, `t0` and `t1` are equal or not finite, or the diffusion is
        not finite at a concrete `t0` (`vp` at t = 1).
      RuntimeError: by the solve, if state, drift or diffusion is not finite; it says at which time.

    Example:
      >>> x0 = jnp.zeros((1000, 2))
      >>> x1 = sample_sde(jax.random.key(0), lambda t, x: -x, lambda t: 1.0, x0, num_steps=20)
      >>> bool(abs(x1.var() - 0.5 * (1 - jnp.exp(-2))) < 0.05)  # Ornstein and Uhlenbeck's
      True
    """
    x0 = as_batch("x0", x0)
    refuse_explicit_mesh("x0", x0)
    dtype = wider(x0.dtype, jnp.float32)
    t0, t1 = interval(t0, t1, dtype)
    _check_solver(solver)
    check_count("num_steps", num_steps)
    noise = _checked_diffusion(diffusion, dtype)
    if is_concrete(t0):
        _check_start(noise, t0)
    linspace = np.linspace if is_concrete(t0, t1) else jnp.linspace
    grid = linspace(t0, t1, num_steps + 1, dtype=dtype)
    field, shape = checked(drift, dtype, what="the drift"), x0.shape
    brownian = diffrax.UnsafeBrownianPath(
        jax.ShapeDtypeStruct(shape, dtype), key, levy_area=_levy_area(solver)
    )

    def increment(t: Any, y: Any, args: Any) -> jax.Array:
        del args
        return field(t, y)

    def control(t: Any, y: Any, args: Any) -> lineax.AbstractLinearOperator:
        del y, args
        return lineax.DiagonalLinearOperator(jnp.broadcast_to(noise(t), shape))

    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(diffrax.ODETerm(increment), diffrax.ControlTerm(control, brownian)),
        solver,
        t0=jnp.asarray(t0, dtype),
        t1=jnp.asarray(t1, dtype),
        dt0=None,
        y0=x0.astype(dtype),
        saveat=diffrax.SaveAt(t1=True, controller_state=True),
        # Its count of evaluations is that of an ODE, and not asked for.
        stepsize_controller=Watched(diffrax.StepTo(grid), 1, False),
        max_steps=num_steps,
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    watch: Any = jax.lax.stop_gradient(solution.controller_state)
    failed = solution.result != diffrax.RESULTS.successful
    reached = jnp.where(t0 < t1, 1, -1).astype(dtype) * watch.reached
    message = functools.partial(_stopped, num_steps)
    x = raise_if(failed, solution.ys, message, reached, jnp.zeros((), bool))
    return x[-1].astype(x0.dtype)


def _stopped(num_steps: int, reached: Any, ran_out: Any) -> str:
    return (
        f"{stopped(num_steps, reached, ran_out)} A bridge's drift is not finite at an end that its "
        "diffusion does not match."
    )


def _checked_diffusion(diffusion: Any, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    if not callable(diffusion):
        raise ValueError(
            f"diffusion must be a function t -> g; got {diffusion!r:.40}. A constant is "
            "lambda t: 1.0."
        )

    def noise(t: jax.Array) -> jax.Array:
        g = diffusion(t)
        g = jnp.asarray(g, dtype) if isinstance(g, int | float) else g
        return returned("diffusion(t)", g, (), "It is one number for all.").astype(dtype)

    return noise


def _check_start(noise: Callable[[jax.Array], jax.Array], t0: Any) -> None:
    """Calls the diffusion at a known t0, where a singular path refuses it by name."""
    with jax.ensure_compile_time_eval():
        g = noise(jnp.asarray(t0))
        if is_concrete(g) and not np.isfinite(g):
            raise ValueError(
                f"diffusion(t0) must be finite; got {g} at t0 = {t0}. Move t0 inwards."
            )


def _check_solver(solver: Any) -> None:
    check_object("solver", solver, diffrax.AbstractSolver, "diffrax.Euler()")
    if not isinstance(solver, SDE_SOLVERS) or isinstance(solver, UNFIT):
        raise ValueError(
            "solver must be one of Diffrax's for SDEs with additive noise; got "
            f"{type(solver).__name__}. Take diffrax.Euler(), Heun(), SRA1() or ShARK()."
        )


def _levy_area(solver: diffrax.AbstractSolver) -> Any:
    """What the solver needs to know of the Brownian motion within a step."""
    if issubclass(getattr(solver, "minimal_levy_area", object), diffrax.AbstractSpaceTimeLevyArea):
        return diffrax.SpaceTimeLevyArea
    return diffrax.BrownianIncrement
