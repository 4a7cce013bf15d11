"""One solve with Diffrax, for `sampling` and `likelihood`: checks, the count, failures.

How many evaluations a step makes follows from its method: with s stages it makes s calls, or s - 1
where the first stage is the last of the step before (FSAL: Tsit5, Dopri5). That first stage is
evaluated all the same in every attempt at the first step, and at the first step after a jump; a
rejected step costs what an accepted one does. So the calls are counted attempt by attempt. The
first adaptive step that is tried is a tenth of the interval: choosing it costs nothing, and a
smaller one as a rule costs a step more.

On its own Diffrax carries a state of NaNs to the end of a fixed grid; and an adaptive step into an
infinite velocity makes the next step NaN, so that the solve stands still until `max_steps` are
spent. Here a step that is not finite counts as one of infinite error, to be tried again shorter,
and the solve stops with `dt_min_reached` as soon as an accepted state is not finite, or a rejected
step would be followed by one too short for time to advance where it is.

An error is measured by the root mean square over all numbers of the state, in which one log
determinant among D coordinates would count for little. Here every part of the state counts alike.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..types import as_array, is_concrete, kind

_TOLERANCE = 1e-5
FIRST_STEP = 0.1  # of the interval


def solve(
    vector_field: Callable[[Any, Any], Any],
    y0: Any,
    *,
    t0: Any,
    t1: Any,
    ts: jax.Array | None,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    num_steps: int | None,
    max_steps: int,
    adjoint: diffrax.AbstractAdjoint,
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


def check_object(name: str, value: Any, of: type, example: str) -> None:
    """Refuses what is none of Diffrax's objects: a name, or a class that was not called."""
    if not isinstance(value, of):
        fix = f"such as {example}"
        if isinstance(value, type) and issubclass(value, of):
            fix = f"write {value.__name__}()"
        raise ValueError(f"{name} must be an object of Diffrax's; got {kind(value)}: {fix}.")


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
    # Not jnp.clip, which halves the gradient of a time that lies on an end.
    return jnp.where(ts < low, low, jnp.where(ts > high, high, ts))


def watched(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController | None
) -> "Watched":
    """The controller that counts and stops, around the one given or the default.

    Raises:
      ValueError: if either is none of Diffrax's objects, a bound of the controller is NaN, or the
        evaluations of the solver are not known.
    """
    check_object("solver", solver, diffrax.AbstractSolver, "diffrax.Tsit5()")
    if controller is None:
        controller = diffrax.PIDController(rtol=_TOLERANCE, atol=_TOLERANCE)
    example = "diffrax.PIDController(rtol=1e-5, atol=1e-5)"
    check_object("stepsize_controller", controller, diffrax.AbstractStepSizeController, example)
    bounds = [
        x for x in jax.tree.leaves(controller) if isinstance(x, float | np.ndarray | jax.Array)
    ]
    if any(is_concrete(x) and np.isnan(x).any() for x in bounds):
        raise ValueError(f"stepsize_controller must have no NaN; got {controller}.")
    per_step, reuses_last = _evaluations(solver)
    return Watched(controller, per_step, reuses_last)


def _evaluations(solver: diffrax.AbstractSolver) -> tuple[int, bool]:
    """Calls of the vector field in one step, and whether a step after the first makes one less."""
    wraps = isinstance(solver, diffrax.AbstractWrappedSolver)
    if isinstance(solver, diffrax.Euler) and not wraps:
        return 1, False
    tableau = getattr(solver, "tableau", None)
    explicit = isinstance(solver, diffrax.AbstractERK)
    if wraps or not explicit or not isinstance(tableau, diffrax.ButcherTableau):
        raise ValueError(
            "solver must be Euler or an explicit Runge-Kutta method, whose evaluations are known; "
            f"got {type(solver).__name__}. diffrax.Tsit5() serves nearly every flow."
        )
    return tableau.num_stages, tableau.fsal


class Watch(NamedTuple):
    """The state of a `Watched` controller.

    Attributes:
      inner: the state of the controller that decides.
      num_evaluations: calls of the vector field so far, `[]`, int32.
      first_stage_due: whether the next step evaluates its first stage, `[]`.
      reached: the time of the last accepted state; times run forwards, as Diffrax turns them.
    """

    inner: Any
    num_evaluations: jax.Array
    first_stage_due: jax.Array
    reached: Any


