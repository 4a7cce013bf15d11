"""The linear assignment problem: the permutation of least cost, exact and quick.

Given a square matrix C, find the permutation pi that minimises sum_i C[pi(i), i]. Numbers f_i and
g_j, the potentials, may be taken from the rows and columns first: C[i, j] - f_i - g_j adds the same
to every permutation, so the optimum stays. An exact solver grows shortest augmenting paths, and
these are short where the potentials are close to the dual optimum. Such potentials come cheaply
from entropic optimal transport, whose plan P_ij = u_i K_ij v_j with K = exp(-C / T) has the
marginals 1 after a few of Sinkhorn's matrix-vector products; f = T log u and g = T log v. The
temperature T falls from stage to stage. On the host the potentials change the time that the solver
takes and not what it finds: float32 finds them, float64 subtracts them, and where they are so large
that subtracting them would round the costs, the solver runs without them.

Where costs are dear to compute, lower bounds will do for most of them: if the optimum for lower
bounds uses only pairs whose bound is their cost, no permutation costs less.

Source: Cuturi 2013, arXiv 1306.0895, algorithm 1 (Sinkhorn); Crouse 2016, IEEE Transactions on
Aerospace and Electronic Systems 52(4) (the augmenting paths of SciPy and Optax); Peyre and Cuturi
2019, arXiv 1803.00567, sections 3.6 and 4.1 (potentials; falling temperatures).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.buffer_callback import buffer_callback

from ..types import as_array, at_least_float32, is_concrete, refuse_explicit_mesh
from .points import power_of_two

TEMPERATURES = (0.2, 0.05, 0.0125)  # in units of `_spread`
ROUNDS = 10  # of Sinkhorn's, at each temperature
LARGEST = 64  # potentials above so many costs of the optimum would round them


def optimal_assignment(cost: jax.Array) -> jax.Array:
    """Solves the linear assignment problem.

    The permutation pi minimises sum_i cost[pi(i), i]. On a CPU SciPy solves it exactly for the
    numbers given: in float64, whatever their dtype, in a callback on the host that takes one more
    matrix `[n, n]` in float64. Elsewhere Optax solves it on the device, a sequential loop in JAX's
    default dtype: in float32 costs that differ by less than about 1e-6 of the largest finite one
    count as equal; `jax_enable_x64` makes that float64.

    Args:
      cost: `[n, n]`, floating. +infinity forbids a pair; a large number, such as 1e9, makes it the
        last choice. Numbers that JAX can't hold, as float64's without `jax_enable_x64`, are rounded
        to its float32 first.

    Returns:
      pi, the row of each column, `[n]`, int32. Which one, among several of equal cost, is open; on
      one platform equal costs give equal answers.

    Raises:
      ValueError: if the matrix isn't square, is empty or isn't floating; outside `jax.jit`, where
        the values are known, also if it holds NaN or -infinity, or if every permutation is
        forbidden.
      RuntimeError: for such values inside `jax.jit`, when the program runs, as JAX reports it.

    Example:
      >>> optimal_assignment(jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]))
      Array([1, 0, 2], dtype=int32)
    """
    cost = as_array("cost", cost)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not cost.size:
        raise ValueError(
            f"cost must be a square matrix, [n, n], not empty; got {cost.shape}. For a stack, "
            "jax.vmap."
        )
    if not jnp.issubdtype(cost.dtype, jnp.floating):
        fix = "Take its real part." if jnp.iscomplexobj(cost) else "It needs .astype(float)."
        raise ValueError(f"cost must be floating; got {cost.dtype}. {fix}")
    refuse_explicit_mesh("cost", cost)
    cost = jax.lax.stop_gradient(at_least_float32(cost))
    if is_concrete(cost) and cost.is_fully_addressable:
        _check_values(np.asarray(cost))
    return jax.lax.platform_dependent(cost, cpu=_on_host, default=_on_device)


def _check_values(cost: np.ndarray) -> None:
    """Refuses a matrix without an optimum."""
    wrong = np.argwhere(np.isnan(cost) | np.isneginf(cost))
    if len(wrong):
        i, j = wrong[0]
        raise ValueError(
            f"cost must be finite, or +infinity for a forbidden pair; got {cost[i, j]} at "
            f"[{i}, {j}], the first of {len(wrong)} such entries. A NaN often comes from the model "
            "or the data that the costs were computed from."
        )
    forbidden = np.isinf(cost)
    if forbidden.any():
        least = int(forbidden[scipy_assignment(forbidden.astype(np.float64))].sum())
        if least:
            raise ValueError(
                "cost must leave a permutation without +infinity, a forbidden pair; got one of "
                f"which every permutation holds {least} or more. A large finite cost, 1e9 say, "
                "makes a pair the last choice."
            )


def _on_host(cost: jax.Array) -> jax.Array:
    def rows(cost: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
        try:
            return solve(cost.astype(np.float64), f, g)
        except ValueError:
            raise RuntimeError(
                "cost must hold no NaN and no -infinity, and must leave a permutation without "
                "+infinity, a forbidden pair; got one that doesn't, inside jax.jit. Call "
                "fmjax.couplings.assignment.optimal_assignment on it outside jax.jit for the entry."
            ) from None

    return call_on_host(rows, cost, *potentials(cost))


def _on_device(cost: jax.Array) -> jax.Array:
    # No row or column of it can be served by its neighbours: Optax's loop would not end.
    bad = jnp.any(jnp.isnan(cost) | jnp.isneginf(cost))
    rows = solve_on_device(jnp.where(bad, 0, cost))
    bad |= jnp.any(jnp.isposinf(cost[rows, jnp.arange(len(cost))]))
    return eqx.error_if(
        rows,
        bad,
        "cost must hold no NaN and no -infinity, and must leave a permutation without +infinity",
    )


def call_on_host(function: Callable[..., np.ndarray], *operands: jax.Array) -> jax.Array:
    """`function`'s row of each column, `[n]`, of arrays of which the first is `[n, ...]`.

    `function` gets and returns NumPy arrays, and may use NumPy and SciPy alone: several host
    devices may wait for it in parallel, with no thread of JAX's runtime left.
    """

    def callback(_: Any, rows: Any, *operands: Any) -> None:
        np.asarray(rows)[:] = function(*map(np.asarray, operands))

    # Not jax.pure_callback: it hands over JAX arrays, whose copy waits for a thread of the runtime,
    # and with several host devices these may all be waiting for the callback.
    rows = jax.ShapeDtypeStruct(operands[0].shape[:1], np.int32)
    return buffer_callback(callback, rows, vmap_method="sequential")(*operands)


def scipy_assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows, 0 to n - 1, and their columns."""
    from scipy.optimize import linear_sum_assignment  # late, for `import fmjax` to be light

    return linear_sum_assignment(cost)


