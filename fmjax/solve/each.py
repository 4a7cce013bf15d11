"""Adaptive solves in which every example has its own step sizes.

In `sample` and `log_prob` a batch shares one adaptive step, its error measured over the whole
batch: an example's result depends on its batch-mates, and one hard example makes all take its small
steps. Here each example is solved as if it were alone, to the same tolerance, and its result does
not depend, beyond rounding, on batch-mates, on their order, on `num_lanes` or on how many devices
share the batch. (A rounding of the error estimate moves the step sizes too, so that in float32 two
such results may differ by about the tolerance, where in float64 they agree to ten digits.)

Under `jax.vmap` all examples would wait for the one with the most steps: with n_i evaluations of
example i the share 1 - mean(n) / max(n) is wasted. W = `num_lanes` examples are solved in parallel,
and a lane that is through takes the next example from a queue. Only at the end do lanes idle, and

    waste = 1 - sum_i n_i / (W num_calls),   at most about W max(n) / sum(n),

about half of that as a rule. Few lanes waste little; many keep the hardware busy.

The velocity is called under `jax.vmap` with one example as a batch of one, which shared weights
turn into the usual batched products and convolutions. What belongs to an example, a label or the
key of a random probe, is handed over by `PerRow`. There are no reverse-mode gradients through these
solves, whose number of turns is not known ahead: `sample` and `log_prob` have them.

On several devices each one runs its own queue on its part of the batch, without collectives; `rows`
says which examples of the whole batch they are:

    mesh = fmjax.training.sharding.make_mesh()
    split = jax.sharding.PartitionSpec("data")
    draw = lambda x0, rows: sample_each(velocity, x0, rows=rows)
    draw = jax.shard_map(draw, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    x1 = jax.jit(draw)(x0, jnp.arange(len(x0)))
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, Unpack

import diffrax
import jax
import jax.numpy as jnp

from ..sources import check_source, source_at, standard_normal_log_prob
from ..types import (
    Divergence,
    SourceLogProb,
    Velocity,
    as_batch,
    checked,
    refuse_explicit_mesh,
    wider,
)
from .call import TSIT5, check_count, interval
from .divergences import EXACT, divergence_at
from .failures import raise_if, stopped
from .lanes import Solved, solve_each
from .watch import Watched, watched


class PerRow(NamedTuple):
    """A velocity or a divergence of every example's own, made from its row.

    Attributes:
      make: `row -> Velocity` or `row -> Divergence`; `row` is the example's number, `[]`, int32.

    Example:
      >>> labels = jnp.array([3, 1, 4])
      >>> velocity = PerRow(lambda row: lambda t, x: -labels[row] * x)
      >>> x1 = sample_each(velocity, jnp.ones((3, 2)))
    """

    make: Callable[[jax.Array], Any]


class EachTrajectory(NamedTuple):
    """Solved ODEs, each with its own steps.

    Attributes:
      x: the states at `t1`, `[batch, *event]`.
      num_evaluations: evaluations of the velocity that each example needed, those of its rejected
        steps included, `[batch]`, int32.
      num_calls: calls of the velocity, each of them on all lanes in parallel, `[]`, int32.
    """

    x: jax.Array
    num_evaluations: jax.Array
    num_calls: jax.Array


class Attempts(NamedTuple):
    """Solved ODEs and failed ones.

    Attributes:
      x: the states at `t1`, `[batch, *event]`; NaN where the solve failed.
      reached: the time of the last accepted state, `[batch]`: `t1` where the solve succeeded.
      num_evaluations: as in `EachTrajectory`.
      num_calls: as in `EachTrajectory`.
    """

    x: jax.Array
    reached: jax.Array
    num_evaluations: jax.Array
    num_calls: jax.Array


class EachOptions(TypedDict, total=False):
    """The options of every solve with own steps, keyword arguments.

    Attributes:
      t0: the time of the source, 0 by default, a number or a traced `[]`.
      t1: the time of the data, 1 by default; likewise. `t1 < t0` is allowed.
      solver: `diffrax.Tsit5()` by default, or another with an error estimate.
      stepsize_controller: an adaptive controller of Diffrax; by default
        `PIDController(rtol=1e-5, atol=1e-5)`.
      max_steps: an example that needs more steps, 4096 by default, rejected ones included, fails.
      num_lanes: how many examples are solved in parallel; by default an eighth of the batch, at
        least one. Fewer waste less, more are faster per evaluation where the hardware is not full.
      rows: the index of every example, which `PerRow` is given and errors name, `[batch]`; by
        default 0, 1, 2, ...
    """

    t0: float | jax.Array
    t1: float | jax.Array
    solver: diffrax.AbstractSolver
    stepsize_controller: diffrax.AbstractStepSizeController | None
    max_steps: int
    num_lanes: int | None
    rows: jax.Array | None


def integrate_each(
    velocity: Velocity | PerRow, x0: jax.Array, **options: Unpack[EachOptions]
) -> EachTrajectory:
    """Solves dx/dt = velocity(t, x) from x(t0) = `x0` to `t1`, every example with its own steps.

    Args:
      velocity: `(t, x) -> u`, called with `t` of shape `[]` and `x` of shape `[1, *event]`; or
        `PerRow(row -> velocity)`, for one that depends on the example's label, for instance.
      x0: the state at `t0`, `[batch, *event]`. The solve runs in its dtype, in float32 at least.
      **options: `EachOptions`: t0, t1, solver, stepsize_controller, max_steps, num_lanes, rows.

    Returns:
      `EachTrajectory(x, num_evaluations, num_calls)`, `x` in the dtype of `x0`.

    Raises:
      ValueError: an empty batch; `num_lanes < 1`; `rows` of another shape; a solver without an
        error estimate or whose evaluations are not known; a fixed grid of steps; a velocity of
        another shape than x.
      RuntimeError: by the solve, if an example took `max_steps` or its state or velocity is not
        finite; it names the row and the time.

    Example:
      >>> x0 = jnp.array([[1.0, 2.0], [0.01, 0.02]])
      >>> solved = integrate_each(lambda t, x: -(x**2), x0)
      >>> solved.num_evaluations
      Array([37, 13], dtype=int32)
    """
    x0 = as_batch("x0", x0)
    solved = _solve(*_field(velocity, x0), stops=True, **options)
    return EachTrajectory(solved.y.astype(x0.dtype), solved.num_evaluations, solved.num_calls)


def attempt_each(
    velocity: Velocity | PerRow, x0: jax.Array, **options: Unpack[EachOptions]
) -> Attempts:
    """`integrate_each` that keeps what succeeds: an example that fails is NaN.

    Arguments and errors are those of `integrate_each`, but for the RuntimeError.

    Returns:
      `Attempts(x, reached, num_evaluations, num_calls)`; an example has failed where `reached` is
      not `t1`.

    Example:
      >>> attempts = attempt_each(lambda t, x: x**2, jnp.array([[0.5], [2.0]]), max_steps=100)
      >>> attempts.reached == 1  # the second one's solution ends at t = 1/2
      Array([ True, False], dtype=bool)
    """
    x0 = as_batch("x0", x0)
    solved = _solve(*_field(velocity, x0), stops=False, **options)
    x = solved.y.astype(x0.dtype)
    return Attempts(x, solved.reached, solved.num_evaluations, solved.num_calls)


def sample_each(
    velocity: Velocity | PerRow, x0: jax.Array, **options: Unpack[EachOptions]
) -> jax.Array:
    """The end points of `integrate_each`: samples x(t1) from source samples x(t0) = `x0`.

    Arguments and errors are those of `integrate_each`.

    Returns:
      `[batch, *event]`, in the dtype of `x0`.

    Example:
      >>> x1 = sample_each(lambda t, x: -x, jax.random.normal(jax.random.key(0), (16, 2)))
    """
    return integrate_each(velocity, x0, **options).x


def log_prob_each(
    velocity: Velocity | PerRow,
    x1: jax.Array,
    *,
    source_log_prob: SourceLogProb = standard_normal_log_prob,
    divergence: Divergence | PerRow = EXACT,
    **options: Unpack[EachOptions],
) -> jax.Array:
    """log p_1(x1): each example is solved from `x1` at `t1` back to the source with its own steps.

    Args:
      velocity: as for `integrate_each`.
      x1: data, `[batch, *event]`.
      source_log_prob: log-density of the source, `[batch, *event]` -> `[batch]`.
      divergence: as for `log_prob`. A Hutchinson divergence given as it is has one probe for all
        examples; `PerRow` gives each its own, which depends on its row alone.
      **options: as for `integrate_each`.

    Returns:
      `[batch]`, in nats, in at least float32; `[num_estimates, batch]` where the divergence gives
      several estimates.

    Raises:
      ValueError, RuntimeError: as `integrate_each` does.

    Example:
      >>> key = jax.random.key(0)
      >>> from fmjax import hutchinson_divergence
      >>> probes = lambda row: hutchinson_divergence(jax.random.fold_in(key, row), 2)
      >>> log_p = log_prob_each(lambda t, x: -x, jnp.zeros((5, 2)), divergence=PerRow(probes))
    """
    x1 = as_batch("x1", x1)
    check_source(source_log_prob, x1)
    dtype = wider(x1.dtype, jnp.float32)

    def field(row: jax.Array, t: jax.Array, y: tuple[jax.Array, jax.Array]) -> Any:
        of_x = checked(_of_row(velocity, row), dtype)
        u, div = divergence_at(_of_row(divergence, row), of_x, t, y[0][None])
        return u[0], div[..., 0]

    x = x1.astype(dtype)
    zero = jnp.zeros((), dtype)
    one = jax.ShapeDtypeStruct(x.shape[1:], dtype)
    _, div = jax.eval_shape(field, jnp.zeros((), jnp.int32), zero, (one, zero))
    start = (x, jnp.zeros((len(x), *div.shape), dtype))
    ends: EachOptions = {"t0": options.get("t1", 1.0), "t1": options.get("t0", 0.0)}
    x0, log_det = _solve(field, start, stops=True, **(options | ends)).y
    log_det = jnp.moveaxis(log_det, 0, -1)
    # Backwards, log_det is -int_0^1 div v dt.
    return source_at(source_log_prob, x0, log_det) + log_det


def _of_row(given: Any, row: jax.Array) -> Any:
    return given.make(row) if isinstance(given, PerRow) else given


def _field(velocity: Velocity | PerRow, x0: jax.Array) -> tuple[Any, jax.Array]:
    """The vector field of one example, and the state in the dtype of the solve."""
    dtype = wider(x0.dtype, jnp.float32)

    def field(row: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
        return checked(_of_row(velocity, row), dtype)(t, x[None])[0]

    return field, x0.astype(dtype)


def _solve(
    field: Callable[[jax.Array, jax.Array, Any], Any],
    y0: Any,
    *,
    stops: bool,
    t0: float | jax.Array = 0.0,
    t1: float | jax.Array = 1.0,
    solver: diffrax.AbstractSolver = TSIT5,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    max_steps: int = 4096,
    num_lanes: int | None = None,
    rows: jax.Array | None = None,
) -> Solved:
    """What became of every example; with `stops`, an error that names the first that failed."""
    leaf = jax.tree.leaves(y0)[0]
    refuse_explicit_mesh("x", leaf)
    start, end = interval(t0, t1, leaf.dtype)
    controller = _adaptive(solver, stepsize_controller)
    check_count("max_steps", max_steps)
    batch = len(leaf)
    rows = jnp.arange(batch, dtype=jnp.int32) if rows is None else jnp.asarray(rows, jnp.int32)
    if batch == 0 or rows.shape != (batch,):
        raise ValueError(
            "rows must number a batch that is not empty, [batch]; got "
            f"{rows.shape[0] if rows.ndim else rows.shape} rows for {batch} examples."
        )
    num_lanes = max(1, batch // 8) if num_lanes is None else num_lanes
    check_count("num_lanes", num_lanes)
    solved = solve_each(
        field,
        y0,
        rows,
        t0=start,
        t1=end,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        num_lanes=min(num_lanes, batch),
        stops=stops,
    )
    return _raise_on_failure(solved, rows, max_steps) if stops else solved


def _adaptive(
    solver: diffrax.AbstractSolver, controller: diffrax.AbstractStepSizeController | None
) -> Watched:
    """The controller, refused where it does not choose steps."""
    found = watched(solver, controller)
    if isinstance(found.controller, diffrax.StepTo | diffrax.ConstantStepSize):
        raise ValueError(
            "Step sizes of each example's own need an adaptive controller; got "
            f"{type(found.controller).__name__}. On a fixed grid all examples cost the same: use "
            "integrate, sample or log_prob."
        )
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"{type(solver).__name__} has no error estimate and can't choose its own steps. Take "
            "an adaptive solver such as diffrax.Tsit5(), or integrate, sample or log_prob with "
            "num_steps."
        )
    return found


def _raise_on_failure(solved: Solved, rows: jax.Array, max_steps: int) -> Solved:
    """`solved`, or at run time an error that names the first failed row and its time."""

    def message(row: int, reached: float, ran_out: bool) -> str:
        return stopped(max_steps, reached, ran_out).replace("solve", f"solve of row {row}", 1)

    first = jnp.argmax(solved.failed)
    numbers = (part[first] for part in (rows, solved.reached, solved.ran_out))
    return raise_if(solved.failed.any(), solved, message, *numbers)
