"""One solve with Diffrax, for `sampling` and `likelihood`: checks, the count, failures.

How many evaluations a solve makes follows from its method: with s stages a step costs s calls, or
s - 1 and one at the start where the first stage is the last of the step before (FSAL: Tsit5,
Dopri5). A rejected step costs what an accepted one does. The first adaptive step that is tried is a
tenth of the interval: choosing it costs nothing, and a smaller one as a rule costs a step more.

On its own Diffrax carries a state of NaNs to the end of a fixed grid; and an adaptive step into an
infinite velocity makes the next step NaN, so that the solve stands still until `max_steps` are
spent. Here a step that is not finite counts as one of infinite error, to be tried again shorter,
and the solve stops with `dt_min_reached` as soon as an accepted state is not finite, or a rejected
step would be followed by one too short for time to advance.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .types import Velocity, check_same_shape

_TOLERANCE = 1e-5
FIRST_STEP = 0.1  # of the interval


def solve(
    vector_field: Callable[[Any, Any], Any],
    y0: Any,
    *,
    t0: float,
    t1: float,
    ts: jax.Array | None,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    num_steps: int | None,
    max_steps: int,
    adjoint: diffrax.AbstractAdjoint,
) -> tuple[jax.Array, Any, jax.Array]:
    """`integrate` for any pytree `y0` of arrays of one floating dtype: (t, y, num_evaluations)."""
    check_interval(t0, t1)
    dtype = jax.tree.leaves(y0)[0].dtype
    if ts is not None:
        ts = _check_ts(ts, t0, t1).astype(dtype)
    if num_steps is not None:
        _check_num_steps(num_steps, stepsize_controller)
        # A grid, rather than a step size, makes it `num_steps` steps whatever the rounding.
        stepsize_controller = diffrax.StepTo(np.linspace(t0, t1, num_steps + 1, dtype=dtype))
        max_steps = num_steps
    elif stepsize_controller is None:
        stepsize_controller = default_controller()
    per_step, at_start = evaluations(solver, stepsize_controller)
    on_a_grid = isinstance(stepsize_controller, diffrax.StepTo)
    first_step = None if on_a_grid else jnp.asarray(FIRST_STEP * (t1 - t0), dtype)

    # The second sub-save holds the time that was reached, whether or not the solve came through.
    end = diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: None)
    wanted = diffrax.SubSaveAt(t1=True) if ts is None else diffrax.SubSaveAt(ts=ts)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: vector_field(t, y)),
        solver,
        # A Python float would make a float64 solve under x64.
        t0=jnp.asarray(t0, dtype),
        t1=jnp.asarray(t1, dtype),
        dt0=first_step,
        y0=y0,
        saveat=diffrax.SaveAt(subs=[wanted, end]),
        stepsize_controller=StopWhenStalled(stepsize_controller),
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
    )
    assert solution.ts is not None and solution.ys is not None  # SaveAt asks for both
    (t, reached), (y, _) = solution.ts, solution.ys
    num_evaluations = at_start + per_step * solution.stats["num_steps"]
    y = _raise_on_failure(y, solution.result, reached[-1], t0, t1, max_steps)
    return t, y, num_evaluations


def checked(velocity: Velocity, dtype: jnp.dtype) -> Velocity:
    """The velocity in `dtype`, refused where its shape is not that of x: nothing is broadcast."""

    def call(t: jax.Array, x: jax.Array) -> jax.Array:
        u = jnp.asarray(velocity(t, x))
        check_same_shape("x and the velocity there", x, u)
        return u.astype(dtype)

    return call


def check_interval(t0: float, t1: float) -> None:
    if t0 == t1:
        raise ValueError(f"t0 and t1 must differ; got {t0} for both. A flow runs from 0 to 1.")


def default_controller() -> diffrax.AbstractStepSizeController:
    return diffrax.PIDController(rtol=_TOLERANCE, atol=_TOLERANCE)


def _check_num_steps(
    num_steps: int, stepsize_controller: diffrax.AbstractStepSizeController | None
) -> None:
    if stepsize_controller is not None:
        raise ValueError(
            "num_steps means equal steps and excludes stepsize_controller; got "
            f"num_steps={num_steps} and {type(stepsize_controller).__name__}. Give one of the two."
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}.")


def _check_ts(ts: jax.Array, t0: float, t1: float) -> jax.Array:
    """Refuses times that are no ordered vector between t0 and t1, as far as they are concrete."""
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(f"ts must be a vector [num_times], not empty; got the shape {ts.shape}.")
    if not isinstance(ts, Tracer):
        along = (np.asarray(ts, np.float64) - t0) / (t1 - t0)
        slack = 1e-6  # a float32 grid need not end exactly on t1
        if along.min() < -slack or along.max() > 1 + slack or (np.diff(along) < 0).any():
            raise ValueError(
                f"ts must run in order from t0 = {t0} to t1 = {t1}; got {np.asarray(ts)}. "
                "For the reverse direction swap t0 and t1 and reverse ts."
            )
    return jnp.clip(ts, min(t0, t1), max(t0, t1))


def evaluations(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController
) -> tuple[int, int]:
    """Calls of the vector field in one step, and before the first."""
    adaptive = not isinstance(controller, diffrax.StepTo)
    if isinstance(controller, diffrax.ConstantStepSize):
        raise ValueError("A constant step is asked for by num_steps; got ConstantStepSize.")
    if adaptive and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} has no error estimate and can't choose its own steps. "
            "Give num_steps, or an adaptive solver such as diffrax.Tsit5()."
        )
    if isinstance(controller, diffrax.ClipStepSizeController) and controller.jump_ts is not None:
        raise ValueError(
            "jump_ts make the count of evaluations depend on the steps; got a controller with "
            "jump_ts. Use step_ts, or integrate from jump to jump."
        )
    if isinstance(solver, diffrax.Euler):
        return 1, 0
    tableau = getattr(solver, "tableau", None)
    if not isinstance(solver, diffrax.AbstractERK) or not isinstance(
        tableau, diffrax.ButcherTableau
    ):
        raise ValueError(
            "The evaluations are known of Euler and of explicit Runge-Kutta methods; got "
            f"{type(solver).__name__}. diffrax.Tsit5() serves nearly every flow."
        )
    return tableau.num_stages - int(tableau.fsal), int(tableau.fsal)


def _raise_on_failure(
    y: Any, result: diffrax.RESULTS, reached: jax.Array, t0: float, t1: float, max_steps: int
) -> Any:
    """`y`, or at run time an error that says to a hundredth of the interval where it stopped."""
    ran_out = result == diffrax.RESULTS.max_steps_reached
    failed = result != diffrax.RESULTS.successful
    messages = [f"The solve stopped {failure}" for failure in failures(t0, t1, max_steps)]
    return eqx.branched_error_if(y, failed, failure_index(reached, ran_out, t0, t1), messages)


def failures(t0: float, t1: float, max_steps: int) -> list[str]:
    """What can be said of a solve that stopped: when, to a hundredth of the interval, and why."""
    times = [round(t0 + (t1 - t0) * i / 100, 6) for i in range(101)]
    where = [f"between t = {a} and t = {b}" for a, b in zip(times[:-1], times[1:], strict=True)]
    not_finite = (
        "the state or the velocity is not finite there, or the step shrank to nothing. Check the "
        "velocity at that time; a path that is singular at an end point wants t0 or t1 moved "
        "inwards, or sigma_min > 0."
    )
    too_many = (
        f"max_steps = {max_steps} were taken. Raise max_steps or loosen the tolerance; `sample` "
        "and `log_prob` also take num_steps."
    )
    return [f"{w}: {why}" for why in (not_finite, too_many) for w in where]


def failure_index(reached: jax.Array, ran_out: jax.Array, t0: float, t1: float) -> jax.Array:
    """Which of the `failures` it was."""
    hundredth = jnp.clip(100 * (reached - t0) / (t1 - t0), 0, 99).astype(jnp.int32)
    return hundredth + jnp.where(ran_out, 100, 0)


class StopWhenStalled(diffrax.AbstractStepSizeController):
    """Delegates every decision to `controller`, and fails the solve where it can't go on."""

    controller: diffrax.AbstractStepSizeController

    def wrap(self, direction: Any) -> "StopWhenStalled":
        return StopWhenStalled(self.controller.wrap(direction))

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.controller.init(*args, **kwargs)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves = jax.tree.leaves((y1_candidate, y_error))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        y1_candidate = jax.tree.map(lambda y1, y0: jnp.where(finite, y1, y0), y1_candidate, y0)
        y_error = jax.tree.map(lambda error: jnp.where(finite, error, jnp.inf), y_error)
        kept, next_t0, next_t1, made_jump, state, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, state
        )
        advances = next_t1 > next_t0 + 8 * jnp.finfo(jnp.result_type(next_t0)).eps
        ok = jnp.where(kept, finite, advances)
        result = diffrax.RESULTS.where(ok, result, diffrax.RESULTS.dt_min_reached)
        return kept, next_t0, next_t1, made_jump, state, result
