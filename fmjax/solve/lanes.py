"""Adaptive solves of single examples in lanes that a queue feeds, for `each`.

W lanes hold one example each, with its own time, step size, solver state and controller state. A
turn of the loop makes one step in every lane. A lane whose example has arrived at t1 writes the
state back to its row and takes the next row of the queue, so that lanes idle only at the end, when
the queue is empty.

What happens in a lane is `diffrax.diffeqsolve` of that example alone: Diffrax's solver makes the
step and its controller judges it, with the same first step and the same clipping at t1.

Diffrax would evaluate the first stage of a step in all lanes as soon as one lane needs it, at its
first step. The first stages of all rows are therefore evaluated ahead of the loop, W in parallel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from .call import FIRST_STEP
from .watch import Watched


class _Lane(NamedTuple):
    """What a lane holds; with a leading axis, all of them. Times run forwards, also when t1 < t0.

    Attributes:
      slot: index in the batch; the batch size where the lane is idle.
      row: the example's name.
      t: time reached.
      t_next: where the next step ends.
      y: the state at t.
      solver_state: Diffrax's.
      watch: the state of `watch.Watched`.
      num_steps: steps tried so far.
    """

    slot: jax.Array
    row: jax.Array
    t: jax.Array
    t_next: jax.Array
    y: Any
    solver_state: Any
    watch: Any
    num_steps: jax.Array


class _Method(NamedTuple):
    """The solve of one example: `first_stage(row, y)`, `enter(slot, row, y, f0)`, `step(lane)`."""

    first_stage: Callable[[jax.Array, Any], Any]
    enter: Callable[[jax.Array, jax.Array, Any, Any], _Lane]
    step: Callable[[_Lane], tuple[_Lane, jax.Array]]
    direction: jax.Array
    end: jax.Array


class Solved(NamedTuple):
    """What became of every example.

    Attributes:
      y: `[batch, ...]`: start states of the rows that wait, end states of those that are through,
        NaN for those that failed.
      reached: the time of each one's last accepted state, `[batch]`.
      failed: `[batch]`.
      ran_out: whether it failed for want of steps, `[batch]`.
      num_evaluations: of each one, `[batch]`, int32.
      num_calls: calls of the vector field, each of them on all lanes in parallel, `[]`, int32.
    """

    y: Any
    reached: jax.Array
    failed: jax.Array
    ran_out: jax.Array
    num_evaluations: jax.Array
    num_calls: jax.Array


class _Loop(NamedTuple):
    """The loop's carry.

    Attributes:
      lanes: `[num_lanes, ...]`.
      solved: of the batch.
      next_slot: the head of the queue.
    """

    lanes: _Lane
    solved: Solved
    next_slot: jax.Array


def solve_each(
    vector_field: Callable[[jax.Array, jax.Array, Any], Any],
    y0: Any,
    rows: jax.Array,
    *,
    t0: Any,
    t1: Any,
    solver: diffrax.AbstractSolver,
    controller: Watched,
    max_steps: int,
    num_lanes: int,
    stops: bool,
) -> Solved:
    """y at `t1` and the cost, for `vector_field(row, t, y)`.

    `y0` is a pytree of `[batch, ...]`; the vector field sees one example, without the batch axis.
    With `stops` the first failure ends the loop, else the lane takes the next example.
    """
    batch, reuses_last = rows.shape[0], int(controller.reuses_last)
    method = _method(vector_field, solver, controller, y0, t0, t1)
    first_stages = None
    if reuses_last:
        first_stages = _in_turns(method.first_stage, rows, y0, num_lanes)

    def enter(slot: jax.Array, y: Any) -> _Lane:
        at = jnp.minimum(slot, batch - 1)
        return jax.vmap(method.enter)(slot, *_rows_at(at, (rows, y, first_stages)))

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.lanes.slot < batch).any() & ~(loop.solved.failed.any() & stops)

    def turn(loop: _Loop) -> _Loop:
        active = loop.lanes.slot < batch
        # Diffrax evaluates the first stage in all lanes where one lane is due to.
        due = loop.lanes.watch.first_stage_due.any()
        num_calls = loop.solved.num_calls + controller.per_step - jnp.where(due, 0, reuses_last)
        moved, ok = jax.vmap(method.step)(loop.lanes)
        lanes = _where(active, moved, loop.lanes)
        arrived = active & (lanes.t >= method.end)
        ran_out = (lanes.num_steps >= max_steps) & ~arrived
        failed = active & (~ok | ran_out)
        y = jax.tree.map(
            lambda leaf: jax.vmap(lambda bad, row: jnp.where(bad, jnp.nan, row))(failed, leaf),
            lanes.y,
        )
        # A slot beyond the batch is dropped.
        through = arrived | failed
        to = jnp.where(through, lanes.slot, batch)
        part = (y, method.direction * lanes.t, failed, ran_out, lanes.watch.num_evaluations)
        whole = jax.tree.map(
            lambda whole, part: whole.at[to].set(part, mode="drop"), loop.solved[:-1], part
        )
        slot = jnp.minimum(loop.next_slot + jnp.cumsum(through, dtype=jnp.int32) - 1, batch)
        lanes = _where(through & (slot < batch), enter(slot, whole[0]), lanes)
        lanes = lanes._replace(slot=jnp.where(through, slot, lanes.slot))
        next_slot = loop.next_slot + through.sum(dtype=jnp.int32)
        return _Loop(lanes, Solved(*whole, num_calls=num_calls), next_slot)

    no, none = jnp.zeros(batch, bool), jnp.zeros(batch, jnp.int32)
    reached = jnp.full(batch, t0, jax.tree.leaves(y0)[0].dtype)
    num_calls = jnp.asarray(reuses_last * -(-batch // num_lanes), jnp.int32)
    loop = _Loop(
        lanes=enter(jnp.arange(num_lanes, dtype=jnp.int32), y0),
        solved=Solved(y0, reached, no, no, none, num_calls),
        next_slot=jnp.asarray(num_lanes, jnp.int32),
    )
    return jax.lax.while_loop(goes_on, turn, loop).solved


def _method(
    vector_field: Callable[[jax.Array, jax.Array, Any], Any],
    solver: diffrax.AbstractSolver,
    controller: Watched,
    y0: Any,
    t0: Any,
    t1: Any,
) -> _Method:
    dtype, reuses_last = jax.tree.leaves(y0)[0].dtype, controller.reuses_last
    direction = jnp.where(t0 < t1, 1, -1).astype(dtype)
    start, end = direction * t0, direction * t1
    # As Diffrax does, so that no step of a few roundings is left over before the end.
    almost_end = jax.lax.stop_gradient(end)
    almost_end = jax.lax.fori_loop(0, 100, lambda _, t: jnp.nextafter(t, -jnp.inf), almost_end)
    controller = controller.wrap(direction)

    def term(row: jax.Array) -> diffrax.ODETerm:
        def field(t: Any, y: Any, args: Any) -> Any:
            return jax.tree.map(lambda u: direction * u, vector_field(row, direction * t, y))

        return diffrax.ODETerm(field)

    def first_stage(row: jax.Array, y: Any) -> Any:
        return solver.func(term(row), start, y, None)

    def enter(slot: jax.Array, row: jax.Array, y: Any, f0: Any) -> _Lane:
        own = term(row)
        order = solver.error_order(own)
        t_next, watch = controller.init(
            own, start, end, y, FIRST_STEP * (end - start), None, solver.func, order
        )
        t_next = jnp.minimum(t_next, end)
        solver_state = solver.init(own, start, t_next, y, None)
        if reuses_last:
            # Diffrax's state of these methods: whether the first stage is missing, and its value.
            _, missing = solver_state
            f0 = jax.tree.map(lambda _, f: f, missing, f0)
            solver_state = (jnp.zeros((), bool), f0)
        num_evaluations = watch.num_evaluations + int(reuses_last)
        due = jnp.asarray(not reuses_last)
        watch = watch._replace(num_evaluations=num_evaluations, first_stage_due=due)
        return _Lane(slot, row, start, t_next, y, solver_state, watch, jnp.zeros((), jnp.int32))

    def step(lane: _Lane) -> tuple[_Lane, jax.Array]:
        own, due = term(lane.row), lane.watch.first_stage_due & reuses_last
        y, error, _, solver_state, _ = solver.step(
            own, lane.t, lane.t_next, lane.y, None, lane.solver_state, due
        )
        kept, t, t_next, _, watch, result = controller.adapt_step_size(
            lane.t, lane.t_next, lane.y, y, None, error, solver.error_order(own), lane.watch
        )
        y, solver_state = jax.tree.map(
            lambda new, old: jnp.where(kept, new, old),
            (y, solver_state),
            (lane.y, lane.solver_state),
        )
        t = jnp.minimum(t, end)
        to_end = jnp.where(kept, end, t + 0.5 * (end - t))
        t_next = jnp.where(t_next > almost_end, to_end, t_next)
        moved = _Lane(lane.slot, lane.row, t, t_next, y, solver_state, watch, lane.num_steps + 1)
        return moved, result == diffrax.RESULTS.successful

    return _Method(first_stage, enter, step, direction, end)


def _in_turns(function: Callable[..., Any], rows: jax.Array, y: Any, num_lanes: int) -> Any:
    """`function(row, y)` of all rows, `num_lanes` in parallel; the last turn repeats a row."""
    batch = rows.shape[0]
    num_turns = -(-batch // num_lanes)
    slots = jnp.minimum(jnp.arange(num_turns * num_lanes), batch - 1).reshape(num_turns, num_lanes)
    value = jax.lax.map(lambda at: jax.vmap(function)(*_rows_at(at, (rows, y))), slots)
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:])[:batch], value)


def _rows_at(slots: jax.Array, tree: Any) -> Any:
    return jax.tree.map(lambda whole: whole[slots], tree)


def _where(chosen: jax.Array, new: _Lane, old: _Lane) -> _Lane:
    """Lane by lane."""
    return jax.vmap(lambda c, n, o: jax.tree.map(lambda a, b: jnp.where(c, a, b), n, o))(
        chosen, new, old
    )