def solve(cost: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The row of each column, for a cost in float64 and any potentials."""
    if np.isfinite(f).all() and np.isfinite(g).all():
        f, g = f.astype(np.float64), g.astype(np.float64)
        pairs = scipy_assignment(cost - f[:, None] - g)
        if are_small(f, g, cost[pairs]):
            return np.argsort(pairs[1])
    return np.argsort(scipy_assignment(cost)[1])


def are_small(f: np.ndarray, g: np.ndarray, costs: np.ndarray) -> bool:
    """Whether potentials can be subtracted without rounding the costs of the optimum, `[n]`."""
    return bool(np.abs(f).sum() + np.abs(g).sum() <= LARGEST * np.abs(costs).sum())


def solve_by_bounds(
    bounds: np.ndarray, measure: Callable[[np.ndarray, np.ndarray], np.ndarray], margin: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """The rows and columns of the optimum, for costs that are measured where they matter.

    The solver takes the other costs for their lower bounds. Pairs of its optimum that aren't
    measured are, and it runs again, until there are none.

    Args:
      bounds: lower bounds of the costs less potentials, `[n, n]` in float64; overwritten.
      measure: `(rows, columns) -> costs` less potentials, each `[num]`.
      margin: positive; bounds up to it are measured before the first run, up to twice it before
        the second, and so on.

    Returns:
      The rows and columns; None if half of all costs would have to be measured.
    """
    known = np.zeros(bounds.shape, bool)
    pairs = None
    while True:
        new = bounds <= margin
        if pairs is not None:
            new[pairs] = True
        new &= ~known
        known |= new
        if 2 * known.sum() > known.size:
            return None
        bounds[new] = measure(*np.nonzero(new))
        pairs, margin = scipy_assignment(bounds), 2 * margin
        if known[pairs].all():
            return pairs


def potentials(cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f and g, each `[n]` in float32, close to the dual optimum of a cost `[n, n]`.

    Not finite, or worth nothing, where float32 can't hold the costs.
    """
    cost = cost.astype(jnp.float32)
    f, g = _minima(cost)
    reduced = _subtract(cost, f, g)
    spread = _spread(reduced)
    reduced = reduced / spread
    for temperature in TEMPERATURES:
        df, dg = _sinkhorn(reduced, temperature)
        reduced = _subtract(reduced, df, dg)
        row, column = _minima(reduced)
        reduced = _subtract(reduced, row, column)
        f, g = f + spread * (df + row), g + spread * (dg + column)
    return f, g


def _subtract(cost: jax.Array, f: jax.Array, g: jax.Array) -> jax.Array:
    return cost - f[:, None] - g[None, :]


def _minima(cost: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The minima of the rows, and then of the columns."""
    f = jnp.min(cost, axis=1)
    return f, jnp.min(cost - f[:, None], axis=0)


def _spread(reduced: jax.Array) -> jax.Array:
    """The unit of the temperatures, near the deviation of costs that are normal.

    From the lower quartile, so that points far apart or forbidden pairs don't rule.
    """
    step = -(-len(reduced) // 32)  # some 1000 entries are enough, and sorting is slow
    some = jnp.sort(reduced[::step, ::step].ravel())
    quartile = some[some.size // 4]
    return jnp.where(quartile > 0, quartile / 2, 1)  # equal costs: any temperature will do


def _sinkhorn(cost: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
    """f and g, each `[n]`, of the entropic plan; `cost` has a zero in each row and column."""
    kernel = jnp.exp(-cost / temperature)

    def inverse(marginal: jax.Array) -> jax.Array:
        # Clipped, so that nothing overflows in float32: the potentials need not be exact.
        return 1 / jnp.clip(marginal, 1e-30, 1e30)

    def update(_: int, uv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u = inverse(kernel @ uv[1])
        return u, inverse(u @ kernel)

    ones = jnp.ones_like(cost[0])
    u, v = jax.lax.fori_loop(0, ROUNDS, update, (ones, ones))
    return temperature * jnp.log(u), temperature * jnp.log(v)


def solve_on_device(cost: jax.Array) -> jax.Array:
    """The row of each column, `[n]`, by Optax in JAX's default dtype.

    Args:
      cost: `[n, n]`, without NaN and -infinity. If each permutation holds a +infinity, so does the
        one that comes back.
    """
    cost = cost.astype(jnp.zeros(()).dtype)
    forbidden = jnp.isposinf(cost)
    cost = cost / power_of_two(jnp.where(forbidden, 0, cost))  # the sums below don't overflow
    f, g = potentials(cost)
    usable = jnp.all(jnp.isfinite(f)) & jnp.all(jnp.isfinite(g))
    f, g = (jnp.where(usable, x, 0).astype(cost.dtype) for x in (f, g))
    cost = _subtract(cost, f, g)
    # No permutation without forbidden pairs costs as much as one of these. An infinity would keep
    # Optax's loop from ending.
    last = 2 * len(cost) * (1 + jnp.max(jnp.where(forbidden, 0, jnp.abs(cost))))
    rows, columns = optax.assignment.hungarian_algorithm(jnp.where(forbidden, last, cost))
    return jnp.zeros_like(rows).at[columns].set(rows).astype(jnp.int32)