class Watched(diffrax.AbstractStepSizeController):
    """Delegates every decision to `controller`, counts, and fails the solve where it can't go on.

    Attributes:
      controller: decides.
      per_step: stages of the method.
      reuses_last: whether its first stage is the last of the step before.
    """

    controller: diffrax.AbstractStepSizeController
    per_step: int = eqx.field(static=True)
    reuses_last: bool = eqx.field(static=True)

    def wrap(self, direction: Any) -> "Watched":
        return Watched(self.controller.wrap(direction), self.per_step, self.reuses_last)

    def init(self, terms: Any, t0: Any, *args: Any, **kwargs: Any) -> Any:
        t1, inner = self.controller.init(terms, t0, *args, **kwargs)
        return t1, Watch(inner, jnp.zeros((), jnp.int32), jnp.ones((), bool), t0)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, state):  # pyright: ignore[reportIncompatibleMethodOverride]
        leaves = jax.tree.leaves((y1_candidate, y_error))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        y1_candidate = jax.tree.map(lambda y1, y0: jnp.where(finite, y1, y0), y1_candidate, y0)
        y_error = jax.tree.map(lambda error: jnp.where(finite, error, jnp.inf), y_error)
        kept, next_t0, next_t1, made_jump, inner, result = self.controller.adapt_step_size(
            t0, t1, alike(y0), alike(y1_candidate), args, alike(y_error), error_order, state.inner
        )
        advances = next_t1 > jnp.nextafter(jax.lax.stop_gradient(next_t0), jnp.inf)
        ok = jnp.where(kept, finite, advances)
        result = diffrax.RESULTS.where(ok, result, diffrax.RESULTS.dt_min_reached)
        skipped = jnp.where(self.reuses_last & ~state.first_stage_due, 1, 0)
        watch = Watch(
            inner,
            state.num_evaluations + self.per_step - skipped,
            jnp.where(kept, made_jump, state.first_stage_due),
            next_t0,
        )
        return kept, next_t0, next_t1, made_jump, watch, result


def alike(y: Any) -> Any:
    """The parts of a state repeated to about one size: a mean over all weighs them alike."""
    largest = max((leaf.size for leaf in jax.tree.leaves(y)), default=0)

    def repeat(leaf: jax.Array) -> jax.Array:
        times = round(largest / max(leaf.size, 1))
        return jnp.broadcast_to(leaf, (max(times, 1), *leaf.shape))

    return jax.tree.map(repeat, y)


def stopped(max_steps: int, reached: Any, ran_out: Any) -> str:
    """What can be said of a solve that stopped at the time `reached`."""
    why = (
        f"max_steps = {max_steps} were taken. Raise max_steps or loosen the tolerance."
        if ran_out
        else "the state, the velocity or an end of the interval is not finite there, or the step "
        "shrank to nothing. Check the velocity at that time; a path that is singular at an end "
        "needs t0 or t1 moved inwards."
    )
    return f"The solve stopped at t = {reached:.6g}: {why}"


def raise_if(failed: jax.Array, y: Any, message: Callable[..., str], *numbers: jax.Array) -> Any:
    """`y`, or where `failed` holds a RuntimeError of `message(*numbers)`, at run time under jit.

    Where a platform's programs can't raise, y becomes NaN. Of a batch under `jax.vmap` the largest
    of each number is named.
    """
    failed, numbers = jax.lax.stop_gradient((failed, numbers))
    if is_concrete(failed, *numbers):
        if failed:
            raise RuntimeError(message(*(number.item() for number in numbers)))
        return y

    def fail(*numbers: Any) -> np.ndarray:
        raise RuntimeError(message(*(np.asarray(number).item() for number in numbers)))

    numbers = tuple(eqxi.unvmap_max(_where_failed(failed, number)) for number in numbers)
    failed = eqxi.unvmap_any(failed)
    raised = jax.lax.cond(
        failed,
        lambda: jax.pure_callback(fail, jax.ShapeDtypeStruct((), bool), *numbers),
        lambda: jnp.zeros((), bool),
    )
    failed |= raised  # what comes back depends on the callback, which is not left out then

    def poisoned(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.where(failed, jnp.nan if floating else leaf, leaf)

    return jax.tree.map(poisoned, y)


def _where_failed(failed: jax.Array, number: jax.Array) -> jax.Array:
    """`number`, but below all others where nothing failed."""
    if number.dtype == bool:
        return number & failed
    info = jnp.finfo if jnp.issubdtype(number.dtype, jnp.floating) else jnp.iinfo
    return jnp.where(failed, number, info(number.dtype).min)
