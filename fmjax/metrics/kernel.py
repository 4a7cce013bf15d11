"""Maximum mean discrepancy (MMD) and the kernel distance (KID), without bias.

For a kernel k, with x, x' drawn from one distribution and y, y' from the other,

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y).

From n and m samples the U-statistic leaves the pairs of a sample with itself out,

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
      - 2 sum_ij k(x_i, y_j) / (n m),

so that its mean is MMD^2 for every n and m, and its value may be negative.

Kernels are evaluated in blocks, in float64: the memory is bounded, and the sums are the same.

Source: Gretton et al. 2012 (A kernel two-sample test, JMLR 13, equation 3); Binkowski et al. 2018,
arXiv 1801.01401 (section 3).
"""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from scipy import spatial

from .estimate import Estimate, as_samples, group_slices, jackknife_error


class Kernel(Protocol):
    """A symmetric positive definite kernel: x `[n, D]` and y `[m, D]` in float64 -> `[n, m]`."""

    def __call__(self, x: np.ndarray, y: np.ndarray, /) -> np.ndarray: ...


def polynomial_kernel(degree: int = 3) -> Kernel:
    """The polynomial kernel k(x, y) = (x . y / D + 1)^degree; KID's has degree 3.

    It sees the moments of the distributions up to `degree`, and nothing beyond.

    Args:
      degree: at least 1.

    Returns:
      `(x [n, D], y [m, D]) -> [n, m]`.

    Raises:
      ValueError: if `degree` isn't a positive integer.

    Example:
      >>> polynomial_kernel()(np.ones((1, 2)), np.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]))
      array([[8., 8., 1.]])

    Source: arXiv 1801.01401, section 3.
    """
    if not (degree >= 1 and degree % 1 == 0):  # a NaN fails both
        raise ValueError(f"degree must be a positive integer; got {degree}. KID uses 3.")

    def kernel(x: np.ndarray, y: np.ndarray, /) -> np.ndarray:
        base = x @ y.T
        base /= x.shape[1]
        base += 1.0
        power = base.copy()
        for _ in range(int(degree) - 1):  # many times faster than pow
            power *= base
        return power

    return kernel


def gaussian_kernel(bandwidth: float) -> Kernel:
    """The Gaussian kernel k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)).

    It tells any two distributions apart, best where they differ on the scale of `bandwidth`.

    Args:
      bandwidth: positive, in the unit of the samples.

    Returns:
      `(x [n, D], y [m, D]) -> [n, m]`, in [0, 1].

    Raises:
      ValueError: if `bandwidth` isn't positive and finite.

    Example:
      >>> gaussian_kernel(1.0)(np.array([[0.0]]), np.array([[0.0], [2.0]])).round(4)
      array([[1.    , 0.1353]])

    Source: Gretton et al. 2012, section 2.
    """
    if not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth must be positive and finite; got {bandwidth}.")

    def kernel(x: np.ndarray, y: np.ndarray, /) -> np.ndarray:
        # Products of numbers far from the origin would round the distances away.
        centre = x.mean(axis=0)
        x, y = x - centre, y - centre
        square = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)
        # Rounding can leave a distance of zero slightly negative.
        return np.exp(np.maximum(square, 0.0) / (-2 * bandwidth**2))

    return kernel


def squared_mmd(x: ArrayLike, y: ArrayLike, kernel: Kernel, *, chunk_size: int = 2048) -> float:
    """MMD^2 between two sets of samples by the unbiased U-statistic; it may be negative.

    Args:
      x: `[n, D]`, n >= 2.
      y: `[m, D]`, m >= 2.
      kernel: `polynomial_kernel(...)`, `gaussian_kernel(...)` or a function of one's own.
      chunk_size: the kernel is evaluated on at most `chunk_size` x `chunk_size` pairs at a time.

    Returns:
      MMD^2, in the unit of the kernel.

    Raises:
      ValueError: if the dimensions differ, a set has fewer than two samples or holds a NaN or an
        infinity, `chunk_size < 1`, or the kernel returns another shape than `[n, m]`.

    Example:
      >>> squared_mmd([[0.0], [2.0]], [[1.0], [3.0]], polynomial_kernel(1))  # (1 - 2)^2 - 1 - 1
      -1.0

    Source: Gretton et al. 2012, equation 3.
    """
    x, y = as_samples("x", x, min_num=2), as_samples("y", y, min_num=2)
    _check_dimensions("x", x, "y", y)
    within_x, within_y = (_within(s, kernel, chunk_size) for s in (x, y))
    return _u_statistic(within_x, len(x), within_y, len(y), _between(x, y, kernel, chunk_size))


