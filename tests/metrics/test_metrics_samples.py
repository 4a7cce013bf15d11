"""Kernel distances, the Inception score and Wasserstein distances, against closed forms."""

import itertools
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, spatial, stats

from fmjax import metrics

CUBIC = metrics.polynomial_kernel()


def rng(seed=0):
    return np.random.default_rng(seed)


def polynomial_mmd(mean, scale):
    """MMD^2 of N(0, 1) and N(mean, scale^2) in 1-D under (x y + 1)^3.

    (x y + 1)^3 = sum_j C(3, j) x^j y^j, so it is sum_j C(3, j) (m_j - m_j')^2 of raw moments.
    """
    differences = (mean, mean**2 + scale**2 - 1, mean**3 + 3 * mean * scale**2)
    return sum(c * d**2 for c, d in zip((3, 3, 1), differences, strict=True))


def gaussian_mmd(shift, scales, bandwidth):
    """MMD^2 of N(0, a^2 I) and N(shift, b^2 I): the kernel of Gaussians is a Gaussian integral."""

    def mean_kernel(variance, shift):
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (len(shift) / 2) * np.exp(-(shift @ shift) / (2 * total))

    (a, b), zero = scales, np.zeros_like(shift)
    within = mean_kernel(2 * a**2, zero) + mean_kernel(2 * b**2, zero)
    return within - 2 * mean_kernel(a**2 + b**2, shift)


def double_sum(x, y, kernel):
    """The U-statistic, pair by pair."""

    def mean(pairs):
        return np.mean([kernel(a[None], b[None])[0, 0] for a, b in pairs])

    within = [mean(itertools.permutations(z, 2)) for z in (x, y)]
    return sum(within) - 2 * mean(itertools.product(x, y))


def assert_mean_is(values, want, deviations=4):
    values = np.asarray(values)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - want) < deviations * error, (values.mean(), want, error)


def biased(x, y, kernel):
    """The V-statistic, self-pairs and all."""
    return kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean()


@pytest.mark.parametrize("kernel", [CUBIC, metrics.gaussian_kernel(1.5)])
def test_squared_mmd_is_the_sum_over_pairs(kernel):
    x, y = rng().normal(size=(7, 3)), rng(1).normal(size=(5, 3)) + 1
    want = double_sum(x, y, kernel)
    for chunk_size in (1, 2, 3, 100):
        got = metrics.squared_mmd(x, y, kernel, chunk_size=chunk_size)
        np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(metrics.squared_mmd(y, x, kernel), want, rtol=1e-12)
    order = rng(2).permutation(7)
    np.testing.assert_allclose(metrics.squared_mmd(x[order], y, kernel), want, rtol=1e-12)


def test_polynomial_mmd_is_unbiased():
    draw = rng(3)
    for mean, scale in ((0.0, 1.0), (0.3, 0.8)):
        pairs = [
            (draw.normal(size=(30, 1)), draw.normal(mean, scale, (20, 1))) for _ in range(3000)
        ]
        assert_mean_is(
            [metrics.squared_mmd(x, y, CUBIC) for x, y in pairs], polynomial_mmd(mean, scale)
        )
        with pytest.raises(AssertionError):  # so the test can tell
            assert_mean_is([biased(x, y, CUBIC) for x, y in pairs], polynomial_mmd(mean, scale))


def test_kernel_distance_is_unbiased_in_many_dimensions():
    draw = rng(4)
    pairs = [draw.normal(size=(2, 40, 16)) for _ in range(500)]
    assert_mean_is([metrics.kernel_distance(x, y).value for x, y in pairs], 0.0)
    with pytest.raises(AssertionError):
        assert_mean_is([biased(x, y, CUBIC) for x, y in pairs], 0.0)


