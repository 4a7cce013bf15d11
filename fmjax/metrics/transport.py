"""The 2-Wasserstein distance between two point sets of equal size, by exact assignment.

    W_2^2 = min_pi (1 / N) sum_i |x_i - y_pi(i)|^2

over all permutations pi: between uniform weights on N points each, no other plan is cheaper
(Birkhoff's theorem). As an estimate of the distance between the distributions that the points came
from it is too high, by an amount that falls only as N^(-1/D) in D > 4 dimensions.

Source: Peyré and Cuturi 2019, arXiv 1803.00567 (proposition 2.1); the bias: Fournier and Guillin
2015, arXiv 1312.2128.
"""

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
