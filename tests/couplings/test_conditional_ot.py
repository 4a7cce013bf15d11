"""Pairs that keep the source independent of a condition, and how far others are from that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy.optimize import linear_sum_assignment

import fmjax as fm
from fmjax.couplings import conditional

KEY = jax.random.key(0)


def draw(num, dim=2, seed=0):
    """Source, data and three classes, whose data lie apart."""
    rng = np.random.default_rng(seed)
    x0, x1 = rng.standard_normal((2, num, dim))
    labels = rng.integers(0, 3, num)
    x1[:, 0] += 4 * (labels - 1)
    return jnp.asarray(x0, jnp.float32), jnp.asarray(x1, jnp.float32), jnp.asarray(labels)


def cost_of(x0, x1, differ=0.0):
    """[n, n] in float64, and the least sum over permutations."""
    x0, x1 = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x0, x1))
    cost = np.square(x0[:, None] - x1[None]).sum(-1) + differ
    return cost, cost[linear_sum_assignment(cost)].sum()


def rows_of(paired, x0):
    """The row of x0 that each row of `paired` is."""
    paired, x0 = np.asarray(paired), np.asarray(x0)
    return np.array([np.flatnonzero((x0 == row).all(1)).item() for row in paired])


@pytest.mark.parametrize("shape", [(60, 2), (30, 40)])
def test_within_classes_each_set_is_kept_and_its_assignment_optimal(shape):
    x0, x1, labels = draw(*shape)
    coupling = fm.conditional_ot(labels)
    paired = jit(coupling)(KEY, x0, x1)
    np.testing.assert_array_equal(coupling(KEY, x0, x1), paired)
    for label in range(3):
        here = np.asarray(labels) == label
        want = np.sort(np.asarray(x0)[here], axis=0)
        np.testing.assert_array_equal(np.sort(np.asarray(paired)[here], axis=0), want)
        least = cost_of(x0[here], x1[here])[1]
        np.testing.assert_allclose(np.square(paired - x1)[here].sum(), least, rtol=1e-6)


def test_plain_pairs_tell_the_class_and_these_do_not():
    """The mean of x0 given the outer classes: the naive coupling's differ by more than a deviation,
    those of drawn pairs by chance alone, and pairs within a class are drawn pairs' exactly."""
    x0, x1, labels = draw(600)

    def gap(coupling):
        x = np.asarray(jit(coupling)(KEY, x0, x1))[:, 0]
        return x[np.asarray(labels) == 2].mean() - x[np.asarray(labels) == 0].mean()

    assert gap(fm.minibatch_ot) > 1.5
    np.testing.assert_allclose(gap(fm.conditional_ot(labels)), gap(fm.independent), atol=1e-6)
    assert abs(gap(fm.independent)) < 4 * np.sqrt(2 / 200)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight", [3.0, *(pytest.param(w, marks=pytest.mark.slow) for w in (0.0, 0.5, 1e6))]
)
def test_a_finite_weight_is_the_penalty_of_leaving_a_class(weight):
    x0, x1, labels = draw(40)
    coupling = jit(fm.conditional_ot(labels, weight))
    differ = weight * (np.asarray(labels)[:, None] != np.asarray(labels)[None])
    cost, least = cost_of(x0, x1, differ)
    rows = rows_of(coupling(KEY, x0, x1), x0)
    np.testing.assert_allclose(cost[rows, np.arange(40)].sum(), least, rtol=1e-6)
    scale = 2.0**40  # the penalty is absolute: here it is nothing
    naive = scale * fm.minibatch_ot(KEY, x0, x1)
    np.testing.assert_array_equal(coupling(KEY, scale * x0, scale * x1), naive)
    if weight == 1e6:  # as much as an infinite one
        np.testing.assert_array_equal(coupling(KEY, x0, x1), fm.conditional_ot(labels)(KEY, x0, x1))
    if weight == 0:
        np.testing.assert_array_equal(coupling(KEY, x0, x1), fm.minibatch_ot(KEY, x0, x1))


def test_several_labels_are_one_class_where_all_agree():
    x0, x1, labels = draw(40)
    other = jnp.arange(40) % 2 == 0
    both = jnp.stack([labels, other.astype(labels.dtype)], axis=1)
    want = fm.conditional_ot(2 * labels + other.astype(labels.dtype))(KEY, x0, x1)
    np.testing.assert_array_equal(fm.conditional_ot(both)(KEY, x0, x1), want)


