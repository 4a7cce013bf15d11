"""Wasserstein distances between two point sets, by exact transport.

Between uniform weights on N points each,

    W_p^p = min_pi (1 / N) sum_i |x_i - y_pi(i)|^p

over all permutations pi: no other plan is cheaper (Birkhoff's theorem). N and M points with weights
1 / N and 1 / M have no permutation; W_p^p is then the minimum of sum_ij P_ij |x_i - y_j|^p over all
plans P with these marginals, a linear program. An assignment of the smaller set to a part of the
larger one is no transport: it leaves the rest where it is, and reads lower.

As an estimate of the distance between the distributions that the points came from W_p is too high,
by an amount that falls only as N^(-1/D) in more than 2 p dimensions.

Source: Peyré and Cuturi 2019, arXiv 1803.00567 (proposition 2.1); the bias: Fournier and Guillin
2015, arXiv 1312.2128.
"""

import warnings
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, spatial

from .estimate import as_samples


def wasserstein2(x: ArrayLike, y: ArrayLike) -> float:
    """The exact 2-Wasserstein distance W_2 between two point sets of equal size.

    It holds the N x N matrix of costs in float64, and its time grows with up to N^3.

    Args:
      x: `[N, D]`.
      y: `[N, D]`, in any order.

    Returns:
      W_2, in the unit of the points: a distance, not its square.

    Raises:
      ValueError: if the shapes differ, N < 1, or there is a NaN or an infinity.

    Example:
      >>> wasserstein2([[0.0, 0.0], [1.0, 0.0]], [[1.0, 2.0], [0.0, 2.0]])
      2.0

    Source: arXiv 1803.00567, proposition 2.1; the assignment is
    `scipy.optimize.linear_sum_assignment`'s.
    """
    x, y = as_samples("x", x), as_samples("y", y)
    if x.shape != y.shape:
        raise ValueError(
            f"x and y must have as many points of one dimension; got shapes {x.shape} and "
            f"{y.shape}. Take equally many of both."
        )
    # Differences before squares: exact far from the origin too.
    cost = spatial.distance.cdist(x.astype(np.float64), y.astype(np.float64), "sqeuclidean")
    rows, columns = optimize.linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def wasserstein1(x: ArrayLike, y: ArrayLike, *, weights: ArrayLike | None = None) -> float:
    """The exact 1-Wasserstein distance W_1 between two point sets, of any two sizes.

    Equal sizes are an assignment, SciPy's. Unequal ones, and weights, are a linear program, solved
    by POT's network simplex (extra `ot`). It holds the N x M matrix of distances in float64.

    Args:
      x: `[N, D]`.
      y: `[M, D]`.
      weights: of the points x, `[N]`, of any sum; None for equal ones. Those of y are equal.

    Returns:
      W_1, in the unit of the points, for the Euclidean distance.

    Raises:
      ValueError: if the dimensions differ, a set is empty or holds a NaN or an infinity; for
        weights of another length, that are negative, all zero or not finite; if the sizes differ,
        or there are weights, and POT isn't installed.
      RuntimeError: if POT stops before the optimum.

    Example:
      >>> wasserstein1([[0.0], [3.0]], [[1.0], [2.0]])
      1.0
      >>> round(wasserstein1([[0.0], [4.0]], [[0.0]], weights=[3.0, 1.0]), 6)
      1.0

    Source: arXiv 1803.00567, sections 2.3 and 3.5.
    """
    x, y = as_samples("x", x), as_samples("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension; got shapes {x.shape} and {y.shape}.")
    cost = spatial.distance.cdist(x.astype(np.float64), y.astype(np.float64))
    if len(x) == len(y) and weights is None:
        rows, columns = optimize.linear_sum_assignment(cost)
        return float(cost[rows, columns].mean())
    mass = [] if weights is None else _as_mass(weights, len(x))
    ot = _pot(x.shape, y.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say is in the log
        value, log = ot.emd2(mass, [], cost, numItermax=10**9, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT must find the optimum; it stopped: {log['warning']}")
    return float(value)


def _as_mass(weights: ArrayLike, num: int) -> np.ndarray:
    """Weights of sum 1, refused where they are none."""
    mass = np.asarray(weights, np.float64)
    if mass.shape != (num,):
        raise ValueError(f"weights must be [{num}], one for each of x; got {mass.shape}.")
    bad = ~(np.isfinite(mass) & (mass >= 0))
    if bad.any() or not mass.any():
        got = mass[np.argmax(bad)] if bad.any() else "zeros alone"
        raise ValueError(f"weights must be finite, 0 or more, and not all zero; got {got}.")
    return mass / mass.sum()


def _pot(*shapes: tuple[int, ...]) -> Any:
    """POT, whose import is late: it takes a second."""
    try:
        import ot
    except ModuleNotFoundError as error:
        raise ValueError(
            "x and y must have as many points, and no weights, where POT is not installed; got "
            f"shapes {shapes[0]} and {shapes[1]}. pip install 'fmjax[ot]' brings it."
        ) from error
    return ot
