"""Adaptive solves of single examples in lanes that a queue feeds, for `lanes`.

W lanes hold one example each, with its own time, step size, solver state and controller state. A
turn of the loop makes one step in every lane. A lane whose example has arrived at t1 writes the
state back to its row and takes the next row of the queue, so that lanes idle only at the end, when
the queue is empty.

What happens in a lane is `diffrax.diffeqsolve` of that example alone: Diffrax's solver makes the
step and its controller judges it, with the same first step and the same clipping at t1.

Diffrax would evaluate the first stage of a step in all lanes as soon as one lane needs it, at its
first step. The first stages of all rows are therefore evaluated ahead of the loop, W at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ._solve import FIRST_STEP, StopWhenStalled, failure_index, failures


class _Lane(NamedTuple):
    """What a lane holds; with a leading axis, all of them. Times run forwards, also when t1 < t0.

    Attributes:
      slot: place in the batch; the batch size where the lane is idle.
      row: the example's name.
      t: time reached.
      t_next: where the next step ends.
      y: the state at t.
      solver_state: Diffrax's.
      controller_state: Diffrax's.
      num_steps: steps tried so far.
    """

    slot: jax.Array
    row: jax.Array
    t: jax.Array
    t_next: jax.Array
    y: Any
    solver_state: Any
    controller_state: Any
    num_steps: jax.Array


class _Method(NamedTuple):
    """The solve of one example: `first_stage(row, y)`, `enter(slot, row, y, f0)`, `step(lane)`."""

    first_stage: Callable[[jax.Array, Any], Any]
    enter: Callable[[jax.Array, jax.Array, Any, Any], _Lane]
    step: Callable[[_Lane], tuple[_Lane, jax.Array]]
    end: jax.Array


class _Loop(NamedTuple):
    """The loop's carry.

    Attributes:
      lanes: `[num_lanes, ...]`.
      y: `[batch, ...]`: start states of the rows that wait, end states of those that are through.
      num_steps: `[batch]`.
      next_slot: the head of the queue.
      num_turns: turns made.
      failed: `[num_lanes]`.
    """

    lanes: _Lane
    y: Any
    num_steps: jax.Array
    next_slot: jax.Array
    num_turns: jax.Array
    failed: jax.Array


def solve_each(
    vector_field: Callable[[jax.Array, jax.Array, Any], Any],
    y0: Any,
    rows: jax.Array,
    *,
    t0: float,
    t1: float,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    num_lanes: int,
    reuses_last_stage: bool,
) -> tuple[Any, jax.Array, jax.Array]:
    """y at `t1`, steps of every example `[batch]`, turns `[]`, for `vector_field(row, t, y)`.

    `y0` is a pytree of `[batch, ...]`; the vector field sees one example, without the batch axis.
    """
    method = _method(vector_field, solver, stepsize_controller, y0, t0, t1, reuses_last_stage)
    batch = rows.shape[0]
    first_stages = None
    if reuses_last_stage:
        first_stages = _in_turns(method.first_stage, rows, y0, num_lanes)

    def enter(slot: jax.Array, y: Any) -> _Lane:
        at = jnp.minimum(slot, batch - 1)
        return jax.vmap(method.enter)(slot, *_rows_at(at, (rows, y, first_stages)))

    def goes_on(loop: _Loop) -> jax.Array:
        return (loop.lanes.slot < batch).any() & ~loop.failed.any()

    def turn(loop: _Loop) -> _Loop:
        active = loop.lanes.slot < batch
        moved, ok = jax.vmap(method.step)(loop.lanes)
        lanes = _where(active, moved, loop.lanes)
        arrived = active & (lanes.t >= method.end)
        ran_out = (lanes.num_steps >= max_steps) & ~arrived
        failed = active & (~ok | ran_out)

        # A slot beyond the batch is dropped.
        to = jnp.where(arrived, lanes.slot, batch)
        y, num_steps = jax.tree.map(
            lambda whole, part: whole.at[to].set(part, mode="drop"),
            (loop.y, loop.num_steps),
            (lanes.y, lanes.num_steps),
        )
        slot = jnp.minimum(loop.next_slot + jnp.cumsum(arrived, dtype=jnp.int32) - 1, batch)
        lanes = _where(arrived & (slot < batch), enter(slot, y), lanes)
        lanes = lanes._replace(slot=jnp.where(arrived, slot, lanes.slot))
        next_slot = loop.next_slot + arrived.sum(dtype=jnp.int32)
        return _Loop(lanes, y, num_steps, next_slot, loop.num_turns + 1, failed)

    none = jnp.zeros((), jnp.int32)
    loop = _Loop(
        lanes=enter(jnp.arange(num_lanes, dtype=jnp.int32), y0),
        y=y0,
        num_steps=jnp.zeros(batch, jnp.int32),
        next_slot=none + num_lanes,
        num_turns=none,
        failed=jnp.zeros(num_lanes, bool),
    )
    loop = jax.lax.while_loop(goes_on, turn, loop)
    return _raise_on_failure(loop, t0, t1, max_steps), loop.num_steps, loop.num_turns


def _method(
    vector_field: Callable[[jax.Array, jax.Array, Any], Any],
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    y0: Any,
    t0: float,
    t1: float,
    reuses_last_stage: bool,
) -> _Method:
    dtype = jax.tree.leaves(y0)[0].dtype
    direction = 1.0 if t0 < t1 else -1.0
    start, end = jnp.asarray(direction * t0, dtype), jnp.asarray(direction * t1, dtype)
    almost_end = np.asarray(direction * t1, dtype)
    for _ in range(100):
        almost_end = np.nextafter(almost_end, -np.inf, dtype=dtype)
    first_step = jnp.asarray(direction * FIRST_STEP * (t1 - t0), dtype)
    controller = StopWhenStalled(controller).wrap(jnp.asarray(direction, dtype))

    def term(row: jax.Array) -> diffrax.ODETerm:
        def field(t: Any, y: Any, args: Any) -> Any:
            return jax.tree.map(lambda u: direction * u, vector_field(row, direction * t, y))

        return diffrax.ODETerm(field)

    def first_stage(row: jax.Array, y: Any) -> Any:
        return solver.func(term(row), start, y, None)

    def enter(slot: jax.Array, row: jax.Array, y: Any, f0: Any) -> _Lane:
        own = term(row)
        order = solver.error_order(own)
        t_next, controller_state = controller.init(
            own, start, end, y, first_step, None, solver.func, order
        )
        t_next = jnp.minimum(t_next, end)
        solver_state = solver.init(own, start, t_next, y, None)
        if reuses_last_stage:
            # Diffrax's state of these methods: whether the first stage is missing, and its value.
            _, missing = solver_state
            f0 = jax.tree.map(lambda _, f: f, missing, f0)
            solver_state = (jnp.zeros((), bool), f0)
        none = jnp.zeros((), jnp.int32)
        return _Lane(slot, row, start, t_next, y, solver_state, controller_state, none)

    def step(lane: _Lane) -> tuple[_Lane, jax.Array]:
        own = term(lane.row)
        y, error, _, solver_state, _ = solver.step(
            own, lane.t, lane.t_next, lane.y, None, lane.solver_state, False
        )
        kept, t, t_next, _, controller_state, result = controller.adapt_step_size(
            lane.t, lane.t_next, lane.y, y, None, error, solver.error_order(own),
            lane.controller_state,
        )  # fmt: skip
        y, solver_state = jax.tree.map(
            lambda new, old: jnp.where(kept, new, old),
            (y, solver_state),
            (lane.y, lane.solver_state),
        )
        t = jnp.minimum(t, end)
        # As Diffrax does, so that no step of a few roundings is left over before the end.
        to_end = jnp.where(kept, end, t + 0.5 * (end - t))
        t_next = jnp.where(t_next > almost_end, to_end, t_next)
        moved = lane._replace(
            t=t,
            t_next=t_next,
            y=y,
            solver_state=solver_state,
            controller_state=controller_state,
            num_steps=lane.num_steps + 1,
        )
        return moved, result == diffrax.RESULTS.successful

    return _Method(first_stage, enter, step, end)


def _in_turns(function: Callable[..., Any], rows: jax.Array, y: Any, num_lanes: int) -> Any:
    """`function(row, y)` of all rows, `num_lanes` at a time; the last turn repeats the last row."""
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


class _Failures(Sequence[str]):
    """The message of failure f of row r at r * len(failures) + f, made when it is read."""

    def __init__(self, failures: list[str]):
        self.failures = failures

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: Any) -> Any:
        row, which = divmod(index, len(self.failures))
        return f"The solve of row {row} stopped {self.failures[which]}"


def _raise_on_failure(loop: _Loop, t0: float, t1: float, max_steps: int) -> Any:
    """The end states, or at run time an error that names the row and the time."""
    messages = _Failures(failures(t0, t1, max_steps))
    lane = jnp.argmin(jnp.where(loop.failed, loop.lanes.row, jnp.iinfo(jnp.int32).max))
    reached = loop.lanes.t[lane] * (1.0 if t0 < t1 else -1.0)
    ran_out = loop.lanes.num_steps[lane] >= max_steps
    which = failure_index(reached, ran_out, t0, t1)
    index = loop.lanes.row[lane] * len(messages.failures) + which
    return eqx.branched_error_if(loop.y, loop.failed.any(), index, messages)