def test_gaussian_mmd_is_unbiased():
    draw, shift, scales = rng(5), np.array([0.5, -0.2]), (1.0, 1.3)
    kernel, want = metrics.gaussian_kernel(0.8), gaussian_mmd(np.array([0.5, -0.2]), scales, 0.8)
    values = [
        metrics.squared_mmd(
            scales[0] * draw.normal(size=(25, 2)),
            scales[1] * draw.normal(size=(35, 2)) + shift,
            kernel,
        )
        for _ in range(3000)
    ]
    assert_mean_is(values, want)


def test_gaussian_kernel_is_exact_far_from_the_origin():
    x, y = rng().normal(size=(2, 6, 3))
    kernel = metrics.gaussian_kernel(0.7)
    want = np.exp(-((x[:, None] - y) ** 2).sum(-1) / (2 * 0.7**2))
    np.testing.assert_allclose(kernel(x, y), want, rtol=1e-12)
    # Adding 1e6 rounds the points themselves to 1e-10.
    np.testing.assert_allclose(kernel(x + 1e6, y + 1e6), want, rtol=1e-7)
    many = rng(1).normal(size=(300, 3))
    assert kernel(many, many).max() <= 1.0


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_polynomial_kernel_by_hand(degree):
    x, y = rng().normal(size=(4, 3)), rng(1).normal(size=(2, 3))
    want = ((x[:, None] * y).mean(-1) + 1) ** degree
    np.testing.assert_allclose(metrics.polynomial_kernel(degree)(x, y), want, rtol=1e-12)


def test_kernel_distance_is_the_plain_jackknife():
    """The block sums give what `squared_mmd` of each subset, computed anew, gives."""
    x, y = rng().normal(size=(53, 4)), rng(1).normal(size=(31, 4)) + 0.5
    for kernel, num_splits in ((CUBIC, 10), (metrics.gaussian_kernel(1.0), 53)):
        plain = metrics.jackknife(lambda z, k=kernel: metrics.squared_mmd(z, y, k), x, num_splits)
        got = metrics.kernel_distance(x, y, num_splits=num_splits, kernel=kernel)
        np.testing.assert_allclose(got, plain, rtol=1e-9)
    single = metrics.kernel_distance(jnp.asarray(x, jnp.float32), y.astype(np.float32))
    np.testing.assert_allclose(single.value, metrics.kernel_distance(x, y).value, rtol=1e-5)


def test_the_kernel_distances_error_is_its_spread_over_repetitions():
    draw, y = rng(6), rng(7).normal(size=(300, 4))
    estimates = np.array(
        [metrics.kernel_distance(draw.normal(0.5, 1, (200, 4)), y) for _ in range(200)]
    )
    # As for the Fréchet distance: the spread is known to 5 %, the mean error to 2 %.
    error = np.sqrt((estimates[:, 1] ** 2).mean())
    np.testing.assert_allclose(error, estimates[:, 0].std(ddof=1), rtol=0.25)


def test_inception_score_closed_forms():
    uniform = metrics.inception_score(np.full((100, 7), 3.0))
    np.testing.assert_allclose(uniform, (1.0, 0.0), atol=1e-12)
    for sureness in (1e3, 1e6):  # probabilities of exactly 0, and no NaN
        sure = metrics.inception_score(sureness * np.tile(np.eye(5), (20, 1)))
        np.testing.assert_allclose(sure, (5.0, 0.0), atol=1e-9)
    # Ten splits of one class each know of no other class.
    one_class = metrics.inception_score(1e3 * np.repeat(np.eye(5), 20, axis=0))
    np.testing.assert_allclose(one_class, (1.0, 0.0), atol=1e-9)


