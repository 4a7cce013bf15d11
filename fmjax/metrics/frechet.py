"""The Fréchet distance between Gaussians fitted to two sets of features.

The squared 2-Wasserstein distance of N(mu_a, A) and N(mu_b, B) is

    d^2 = |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

The last trace is the sum of the square roots of the eigenvalues of a symmetric matrix, so that
nothing ever turns complex, as it may in the square root of the product A B. All is in float64.

Eigenvalues that rounding took below zero are set to zero: those above -10 D eps s, where
eps = 2.2e-16 and s is the norm of the matrix, or of its factors. Anything lower is no covariance,
and an error. An eigenvalue l of A^1/2 B A^1/2 is known to about eps s, so its root to
eps s / (2 sqrt(l)), and at worst, where l = 0, to sqrt(eps s) = 1.5e-8 sqrt(s).

On the features of the FID's InceptionV3 d^2 is the FID; on any other encoder's it isn't.

Source: Dowson and Landau 1982 (The Fréchet distance between multivariate normal distributions);
Heusel et al. 2017, arXiv 1706.08500 (equation 6); the bias: Chong and Forsyth 2020, arXiv
1911.07023; pooling of moments: Chan, Golub and LeVeque 1979.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .estimate import Estimate, as_samples, group_slices, jackknife_error

_ROWS = 4096  # rows turned to float64 together


class Moments(NamedTuple):
    """The first two moments of a set of features.

    Attributes:
      num: number of samples N.
      mean: `[D]`, float64.
      covariance: `[D, D]`, float64, unbiased: the sum of squares over N - 1.
    """

    num: int
    mean: np.ndarray
    covariance: np.ndarray


def moments(features: ArrayLike) -> Moments:
    """The mean and the unbiased covariance of `features`, in float64.

    The mean is subtracted before anything is squared, so features far from the origin lose
    nothing.

    Args:
      features: `[N, D]`, of any real dtype.

    Returns:
      `Moments(num, mean, covariance)`, in the unit of the features and in its square.

    Raises:
      ValueError: if `features` isn't `[N, D]`, holds a NaN or an infinity, or N < 2.

    Example:
      >>> moments([[0.0, 1.0], [2.0, 5.0]]).covariance
      array([[2., 4.],
             [4., 8.]])
    """
    features = as_samples("features", features, min_num=2)
    num, dim = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    squares = np.zeros((dim, dim))
    for start in range(0, num, _ROWS):
        centred = features[start : start + _ROWS].astype(np.float64) - mean
        squares += centred.T @ centred
    return Moments(num, mean, squares / (num - 1))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two sets of samples put together, exact up to rounding.

    With delta = mu_b - mu_a and n = n_a + n_b: mu = mu_a + (n_b / n) delta and
    (n - 1) C = (n_a - 1) A + (n_b - 1) B + (n_a n_b / n) delta delta^T.

    Args:
      a, b: moments of the two sets.

    Returns:
      `Moments` of all `a.num + b.num` samples.

    Raises:
      ValueError: if the two are of different dimension.

    Example:
      >>> merge(moments([[0.0], [2.0]]), moments([[4.0], [6.0]])).mean
      array([3.])

    Source: Chan, Golub and LeVeque 1979 (equation 2.1).
    """
    _check_dimensions(a.mean.shape, b.mean.shape)
    num, delta = a.num + b.num, b.mean - a.mean
    squares = (a.num - 1) * a.covariance + (b.num - 1) * b.covariance
    squares += np.outer(delta, delta * (a.num * b.num / num))
    return Moments(num, a.mean + delta * (b.num / num), squares / (num - 1))


def frechet_distance(a: Moments, b: Moments, *, allow_singular: bool = False) -> float:
    """The Fréchet distance d^2 = |mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    It is symmetric. Between equal moments it is zero up to rounding, of either sign. Of finite
    samples it is too high on average, by about c / N: compare figures of equal N only.

    Args:
      a, b: moments of the two sets of features.
      allow_singular: accept fewer than D + 1 samples, whose covariance has no full rank and whose
        distance says more about N than about the features.

    Returns:
      d^2, in the square of the features' unit: a squared distance, as the FID is.

    Raises:
      ValueError: if the dimensions differ, a side has fewer than D + 1 samples, or a covariance
        isn't finite, symmetric and non-negative.

    Example:
      >>> a = Moments(100, np.zeros(2), np.diag([1.0, 4.0]))
      >>> b = Moments(100, np.ones(2), np.diag([9.0, 4.0]))
      >>> round(frechet_distance(a, b), 12)  # 1 + 1 + (3 - 1)^2
      6.0

    Source: arXiv 1706.08500, equation 6.
    """
    a, b = _checked("a", a, allow_singular), _checked("b", b, allow_singular)
    _check_dimensions(a.mean.shape, b.mean.shape)
    eigenvalues = np.linalg.eigvalsh(b.covariance)
    _non_negative("the covariance of b", eigenvalues, np.abs(eigenvalues).max())
    return _distance(a, _square_root("a", a), b)


