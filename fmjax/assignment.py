"""The linear assignment problem: the permutation of least cost, exact and quick.

Given a square matrix C, find the permutation pi that minimises sum_i C[pi(i), i]. Numbers f_i and
g_j, the potentials, may be taken from the rows and columns first: C[i, j] - f_i - g_j adds the same
to every permutation, so the optimum stays. An exact solver grows shortest augmenting paths, and
these are short where the potentials are close to the dual optimum. Such potentials come cheaply
from entropic optimal transport, whose plan P_ij = u_i K_ij v_j with K = exp(-C / T) has the
marginals 1 after a few of Sinkhorn's matrix-vector products; f = T log u and g = T log v. The
temperature T falls from stage to stage. Whatever they are worth, they change the time that the
exact solver takes and not what it finds, rounding apart.

Source: Cuturi 2013, arXiv 1306.0895, algorithm 1 (Sinkhorn); Crouse 2016, IEEE Transactions on
Aerospace and Electronic Systems 52(4) (the augmenting paths of SciPy and Optax); Peyre and Cuturi
2019, arXiv 1803.00567, sections 3.6 and 4.1 (potentials; falling temperatures).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.buffer_callback import buffer_callback

TEMPERATURES = (0.2, 0.05, 0.0125)  # in standard deviations of the cost
ROUNDS = 10  # of Sinkhorn's, at each temperature


def optimal_assignment(cost: jax.Array) -> jax.Array:
    """Solves the linear assignment problem exactly.

    The permutation pi minimises sum_i cost[pi(i), i]. On a CPU SciPy solves it in a callback on
    the host; elsewhere Optax solves it on the device, a sequential loop.

    Args:
      cost: finite costs, `[n, n]`, floating. Costs whose rows and columns have the mean zero suit
        the temperatures of the start best.

    Returns:
      pi, the row of each column, `[n]`, int32. Which one, among several of equal cost, is open;
      on one platform equal costs give equal answers.

    Raises:
      ValueError: if the matrix isn't square.

    Example:
      >>> optimal_assignment(jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]))
      Array([1, 0, 2], dtype=int32)
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not cost.size:
        raise ValueError(
            f"cost must be a square matrix, [n, n], not empty; got {cost.shape}. For a stack, "
            "jax.vmap."
        )
    largest = jnp.max(jnp.abs(cost), initial=0.0)  # scaled, so that no potential overflows
    # In two steps: 1 / largest may be too small for float32.
    factor = jax.lax.rsqrt(jnp.where(largest > 0, largest, 1))
    cost = jax.lax.stop_gradient(cost * factor * factor)
    reduced = reduce_cost(cost)
    return jax.lax.platform_dependent(reduced, cpu=_solve_on_host, default=_solve_on_device)


def reduce_cost(cost: jax.Array) -> jax.Array:
    """Takes potentials close to the dual optimum from the rows and columns of a cost.

    Every permutation's cost changes by the same number. No entry of the result is negative, and
    each row and each column has a zero.

    Args:
      cost: `[n, n]`, floating.

    Returns:
      cost[i, j] - f_i - g_j, `[n, n]`.
    """
    spread = jnp.std(cost)
    spread = jnp.where(spread > 0, spread, 1)  # equal costs: any temperature will do
    cost = _subtract_minima(cost)
    for temperature in TEMPERATURES:
        f, g = _potentials(cost, temperature * spread)
        cost = _subtract_minima(cost - f[:, None] - g[None, :])
    return cost


def _subtract_minima(cost: jax.Array) -> jax.Array:
    cost = cost - jnp.min(cost, axis=1, keepdims=True)
    return cost - jnp.min(cost, axis=0, keepdims=True)


def _potentials(cost: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f and g, each `[n]`, of the entropic plan; `cost` has a zero in each row and column."""
    kernel = jnp.exp(-cost / temperature)

    def inverse(marginal: jax.Array) -> jax.Array:
        # Clipped, so that nothing overflows in float32: the potentials need not be exact.
        return 1 / jnp.clip(marginal, 1e-30, 1e30)

    def sinkhorn(_: int, uv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        u = inverse(kernel @ uv[1])
        return u, inverse(u @ kernel)

    ones = jnp.ones_like(cost[0])
    u, v = jax.lax.fori_loop(0, ROUNDS, sinkhorn, (ones, ones))
    return temperature * jnp.log(u), temperature * jnp.log(v)


def _solve_on_host(cost: jax.Array) -> jax.Array:
    # Not jax.pure_callback: it hands over JAX arrays, whose copy waits for a thread of the runtime,
    # and with several host devices these may all be waiting for the callback.
    rows = jax.ShapeDtypeStruct(cost.shape[:1], np.int32)
    return buffer_callback(_scipy_assignment, rows, vmap_method="sequential")(cost)


def _scipy_assignment(context: Any, rows: Any, cost: Any) -> None:
    """Writes the row of each column into `rows`. NumPy alone in here, for the same reason."""
    del context
    from scipy.optimize import linear_sum_assignment  # late, for `import fmjax` to be light

    _, columns = linear_sum_assignment(np.asarray(cost))
    np.asarray(rows)[:] = np.argsort(columns)


def _solve_on_device(cost: jax.Array) -> jax.Array:
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros_like(rows).at[columns].set(rows).astype(jnp.int32)
