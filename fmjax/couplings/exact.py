"""Couplings: who is paired with whom, from the source (t = 0) to the data (t = 1).

A coupling `(key, x0, x1) -> x0` re-pairs the source of a batch with its data. Only `x0` moves, so
labels and masks that belong to `x1` stay where they are. Whatever the pairing, each marginal stays
what it was: `x0` is a permutation of itself, without replacement.

Squared distances |a - b|^2 = |a|^2 + |b|^2 - 2 a.b of large events are products of matrices, which
round. In D dimensions, with unit roundoff u, by at most

    2 (D + 24) u (|a|^2 + |b|^2),

so the products are lower bounds of the distances, and only those that may decide the assignment are
measured by their differences, in float64.

Source: Tong et al. 2023, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772; the bound:
Higham 2002 (Accuracy and stability of numerical algorithms), section 3.1.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..types import as_array, check_same_shape
from .assignment import (
    are_small,
    call_on_host,
    potentials,
    solve,
    solve_by_bounds,
    solve_on_device,
)
from .points import as_pair, as_points, distances

DIRECT = 16  # numbers per event, up to which all differences are taken
MARGIN = 4  # distances up to so many times the rounding are measured at first


def independent(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Leaves the pairs as they are drawn: q(x0, x1) = q(x0) q(x1).

    Args:
      key: not used.
      x0: source, `[batch, *event]`.
      x1: data, `[batch, *event]`.

    Returns:
      `x0`.

    Raises:
      ValueError: if the shapes disagree.
    """
    del key
    x0 = as_array("x0", x0)
    check_same_shape("x0 and x1", x0, as_array("x1", x1))
    return x0


def minibatch_ot(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Pairs the batch by the optimal assignment for the squared Euclidean cost.

    The permutation pi minimises sum_i |x0[pi(i)] - x1[i]|^2. It runs inside `jax.jit`, by
    `fmjax.couplings.assignment`. On a CPU it is exact for the numbers given, in float64 on the host
    whatever their dtype, however far apart or from the origin the points are. Elsewhere costs and
    assignment are computed on the device in JAX's default dtype, in a sequential loop (measure that
    at large batches): in float32, pairings whose costs differ by less than about 1e-5 of the
    largest cost count as equal; `jax_enable_x64` makes that float64.

    Memory on a CPU: about four matrices `[batch, batch]` in float64. Where most of the distances
    are far below the events' squared norms, clusters far apart for instance, they are all measured:
    1 to 2 seconds for 10^9 differences.

    On a mesh replicate both arrays first, by `jax.lax.with_sharding_constraint` and
    `fmjax.training.sharding.replicated(mesh)`: split, they communicate at every turn of a loop.

    x0 and x1 are no longer independent then: a velocity trained on such pairs gives samples and
    likelihoods, but `velocity_to_score` of it is not the score.

    Args:
      key: not used, since the optimum needs no randomness.
      x0: source, `[batch, *event]`, floating.
      x1: data, `[batch, *event]`, floating.

    Returns:
      `x0` permuted along the batch, each row exactly once. A NaN or an infinity in either leaves
      nothing to optimise: then all of it is NaN. An empty batch comes back as it is.

    Raises:
      ValueError: if the shapes disagree, or either is not floating.

    Example:
      >>> minibatch_ot(jax.random.key(0), jnp.array([[5.0], [0.0]]), jnp.array([[1.0], [4.0]]))
      Array([[0.],
             [5.]], dtype=float32)

    Source: arXiv 2302.00482, section 3.3.2; the solver is `fmjax.couplings.assignment`'s.
    """
    del key
    x0, x1 = as_pair(x0, x1)
    if not x0.size:
        return x0
    rows, finite = optimal_rows(x0, x1)
    return jnp.where(finite, x0[rows], jnp.nan)


def optimal_rows(x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The row of x0 for each of x1, `[batch]`, and whether all numbers were finite, `[]`."""
    points = as_points(x0, x1)
    rows = jax.lax.platform_dependent(points.x0, points.x1, cpu=_on_host, default=_on_device)
    return rows, points.finite


def _on_host(x0: jax.Array, x1: jax.Array) -> jax.Array:
    if x0.shape[1] <= DIRECT:
        cost = distances(x0.astype(jnp.float32), x1.astype(jnp.float32))
        return call_on_host(_rows_by_differences, x0, x1, *potentials(cost))
    # The middle one of three points: an origin near the data, that an outlier doesn't move.
    a, b, c = x0[0], x0[-1], x1[len(x1) // 2]
    origin = jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))
    a, b = ((x - origin[None]).astype(jnp.float32) for x in (x0, x1))
    norms = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None]
    cost = norms - 2 * jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    # The last term is for what flushes to zero.
    error = 2 * (x0.shape[1] + 24) * 2.0**-24 * norms + 1e-30
    bounds = jnp.maximum(cost - error, 0)
    return call_on_host(_rows, bounds, jnp.max(error), *potentials(cost), x0, x1)


def _rows(
    bounds: np.ndarray,
    error: np.ndarray,
    f: np.ndarray,
    g: np.ndarray,
    x0: np.ndarray,
    x1: np.ndarray,
) -> np.ndarray:
    """The row of each column. NumPy and SciPy alone, on the host.

    Args:
      bounds: lower bounds of the distances, `[n, n]`, float32.
      error: the largest of what they are below the distances.
      f, g: potentials near the optimum's, `[n]`, float32.
      x0, x1: `[n, D]`.
    """
    if not (np.isfinite(f).all() and np.isfinite(g).all()):
        return _rows_by_differences(x0, x1, f, g)
    f, g = f.astype(np.float64), g.astype(np.float64)
    reduced = bounds.astype(np.float64)
    reduced -= f[:, None]
    reduced -= g

    def measure(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return _differences(x0, x1, rows, columns) - f[rows] - g[columns]

    pairs = solve_by_bounds(reduced, measure, MARGIN * float(error))
    if pairs is None or not are_small(f, g, _differences(x0, x1, *pairs)):
        return _rows_by_differences(x0, x1, f, g)
    return np.argsort(pairs[1])


def _rows_by_differences(
    x0: np.ndarray, x1: np.ndarray, f: np.ndarray, g: np.ndarray
) -> np.ndarray:
    """The row of each column from all distances, by differences in float64."""
    from scipy.spatial.distance import cdist  # late, for `import fmjax` to be light

    return solve(cdist(x0.astype(np.float64), x1.astype(np.float64), "sqeuclidean"), f, g)


def _differences(
    x0: np.ndarray, x1: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """|x0[i] - x1[j]|^2 of these pairs, `[num]`, in float64."""
    size = max(1, 2**18 // x0.shape[1])  # stays in the cache
    costs = np.empty(len(rows))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        difference = x0[rows[part]].astype(np.float64) - x1[columns[part]]
        costs[part] = np.einsum("nd,nd->n", difference, difference)
    return costs


def _on_device(x0: jax.Array, x1: jax.Array) -> jax.Array:
    return solve_on_device(distances(x0, x1))