def frechet_estimate(
    features: ArrayLike,
    reference: Moments,
    *,
    num_splits: int = 10,
    allow_singular: bool = False,
) -> Estimate:
    """The Fréchet distance of `features` from `reference`, with the jackknife's standard error.

    Each group's moments are computed once and merged. The cost is that of `num_splits + 1`
    spectra of a D x D matrix; about 2 `num_splits` such matrices are held.

    The error is that of the drawn features alone, for these reference moments. Where the two
    distributions are equal d^2 is at its minimum and quadratic in the moments; there the error
    comes out too high, by about sqrt(2).

    Args:
      features: generated features, `[N, D]`, independent and in random order.
      reference: moments of the real features.
      num_splits: number of the jackknife's groups.
      allow_singular: as for `frechet_distance`.

    Returns:
      `Estimate(value, standard_error)`; the value is `frechet_distance`'s.

    Raises:
      ValueError: as `frechet_distance` does, also where the features without one group are fewer
        than D + 1; if `num_splits < 2` or a group has fewer than two samples.

    Example:
      >>> x = np.random.default_rng(0).standard_normal((1000, 2))
      >>> estimate = frechet_estimate(x + 1.0, Moments(1000, np.zeros(2), np.eye(2)))
      >>> abs(estimate.value - 2.0) < 3 * estimate.standard_error
      True
    """
    features = as_samples("features", features, min_num=2)
    reference = _checked("reference", reference, allow_singular)
    _check_dimensions(features.shape[1:], reference.mean.shape)
    slices = group_slices(len(features), num_splits, min_size=2)
    fewest = len(features) - max(group.stop - group.start for group in slices)
    _check_rank("features without one group", fewest, features.shape[1], allow_singular)
    groups = [moments(features[group]) for group in slices]
    root = _square_root("reference", reference)
    value = _distance(reference, root, functools.reduce(merge, groups))
    left_out = [_distance(reference, root, rest) for rest in _leave_one_out(groups)]
    return Estimate(value, jackknife_error(left_out))


def _leave_one_out(groups: Sequence[Moments]) -> Iterator[Moments]:
    """The pooled moments without each group in turn; nothing is ever subtracted."""
    after = list(itertools.accumulate(groups[:0:-1], merge))[::-1]
    yield after[0]
    before = groups[0]
    for group, rest in zip(groups[1:-1], after[1:], strict=True):
        yield merge(before, rest)
        before = merge(before, group)
    yield before


def _distance(a: Moments, root_a: np.ndarray, b: Moments) -> float:
    product = root_a @ b.covariance @ root_a
    eigenvalues = np.linalg.eigvalsh((product + product.T) / 2)
    # Two large factors can have a product near zero: its rounding is that of the factors.
    scale = np.linalg.norm(root_a, ord="fro") ** 2 * np.linalg.norm(b.covariance, ord="fro")
    cross = np.sqrt(_non_negative("A^1/2 B A^1/2", eigenvalues, float(scale))).sum()
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _square_root(name: str, side: Moments) -> np.ndarray:
    """The symmetric square root of a covariance, `[D, D]`."""
    eigenvalues, vectors = np.linalg.eigh(side.covariance)
    scale = np.abs(eigenvalues).max()
    eigenvalues = _non_negative(f"the covariance of {name}", eigenvalues, scale)
    return (vectors * np.sqrt(eigenvalues)) @ vectors.T


def _non_negative(name: str, eigenvalues: np.ndarray, scale: float) -> np.ndarray:
    """Eigenvalues with those that rounding took below zero set to zero."""
    slack = 10 * len(eigenvalues) * np.finfo(np.float64).eps * scale
    if eigenvalues.min() < -slack:
        raise ValueError(
            f"{name} must have no negative eigenvalue; got {eigenvalues.min():.3g}, beyond float64 "
            f"rounding of {slack:.3g}. Compute covariances in float64, by fmjax.metrics.moments."
        )
    return np.maximum(eigenvalues, 0.0)


def _check_dimensions(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    if a != b:
        raise ValueError(
            f"Both sides must have features of one shape; got {a} and {b}. Use one encoder."
        )


def _checked(name: str, side: Moments, allow_singular: bool) -> Moments:
    """Moments that were perhaps not made by `moments`, in float64."""
    mean, covariance = (np.asarray(moment, np.float64) for moment in side[1:])
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{name} must have a mean [D] and a covariance [D, D]; got {mean.shape} and "
            f"{covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{name} must have finite moments; got a NaN or an infinity.")
    if np.abs(covariance - covariance.T).max() > 1e-12 * np.abs(covariance).max():
        raise ValueError(f"The covariance of {name} must be symmetric; got one that isn't.")
    _check_rank(name, side.num, len(mean), allow_singular)
    return Moments(side.num, mean, covariance)


def _check_rank(name: str, num: int, dim: int, allow_singular: bool) -> None:
    if num < dim + 1 and not allow_singular:
        raise ValueError(
            f"A covariance of full rank needs D + 1 samples; {name}: {num} samples for D = {dim}. "
            "Draw more samples, or pass allow_singular=True and report it with the figure."
        )