def test_inception_score_of_two_classes_by_hand():
    """Predictions (q, 1 - q) and (1 - q, q) in turn: log IS = log 2 - H(q); logits may shift."""
    q = np.array([0.9, 0.6])
    logits = np.log([[(a, 1 - a), (1 - a, a)] for a in q.repeat(10)]).reshape(40, 2) + 500.0
    scores = 2 * np.exp(q * np.log(q) + (1 - q) * np.log(1 - q))
    got = metrics.inception_score(logits, num_splits=2)
    want = (scores.mean(), abs(scores[0] - scores[1]) / 2)  # std (ddof 1) of two, over sqrt 2
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_class_accuracy_closed_forms(num_classes):
    """Logits that are sure of class y, asked for y, for y + 1, and for y in k of n places."""
    sure = rng().permutation(np.tile(np.arange(num_classes), 20))
    logits = 3.0 * np.eye(num_classes)[sure] - 50
    assert metrics.class_accuracy(logits, sure) == (1.0, 0.0)
    other = (sure + 1) % num_classes
    assert metrics.class_accuracy(logits, other) == (0.0, 0.0)
    n = len(sure)
    for k in (1, n // 4, n - 1):
        got = metrics.class_accuracy(logits, np.where(np.arange(n) < k, sure, other))
        want = (k / n, np.sqrt(k * (n - k) / n**3))
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_the_class_accuracys_error_is_its_spread_over_repetitions():
    """A classifier that is right with probability 0.8: the accuracy's mean and deviation."""
    hits = rng().random((2000, 50)) < 0.8
    estimates = [metrics.class_accuracy(np.stack([h, ~h], 1) * 1.0, 0 * h) for h in hits]
    values, errors = np.array(estimates).T
    assert_mean_is(values, 0.8)
    np.testing.assert_allclose(values.std(ddof=1), np.sqrt(0.8 * 0.2 / 50), rtol=0.06)
    np.testing.assert_allclose(errors.mean(), np.sqrt(0.8 * 0.2 / 50), rtol=0.03)


def test_class_accuracy_refuses_labels_that_are_none():
    logits = np.eye(3)
    for labels, rule in (
        ([0, 1], r"whole numbers \[3\].*got int64 \[2\]"),
        ([0.0, 1.0, 2.0], "whole numbers .*got float64"),
        (np.eye(3, dtype=int), "one-hot"),
        ([True, False, True], "got bool"),
        ([0, 1, 3], "0 to 2, the columns of logits; got 0 to 3"),
        ([-1, 1, 2], "got -1 to 2. Samples that were drawn without a class"),
    ):
        with pytest.raises(ValueError, match=rule):
            metrics.class_accuracy(logits, labels)
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.class_accuracy(logits * np.nan, [0, 1, 2])


def test_wasserstein2_closed_forms():
    x, shift = rng().normal(size=(60, 3)), np.array([3.0, -4.0, 12.0])
    order = rng(1).permutation(60)
    np.testing.assert_allclose(metrics.wasserstein2(x, (x + shift)[order]), 13.0, rtol=1e-12)
    assert metrics.wasserstein2(x, x[order]) == 0.0
    far = metrics.wasserstein2(x + 1e6, (x + 1e6 + shift)[order])
    np.testing.assert_allclose(far, 13.0, rtol=1e-9)
    a, b = rng(2).normal(size=(50, 1)), rng(3).exponential(size=(50, 1))
    want = np.sqrt(((np.sort(a, axis=0) - np.sort(b, axis=0)) ** 2).mean())
    np.testing.assert_allclose(metrics.wasserstein2(a, b), want, rtol=1e-12)
    np.testing.assert_allclose(metrics.wasserstein2(b, a), want, rtol=1e-12)


def test_wasserstein2_is_the_best_of_all_permutations():
    x, y = rng(4).normal(size=(2, 6, 2))
    costs = [((x - y[list(p)]) ** 2).sum(1).mean() for p in itertools.permutations(range(6))]
    np.testing.assert_allclose(metrics.wasserstein2(x, y), np.sqrt(min(costs)), rtol=1e-12)


def test_wasserstein2_of_a_linear_map():
    """A symmetric positive definite map is optimal, so its cost is the distance: for Gaussians
    it is how N(0, A) becomes N(m, B)."""
    factor = rng(6).normal(size=(3, 3))
    linear, x = factor @ factor.T + 0.1 * np.eye(3), rng(5).normal(size=(200, 3))
    y = x @ linear + [1.0, 2.0, 3.0]
    want = np.sqrt(((x - y) ** 2).sum(axis=1).mean())
    np.testing.assert_allclose(metrics.wasserstein2(x, y[::-1]), want, rtol=1e-12)
    # And the Fréchet distance of their moments (over N, not N - 1): the same map is optimal.
    a, b = (m._replace(covariance=m.covariance * 199 / 200) for m in map(metrics.moments, (x, y)))
    np.testing.assert_allclose(metrics.frechet_distance(a, b), want**2, rtol=1e-9)


def test_wasserstein1_closed_forms():
    x, shift = rng().normal(size=(60, 3)), np.array([3.0, -4.0, 12.0])
    for y in (x, np.repeat(x, 2, axis=0)):  # as many points, and twice as many
        moved = (y + shift)[rng(1).permutation(len(y))]
        np.testing.assert_allclose(metrics.wasserstein1(x, moved), 13.0, rtol=1e-9)
        np.testing.assert_allclose(metrics.wasserstein1(moved, x), 13.0, rtol=1e-9)


@pytest.mark.parametrize("num", [40, 57])
def test_wasserstein1_on_the_line_is_the_area_between_the_distribution_functions(num):
    x, y = rng(2).normal(size=(40, 1)), rng(3).exponential(size=(num, 1))
    want = stats.wasserstein_distance(x[:, 0], y[:, 0])
    np.testing.assert_allclose(metrics.wasserstein1(x, y), want, rtol=1e-9)


def test_wasserstein1_is_the_linear_programs_and_no_rectangular_assignment():
    """SciPy's assignment of 7 points to 11 leaves four where they are, and reads lower."""
    x, y = rng(4).normal(size=(7, 2)), rng(5).normal(size=(11, 2)) + 1
    cost = spatial.distance.cdist(x, y)
    rows, columns = np.divmod(np.arange(77), 11)
    marginals = [rows == np.arange(7)[:, None], columns == np.arange(11)[:, None]]
    masses = np.repeat([1 / 7, 1 / 11], [7, 11])
    want = optimize.linprog(cost.ravel(), A_eq=np.concatenate(marginals), b_eq=masses).fun
    np.testing.assert_allclose(metrics.wasserstein1(x, y), want, rtol=1e-9)
    assert cost[optimize.linear_sum_assignment(cost)].mean() < 0.8 * want


def test_wasserstein1_with_weights_is_that_of_repeated_points():
    x, y = rng(4).normal(size=(6, 2)), rng(5).normal(size=(6, 2)) + 1
    want = metrics.wasserstein1(np.repeat(x, [3, 1, 0, 2, 1, 1], axis=0), y)
    found = metrics.wasserstein1(x, y, weights=[6, 2, 0, 4, 2, 2])
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert abs(found - metrics.wasserstein1(x, y)) > 0.03
    for weights, got in (
        ([1.0], r"weights must be \[6\].*got \(1,\)"),
        ([0.0] * 6, "not all zero; got zeros alone"),
        ([1, 1, -2, 1, 1, 1], "0 or more.*got -2"),
        ([1, 1, np.nan, 1, 1, 1], "finite.*got nan"),
    ):
        with pytest.raises(ValueError, match=got):
            metrics.wasserstein1(x, y, weights=weights)


def test_without_pot_equal_sizes_are_measured_and_others_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    assert metrics.wasserstein1([[0.0], [3.0]], [[1.0], [2.0]]) == 1
    with pytest.raises(ValueError, match=r"got shapes \(2, 1\) and \(1, 1\).*'fmjax\[ot\]'"):
        metrics.wasserstein1([[0.0], [3.0]], [[1.0]])
    with pytest.raises(ValueError, match="no weights, where POT is not installed"):
        metrics.wasserstein1([[0.0], [3.0]], [[1.0], [2.0]], weights=[1.0, 3.0])


def test_energy_distance_is_the_formulas_and_sees_a_variance():
    """Of N(0, 1) and N(0, s^2): (2 / sqrt(pi)) (sqrt(2 (1 + s^2)) - 1 - s)."""
    x, y = rng(6).normal(size=(500, 1)), 3 * rng(7).normal(size=(800, 1))
    between, within = spatial.distance.cdist(x, y).mean(), 0.0
    for z in (x, y):
        within += spatial.distance.cdist(z, z).sum() / (len(z) * (len(z) - 1))
    got = metrics.energy_distance(x, y)
    np.testing.assert_allclose(got.value, 2 * between - within, rtol=1e-9)
    other = metrics.energy_distance(y, x).standard_error  # that of y
    want = 2 / np.sqrt(np.pi) * (np.sqrt(20) - 4)
    assert abs(got.value - want) < 4 * np.hypot(got.standard_error, other) < 0.25
    same = metrics.energy_distance(x, rng(8).normal(size=(800, 1)))
    assert abs(same.value) < 4 * same.standard_error < 0.1


def test_bad_input_is_refused():
    x, y, nan = np.zeros((4, 2)), np.zeros((4, 3)), np.full((4, 2), np.nan)
    for call in (
        lambda a, b: metrics.squared_mmd(a, b, CUBIC),
        metrics.kernel_distance,
        metrics.wasserstein1,
        metrics.wasserstein2,
        metrics.energy_distance,
    ):
        with pytest.raises(ValueError, match=r"got shapes \(4, 2\) and \(4, 3\)"):
            call(x, y)
        with pytest.raises(ValueError, match="4 of 4 rows hold a NaN"):
            call(nan, x)
        with pytest.raises(ValueError, match="4 of 4 rows hold a NaN"):
            call(x, nan)
    with pytest.raises(ValueError, match=r"got shapes \(4, 2\) and \(3, 2\)"):
        metrics.wasserstein2(x, x[:3])
    with pytest.raises(ValueError, match="at least 2 rows"):
        metrics.squared_mmd(x[:1], x, CUBIC)
    with pytest.raises(ValueError, match="num_splits=5"):
        metrics.kernel_distance(x, x, num_splits=5)
    with pytest.raises(ValueError, match="chunk_size"):
        metrics.squared_mmd(x, x, CUBIC, chunk_size=0)
    with pytest.raises(ValueError, match=r"must be \[4, 4\]; got shape \(4,\)"):
        metrics.squared_mmd(x, x, lambda a, b: (a * b).sum(1))
    with pytest.raises(ValueError, match="bandwidth"):
        metrics.gaussian_kernel(0.0)
    with pytest.raises(ValueError, match="degree"):
        metrics.polynomial_kernel(0)
    with pytest.raises(ValueError, match="num_splits=1"):
        metrics.inception_score(x, num_splits=1)
    with pytest.raises(ValueError, match="4 of 4 rows"):
        metrics.inception_score(nan, num_splits=2)


def test_equal_rows_are_no_trouble_and_equal_samples_are_at_chance():
    rng = np.random.default_rng(5)
    x, same = rng.standard_normal((64, 2)), np.ones((64, 2))
    assert metrics.wasserstein2(x, x) == 0 and metrics.wasserstein2(same, same) == 0
    np.testing.assert_allclose(metrics.wasserstein2(same, same + 3), np.sqrt(18), rtol=1e-12)
    assert metrics.squared_mmd(same, same, CUBIC) == 0
    twice = metrics.squared_mmd(x, rng.permutation(x), CUBIC)  # unbiased, so at most 0 here
    assert -0.5 < twice <= 0
    assert metrics.frechet_distance(metrics.moments(x), metrics.moments(x)) < 1e-12
