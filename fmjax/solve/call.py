"""The one call of `diffrax.diffeqsolve`, its options, and the checks before it."""

import functools
import operator
from collections.abc import Callable
from typing import Any, TypedDict

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..types import as_array, is_concrete, kind
from .failures import raise_if, stopped
from .watch import check_object, watched

FIRST_STEP = 0.1  # of the interval
TSIT5, CHECKPOINTS = diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint()


class SolveOptions(TypedDict, total=False):
    """The options of every solve, keyword arguments; solvers and their kin are Diffrax's objects.

    Attributes:
      t0: the time of the source, 0 by default; a number or a traced `[]`, in which the solve is
        differentiable.
      t1: the time of the data, 1 by default; likewise. `t1 < t0` is allowed.
      solver: `diffrax.Tsit5()` by default; `Euler()` or any other explicit Runge-Kutta method.
      stepsize_controller: an adaptive controller, `PIDController(rtol=1e-5, atol=1e-5)` by default,
        or `StepTo` for a grid of one's own.
      num_steps: that many equal steps; excludes `stepsize_controller`.
      max_steps: an adaptive solve that needs more steps, 4096 by default, rejected ones included,
        fails.
      adjoint: how gradients are taken, `diffrax.RecursiveCheckpointAdjoint()` by default,
        `DirectAdjoint()` for forward mode, for example.
    """

    t0: float | jax.Array
    t1: float | jax.Array
    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController | None
    num_steps: int | None
    max_steps: int
    adjoint: diffrax.AbstractAdjoint


def backwards(options: SolveOptions) -> SolveOptions:
    """The options of the same solve from the data to the source."""
    return {**options, "t0": options.get("t1", 1.0), "t1": options.get("t0", 0.0)}


def solve(
    vector_field: Callable[[Any, Any], Any],
    y0: Any,
    *,
    ts: jax.Array | None = None,
    t0: Any = 0.0,
    t1: Any = 1.0,
    solver: diffrax.AbstractSolver = TSIT5,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    num_steps: int | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint = CHECKPOINTS,
) -> tuple[jax.Array, Any, jax.Array]:
    """`integrate` for any pytree `y0` of arrays of one floating dtype: (t, y, num_evaluations)."""
    dtype = jax.tree.leaves(y0)[0].dtype
    t0, t1 = interval(t0, t1, dtype)
    check_object("adjoint", adjoint, diffrax.AbstractAdjoint, "diffrax.DirectAdjoint()")
    check_count("max_steps", max_steps)
    if ts is not None:
        ts = _check_ts(ts, t0, t1, dtype)
    if num_steps is not None:
        _check_num_steps(num_steps, stepsize_controller)
        # A grid, rather than a step size, makes it `num_steps` steps whatever the rounding.
        linspace = np.linspace if is_concrete(t0, t1) else jnp.linspace
        stepsize_controller = diffrax.StepTo(linspace(t0, t1, num_steps + 1, dtype=dtype))
        max_steps = num_steps
    if isinstance(stepsize_controller, diffrax.ConstantStepSize):
        raise ValueError("Equal steps are asked for by num_steps; got ConstantStepSize.")
    controller = watched(solver, stepsize_controller)
    on_a_grid = isinstance(controller.controller, diffrax.StepTo)
    if not on_a_grid and not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} has no error estimate and can't choose its own steps. "
            "Give num_steps, or an adaptive solver such as diffrax.Tsit5()."
        )
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: vector_field(t, y)),
        solver,
        # A Python float would make a float64 solve under x64.
        t0=jnp.asarray(t0, dtype),
        t1=jnp.asarray(t1, dtype),
        dt0=None if on_a_grid else jnp.asarray(FIRST_STEP * (t1 - t0), dtype),
        y0=y0,
        saveat=diffrax.SaveAt(t1=ts is None, ts=ts, controller_state=True),
        stepsize_controller=controller,
        max_steps=max_steps,
        adjoint=adjoint,
        throw=False,
    )
    watch: Any = jax.lax.stop_gradient(solution.controller_state)
    direction = jnp.where(t0 < t1, 1, -1).astype(dtype)  # Diffrax's time runs forwards
    reached = direction * jnp.minimum(watch.reached, direction * t1)
    ran_out = solution.result == diffrax.RESULTS.max_steps_reached
    failed = (solution.result != diffrax.RESULTS.successful) | (reached != t1)
    y = raise_if(failed, solution.ys, functools.partial(stopped, max_steps), reached, ran_out)
    return solution.ts, y, watch.num_evaluations  # pyright: ignore[reportReturnType]


def interval(t0: Any, t1: Any, dtype: Any) -> tuple[Any, Any]:
    """t0 and t1 in the dtype of the solve: NumPy's numbers where they are known, else traced."""
    ends = [_end(name, t, dtype) for name, t in (("t0", t0), ("t1", t1))]
    if is_concrete(*ends):
        if not np.isfinite(ends).all():
            raise ValueError(f"t0 and t1 must be finite; got {ends[0]} and {ends[1]}.")
        if ends[0] == ends[1]:
            raise ValueError(
                f"t0 and t1 must differ, in {np.dtype(dtype)} too; got {t0} and {t1}. A flow runs "
                "from 0 to 1."
            )
    return ends[0], ends[1]


def _end(name: str, t: Any, dtype: Any) -> Any:
    array = t if isinstance(t, Tracer) else np.asarray(t)
    number = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape != () or not number:
        raise ValueError(
            f"{name} must be a single real number; got {kind(t)}. For one per example, jax.vmap "
            "over it."
        )
    return array.astype(dtype)


def check_count(name: str, count: Any) -> None:
    """Refuses what is no whole number from 1 on."""
    try:
        good = operator.index(count) >= 1
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} must be at least 1, a whole number; got {kind(count)}.")


def _check_num_steps(
    num_steps: int, stepsize_controller: diffrax.AbstractStepSizeController | None
) -> None:
    check_count("num_steps", num_steps)
    if stepsize_controller is not None:
        raise ValueError(
            "num_steps means equal steps and excludes stepsize_controller; got "
            f"num_steps={num_steps} and {kind(stepsize_controller)}. Give one of the two."
        )


def _check_ts(ts: Any, t0: Any, t1: Any, dtype: Any) -> jax.Array:
    """Refuses times that are no ordered vector between t0 and t1, as far as they are concrete."""
    given, ts = ts, as_array("ts", ts)
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(f"ts must be a vector [num_times], not empty; got the shape {ts.shape}.")
    if is_concrete(given, t0, t1):
        along = (np.asarray(given, np.float64) - t0) / (np.float64(t1) - t0)
        slack = 1e-6  # a float32 grid need not end exactly on t1
        inside = along.min() >= -slack and along.max() <= 1 + slack
        if not (inside and (np.diff(along) >= 0).all()):
            raise ValueError(
                f"ts must run in order from t0 = {t0} to t1 = {t1}; got {np.asarray(given)}. "
                "For the reverse direction swap t0 and t1 and reverse ts."
            )
    ts, low, high = ts.astype(dtype), jnp.minimum(t0, t1), jnp.maximum(t0, t1)
    # Not jnp.clip, which halves the gradient of a time on an end.
    return jnp.where(ts < low, low, jnp.where(ts > high, high, ts))