@pytest.mark.parametrize("dim", [2, 40])
def test_continuous_conditions_are_a_penalty(dim):
    x0, x1, _ = draw(40, dim)
    c = jnp.asarray(np.random.default_rng(1).standard_normal((40, 3)), jnp.float32)
    paired = jit(fm.conditional_ot(c, 2.5))(KEY, x0, x1)
    cost, least = cost_of(x0, x1, 2.5 * cost_of(c, c)[0])
    got = cost[rows_of(paired, x0), np.arange(40)].sum()
    np.testing.assert_allclose(got, least, rtol=1e-6)


@pytest.mark.parametrize(
    "weight, skew, error",
    [
        (1.0, 0.96, 0.03),
        pytest.param(10.0, 0.44, 0.03, marks=pytest.mark.slow),
        # Drawn pairs have a correlation of 0 with a standard error of 1 / 32.
        pytest.param(100.0, 0.05, 2 / 32, marks=pytest.mark.slow),
    ],
)
def test_the_skew_of_a_continuous_condition_shrinks_with_the_weight(weight, skew, error):
    """Correlation of x0 and c at 1,024 points, where x1 = (5 c, 0) + 0.3 n for c ~ N(0, 1)."""
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 1024, 2))
    c = rng.standard_normal(1024)
    x1 = np.stack([5 * c, 0 * c], axis=1) + 0.3 * noise
    x0, x1, c = (jnp.asarray(x, jnp.float32) for x in (x0, x1, c))
    paired = jax.jit(fm.conditional_ot(c, weight))(KEY, x0, x1)
    assert abs(np.corrcoef(paired[:, 0], c)[0, 1] - skew) < error


@pytest.mark.slow
def test_a_permutation_in_its_dtype_and_gradients_follow():
    x0, x1, labels = draw(12)
    for conditions, weight in ((labels, np.inf), (labels.astype(jnp.float32), 1.0)):
        coupling = fm.conditional_ot(conditions, weight)
        for dtype in (jnp.bfloat16, jnp.float32):
            paired = coupling(KEY, x0.astype(dtype), x1.astype(dtype))
            assert paired.dtype == dtype
            same = np.sort(np.asarray(paired, np.float32), axis=0)
            np.testing.assert_array_equal(same, np.sort(x0.astype(dtype).astype("f4"), axis=0))
        of_x1 = jax.grad(lambda x, coupling=coupling: jnp.sum(coupling(KEY, x0, x)))(x1)
        np.testing.assert_array_equal(of_x1, 0)


@pytest.mark.slow
def test_labels_that_are_traced_and_a_batch_of_batches():
    x0, x1, labels = draw(24)
    x0, x1, labels = (x.reshape(2, 12, *x.shape[1:]) for x in (x0, x1, labels))

    def pair(x0, x1, labels):
        return fm.conditional_ot(labels)(KEY, x0, x1)

    want = np.stack([pair(*args) for args in zip(x0, x1, labels, strict=True)])
    np.testing.assert_array_equal(jit(jax.vmap(pair))(x0, x1, labels), want)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [np.inf, 2.0])
def test_on_the_device_it_is_the_optimum_to_rounding(weight, monkeypatch):
    """What other platforms run, here on a CPU."""
    x0, x1, labels = draw(30)
    want = fm.conditional_ot(labels, weight)(KEY, x0, x1)

    def on_device(*args, cpu, default):
        del cpu
        return default(*args)

    monkeypatch.setattr(conditional.jax.lax, "platform_dependent", on_device)
    np.testing.assert_array_equal(fm.conditional_ot(labels, weight)(KEY, x0, x1), want)


def test_what_is_not_finite_comes_out_as_nan():
    x0, x1, labels = draw(8)
    bad = x1.at[3, 1].set(np.nan)
    assert np.isnan(jit(fm.conditional_ot(labels))(KEY, x0, bad)).all()
    c = jnp.arange(8.0).at[2].set(np.inf)
    assert np.isnan(jit(fm.conditional_ot(c, 1.0))(KEY, x0, x1)).all()


def test_bad_input_is_refused():
    x0, x1, labels = draw(8)
    for wrong in (labels[:5], jnp.zeros((), int)):
        with pytest.raises(ValueError, match="must be those of this batch"):
            fm.conditional_ot(wrong)(KEY, x0, x1)
    for weight in (-1.0, np.nan, None, "1"):
        with pytest.raises(ValueError, match="weight must be a number, 0 or more; got"):
            fm.conditional_ot(labels, weight)
    fm.conditional_ot(labels.astype(float), np.float32(3))
    with pytest.raises(ValueError, match="weight must be finite for continuous conditions"):
        fm.conditional_ot(jnp.arange(8.0))
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        fm.conditional_ot(labels)(KEY, x0, x1[:5])
    assert fm.conditional_ot(labels[:0])(KEY, x0[:0], x1[:0]).shape == (0, 2)
