"""The step-size controller of every solve: it counts, weighs the errors, and stops what stalls.

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

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..types import is_concrete, kind

_TOLERANCE = 1e-5


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


def alike(y: Any) -> Any:
    """The parts of a state repeated to about one size: a mean over all weighs them alike."""
    largest = max((leaf.size for leaf in jax.tree.leaves(y)), default=0)

    def repeat(leaf: jax.Array) -> jax.Array:
        times = round(largest / max(leaf.size, 1))
        return jnp.broadcast_to(leaf, (max(times, 1), *leaf.shape))

    return jax.tree.map(repeat, y)


def check_object(name: str, value: Any, of: type, example: str) -> None:
    """Refuses what is none of Diffrax's objects: a name, or a class that was not called."""
    if not isinstance(value, of):
        fix = f"such as {example}"
        if isinstance(value, type) and issubclass(value, of):
            fix = f"write {value.__name__}()"
        raise ValueError(f"{name} must be an object of Diffrax's; got {kind(value)}: {fix}.")