def kernel_distance(
    features: ArrayLike,
    reference: ArrayLike,
    *,
    num_splits: int = 10,
    kernel: Kernel = polynomial_kernel(),  # noqa: B008 (a pure function)
) -> Estimate:
    """The kernel distance (KID on Inception features) with the jackknife's standard error.

    It is `squared_mmd` of all samples, each pair of samples evaluated once, and not the mean over
    random subsets that the original protocol takes: the same expectation with a smaller variance.
    The error is that of the drawn features alone, for these reference features.

    Args:
      features: generated features, `[N, D]`, independent and in random order.
      reference: real features, `[M, D]`.
      num_splits: number of the jackknife's groups.
      kernel: by default KID's, (x . y / D + 1)^3.

    Returns:
      `Estimate(value, standard_error)`, in the unit of the kernel. The value is unbiased, so it
      may be negative; tables often print it times 1000.

    Raises:
      ValueError: as `squared_mmd` does; if `num_splits < 2`, N < `num_splits`, or fewer than two
        features are left without one group.

    Example:
      >>> x, y = np.random.default_rng(0).standard_normal((2, 500, 4))
      >>> same, moved = kernel_distance(x, y), kernel_distance(x + 1.0, y)
      >>> abs(same.value) < 4 * same.standard_error, moved.value > 4 * moved.standard_error
      (True, True)

    Source: arXiv 1801.01401, section 3.
    """
    x = as_samples("features", features, min_num=3)
    y = as_samples("reference", reference, min_num=2)
    _check_dimensions("features", x, "reference", y)
    groups = [x[group] for group in group_slices(len(x), num_splits)]
    sizes = np.array([len(group) for group in groups])
    if len(x) - sizes.max() < 2:
        raise ValueError(f"Too few features, {len(x)}, for num_splits={num_splits}.")
    within = _group_sums(groups, kernel)
    between = np.array([_between(group, y, kernel) for group in groups])
    within_y = _within(y, kernel)

    def distance(kept: np.ndarray) -> float:
        sum_x, sum_xy = within[np.ix_(kept, kept)].sum(), between[kept].sum()
        return _u_statistic(sum_x, sizes[kept].sum(), within_y, len(y), sum_xy)

    everything = np.ones(num_splits, bool)
    left_out = [distance(np.arange(num_splits) != group) for group in range(num_splits)]
    return Estimate(distance(everything), jackknife_error(left_out))


def energy_distance(x: ArrayLike, y: ArrayLike, *, num_splits: int = 10) -> Estimate:
    """The energy distance 2 E|x - y| - E|x - x'| - E|y - y'| with the jackknife's standard error.

    It is MMD^2 for the kernel -|x - y|, and zero between equal distributions alone. The norms are
    not squared: with squares it would be 2 |E x - E y|^2, which sees no variance.

    Args:
      x: `[N, D]`, independent and in random order; the error is that of x alone, for these y.
      y: `[M, D]`.
      num_splits: number of the jackknife's groups.

    Returns:
      `Estimate(value, standard_error)`, in the unit of the points. The value is unbiased, so it may
      be negative.

    Raises:
      ValueError: as `kernel_distance` does.

    Example:
      >>> x, y = np.random.default_rng(0).standard_normal((2, 500, 4))
      >>> abs(energy_distance(x, y).value) < 0.01, energy_distance(x + 1.0, y).value > 0.5
      (True, True)

    Source: Szekely and Rizzo 2013 (Energy statistics, JSPI 143); Sejdinovic et al. 2013, arXiv
    1207.6076 (as an MMD).
    """

    def kernel(x: np.ndarray, y: np.ndarray, /) -> np.ndarray:
        return -spatial.distance.cdist(x, y)

    return kernel_distance(x, y, num_splits=num_splits, kernel=kernel)


def _group_sums(groups: list[np.ndarray], kernel: Kernel) -> np.ndarray:
    """`[G, G]`: sums of the kernel over the pairs of two groups, without self-pairs."""
    sums = np.diag([_within(group, kernel) for group in groups])
    for i, j in zip(*np.triu_indices(len(groups), k=1), strict=True):
        sums[i, j] = sums[j, i] = _between(groups[i], groups[j], kernel)
    return sums


def _u_statistic(within_x: float, n: int, within_y: float, m: int, between: float) -> float:
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m))


def _within(x: np.ndarray, kernel: Kernel, chunk_size: int = 2048) -> float:
    """The sum of k(x_i, x_j) over i != j; by symmetry half the blocks are enough."""
    total, parts = 0.0, _chunks(x, chunk_size)
    for i, part in enumerate(parts):
        block = _block(part, part, kernel)
        total += block.sum() - np.trace(block)
        total += 2 * sum(_block(part, other, kernel).sum() for other in parts[i + 1 :])
    return float(total)


def _between(x: np.ndarray, y: np.ndarray, kernel: Kernel, chunk_size: int = 2048) -> float:
    """The sum of k(x_i, y_j) over all pairs."""
    ys = _chunks(y, chunk_size)
    return float(sum(_block(a, b, kernel).sum() for a in _chunks(x, chunk_size) for b in ys))


def _chunks(x: np.ndarray, chunk_size: int) -> list[np.ndarray]:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    return [x[start : start + chunk_size] for start in range(0, len(x), chunk_size)]


def _block(x: np.ndarray, y: np.ndarray, kernel: Kernel) -> np.ndarray:
    block = np.asarray(kernel(x.astype(np.float64), y.astype(np.float64)), np.float64)
    if block.shape != (len(x), len(y)):
        raise ValueError(
            f"The kernel of {len(x)} and {len(y)} samples must be [{len(x)}, {len(y)}]; got shape "
            f"{block.shape}."
        )
    return block


def _check_dimensions(name_x: str, x: np.ndarray, name_y: str, y: np.ndarray) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{name_x} and {name_y} must have one dimension; got shapes {x.shape} and {y.shape}. "
            "Use one encoder for both."
        )
