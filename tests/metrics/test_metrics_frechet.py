"""The Fréchet distance, its moments and the jackknife, against closed forms."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from fmjax import metrics
from fmjax.metrics.frechet import _leave_one_out


def rng(seed=0):
    return np.random.default_rng(seed)


def random_covariance(dim, seed, decades=1.0):
    """A rotated spectrum over `decades` powers of ten."""
    rotation = linalg.qr(rng(seed).standard_normal((dim, dim)))[0]
    covariance = rotation * np.logspace(-decades, 0, dim) @ rotation.T
    return (covariance + covariance.T) / 2


def gaussian(dim, seed, decades=1.0):
    return metrics.Moments(
        10**6, rng(seed + 100).standard_normal(dim), random_covariance(dim, seed, decades)
    )


def product_formula(a, b):
    """The same distance by the unsymmetric root of the product A B: another algorithm."""
    root = linalg.sqrtm(a.covariance @ b.covariance)
    return ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root.real)


def recoloured(target, num, seed):
    """Samples whose sample moments are exactly the target's."""
    x = rng(seed).standard_normal((num, len(target.mean)))
    x -= x.mean(axis=0)
    white = linalg.solve_triangular(linalg.cholesky(np.cov(x.T), lower=True), x.T, lower=True).T
    return white @ linalg.cholesky(target.covariance, lower=True).T + target.mean


def assert_same_moments(a, b, rtol=1e-12):
    assert a.num == b.num
    np.testing.assert_allclose(a.mean, b.mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=rtol, atol=rtol)


def test_one_dimension_and_diagonal_closed_forms():
    """(mu_a - mu_b)^2 + (s_a - s_b)^2, summed over the axes."""
    for dim in (1, 5):
        (mean_a, mean_b), (s_a, s_b) = (
            rng(dim).normal(size=(2, dim)),
            rng(7).uniform(0.1, 3, (2, dim)),
        )
        a = metrics.Moments(100, mean_a, np.diag(s_a**2))
        b = metrics.Moments(100, mean_b, np.diag(s_b**2))
        want = ((mean_a - mean_b) ** 2 + (s_a - s_b) ** 2).sum()
        np.testing.assert_allclose(metrics.frechet_distance(a, b), want, rtol=1e-12)


def test_commuting_closed_form():
    """In one eigenbasis the distance is that of the spectra."""
    rotation = linalg.qr(rng(3).standard_normal((6, 6)))[0]
    spectra = rng(4).uniform(0.1, 5, (2, 6))
    a, b = (
        metrics.Moments(100, np.ones(6) * k, rotation * s @ rotation.T)
        for k, s in enumerate(spectra)
    )
    want = 6 + ((np.sqrt(spectra[0]) - np.sqrt(spectra[1])) ** 2).sum()
    np.testing.assert_allclose(metrics.frechet_distance(a, b), want, rtol=1e-12)


@pytest.mark.parametrize("dim, decades", [(2, 1), (16, 2), (64, 4)])
def test_non_commuting_equals_the_product_formula(dim, decades):
    a, b = gaussian(dim, 0, decades), gaussian(dim, 1, decades)
    distance = metrics.frechet_distance(a, b)
    np.testing.assert_allclose(distance, product_formula(a, b), rtol=1e-9)
    np.testing.assert_allclose(metrics.frechet_distance(b, a), distance, rtol=1e-9)
    # |R mu|, R A R^T: a rotation of both moves nothing, a scale s multiplies by s^2.
    rotation = linalg.qr(rng(5).standard_normal((dim, dim)))[0]
    moved = [
        metrics.Moments(m.num, 3 * rotation @ m.mean, 9 * rotation @ m.covariance @ rotation.T)
        for m in (a, b)
    ]
    np.testing.assert_allclose(metrics.frechet_distance(*moved), 9 * distance, rtol=1e-9)


def test_two_dimensions_by_hand():
    """tr (M)^1/2 = (tr M + 2 sqrt(det M))^1/2 for a 2 x 2 matrix."""
    a, b = gaussian(2, 0), gaussian(2, 1)
    product = a.covariance @ b.covariance
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(linalg.det(product)))
    want = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * cross
    np.testing.assert_allclose(metrics.frechet_distance(a, b), want, rtol=1e-10)


def test_from_samples_to_the_closed_form():
    a, b = gaussian(8, 0), gaussian(8, 1)
    of_a, of_b = (metrics.moments(recoloured(m, 500, seed)) for seed, m in enumerate((a, b)))
    want = product_formula(a, b)
    np.testing.assert_allclose(metrics.frechet_distance(of_a, of_b), want, rtol=1e-9)
    estimate = metrics.frechet_estimate(recoloured(a, 500, 0), b)
    np.testing.assert_allclose(estimate.value, want, rtol=1e-9)


def test_float32_moments_are_computed_in_float64():
    a, b = (metrics.Moments(9, np.ones(8) * k, np.diag(np.arange(1.0, 9) + k)) for k in (0, 1))
    single = (
        m._replace(mean=np.float32(m.mean), covariance=np.float32(m.covariance)) for m in (a, b)
    )
    assert metrics.frechet_distance(*single) == metrics.frechet_distance(a, b)


def test_zero_on_itself():
    for decades in (0, 3, 6):
        a = gaussian(32, 0, decades)
        # Rounding of 1e-16 in an eigenvalue l^2 of A^2 is 1e-16 / (2 l) in its root.
        assert abs(metrics.frechet_distance(a, a)) < 32 * 10.0 ** (decades - 15)
    singular = metrics.moments(rng(1).standard_normal((10, 32)))
    assert abs(metrics.frechet_distance(singular, singular, allow_singular=True)) < 32 * 1e-7


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_moments_far_from_the_origin(dtype):
    """Equal to NumPy's of the centred data: with squares of 1e8 in float32 nothing is left."""
    # Steps of 2^-5 up to 4 are exact beside 1e4 in float32, and alone in bfloat16.
    x = np.clip(np.round(rng().standard_normal((9000, 3)) * 32) / 32, -4, 4)
    offset = 0 if dtype == jnp.bfloat16 else 10_000
    got = metrics.moments(jnp.asarray(x, dtype) if offset == 0 else (x + offset).astype(dtype))
    assert got.mean.dtype == got.covariance.dtype == np.float64
    np.testing.assert_allclose(got.mean, x.mean(axis=0) + offset, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(got.covariance, np.cov(x.T), rtol=1e-12, atol=1e-13)


def test_the_distance_ignores_a_common_offset():
    x, y = (np.round(rng(s).standard_normal((2000, 4)) * 512) / 512 for s in (0, 1))
    near = metrics.frechet_distance(metrics.moments(x), metrics.moments(2 * y))
    far = [metrics.moments((z + 10_000).astype(np.float32)) for z in (x, 2 * y)]
    np.testing.assert_allclose(metrics.frechet_distance(*far), near, rtol=1e-9)


def test_merge_is_pooling():
    x = rng().standard_normal((100, 5)) * [1, 2, 3, 4, 5] + 1e3
    parts = [metrics.moments(part) for part in (x[:2], x[2:60], x[60:])]
    want = metrics.moments(x)
    for a, b, c in itertools.permutations(parts):
        assert_same_moments(metrics.merge(metrics.merge(a, b), c), want, rtol=1e-11)


@pytest.mark.parametrize("num_splits", [2, 3, 4, 7])
def test_groups_left_out_are_the_moments_of_the_rest(num_splits):
    x = rng().standard_normal((30, 3))
    parts = np.array_split(x, num_splits)
    rests = list(_leave_one_out([metrics.moments(part) for part in parts]))
    assert len(rests) == num_splits
    for group, rest in enumerate(rests):
        kept = np.concatenate([part for k, part in enumerate(parts) if k != group])
        assert_same_moments(rest, metrics.moments(kept))


def test_the_estimate_is_the_plain_jackknife():
    """The merged moments give what the distance of each subset, computed anew, gives."""
    x, reference = rng().standard_normal((203, 4)), gaussian(4, 0)

    def statistic(features):
        return metrics.frechet_distance(reference, metrics.moments(features))

    plain = metrics.jackknife(statistic, x, num_splits=7)
    np.testing.assert_allclose(
        metrics.frechet_estimate(x, reference, num_splits=7), plain, rtol=1e-9
    )


def test_the_standard_error_is_the_spread_over_repetitions():
    reference, draw = gaussian(3, 0), rng(11)

    def errors_over_spread(mean, covariance):
        factor = linalg.cholesky(covariance, lower=True)
        samples = draw.normal(size=(200, 400, 3)) @ factor.T + mean
        values, errors = np.transpose([metrics.frechet_estimate(x, reference) for x in samples])
        return np.sqrt((errors**2).mean()) / values.std(ddof=1)

    # The spread of 200 values is known to 1 / sqrt(400) = 5 %, the root mean square of their
    # errors to 24 % / sqrt(200) = 2 %: 25 % is more than four such deviations.
    np.testing.assert_allclose(
        errors_over_spread(np.zeros(3), random_covariance(3, 1)), 1, rtol=0.25
    )
    # The jackknife doubles the variance of a quadratic statistic.
    at_the_minimum = errors_over_spread(reference.mean, reference.covariance)
    np.testing.assert_allclose(at_the_minimum, np.sqrt(2), rtol=0.25)


def test_singular_covariances_are_refused_and_may_be_allowed():
    few, many = (metrics.moments(rng(n).standard_normal((n, 6))) for n in (6, 7))
    for pair in ((few, many), (many, few)):
        with pytest.raises(ValueError, match="6 samples for D = 6.*allow_singular=True"):
            metrics.frechet_distance(*pair)
        got = metrics.frechet_distance(*pair, allow_singular=True)
        np.testing.assert_allclose(got, product_formula(*pair), rtol=1e-6)  # sqrtm's own accuracy
    assert metrics.frechet_distance(many, many) < 1e-12
    x = rng().standard_normal((10, 6))
    with pytest.raises(ValueError, match="without one group: 5 samples for D = 6"):
        metrics.frechet_estimate(x, many, num_splits=2)
    assert metrics.frechet_estimate(x, many, num_splits=2, allow_singular=True).value > 0
    with pytest.raises(ValueError, match="reference: 6 samples"):
        metrics.frechet_estimate(rng().standard_normal((100, 6)), few)


def test_disjoint_ranges_leave_no_cross_term():
    """A^1/2 B A^1/2 = 0: its rounding is measured by its factors, not by itself."""
    rotation = linalg.qr(rng(2).standard_normal((4, 4)))[0]
    spectra = ([1e6, 1.0, 0, 0], [0, 0, 1e3, 1.0])
    a, b = (metrics.Moments(9, np.zeros(4), rotation * s @ rotation.T) for s in spectra)
    np.testing.assert_allclose(metrics.frechet_distance(a, b), 1e6 + 1e3 + 2, rtol=1e-8)


def test_bad_moments_are_refused():
    good = metrics.Moments(10, np.zeros(2), np.eye(2))
    for covariance, message in (
        (np.diag([1.0, -1e-6]), "no negative eigenvalue; got -1e-06"),
        (np.array([[1.0, 0.1], [0.0, 1.0]]), "must be symmetric"),
        (np.diag([1.0, np.nan]), "must have finite moments"),
        (np.eye(3), r"covariance \[D, D\]"),
    ):
        bad = good._replace(covariance=covariance)
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match=message):
                metrics.frechet_distance(*pair)
    # A negative variance where the other side has none doesn't show in the product.
    flat = good._replace(covariance=np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match="covariance of b must have no negative"):
        metrics.frechet_distance(flat, good._replace(covariance=np.diag([1.0, -1e-6])))
    other = metrics.Moments(10, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match=r"one shape; got \(2,\) and \(3,\)"):
        metrics.frechet_distance(good, other)
    with pytest.raises(ValueError, match="one shape"):
        metrics.merge(good, other)
    with pytest.raises(ValueError, match="one shape"):
        metrics.frechet_estimate(np.zeros((40, 2)), other)
