"""Cells of a data set against closed forms, and pools of pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy.special import ndtri

import fmjax as fm
from fmjax import couplings

KEY = jax.random.key(0)
LINE, PLANE = fm.standard_normal((1,)), fm.standard_normal((2,))


def potential(data, source, **options):
    solve = jit(lambda d: couplings.semidiscrete_potential(KEY, d, source, **options))
    return np.asarray(solve(jnp.asarray(data, jnp.float32)))


def shares(g, data, source, num=200_000, epsilon=0.0):
    """How often fresh noise chooses each row."""
    assignment = couplings.semidiscrete(jnp.asarray(g), jnp.asarray(data, jnp.float32), epsilon)
    rows = jit(assignment)(KEY, source.sample(jax.random.key(9), num))
    return np.bincount(rows, minlength=len(data)) / num


def potential_on_the_line(y):
    """Cell j is between the quantiles j / N and (j + 1) / N of the source, so that at each bound b
    (b - y_j)^2 - g_j = (b - y_j+1)^2 - g_j+1."""
    bound = ndtri(np.arange(1, len(y)) / len(y))
    steps = (bound - y[1:]) ** 2 - (bound - y[:-1]) ** 2
    g = np.concatenate([[0.0], np.cumsum(steps)])
    return g - g.mean()


@pytest.mark.parametrize("y", [[0.0], [-2.0, 0.5, 0.7, 4.0]])
def test_the_potential_on_the_line_is_the_closed_forms(y):
    y = np.array(y)
    got = potential(y[:, None], LINE, num_steps=4000)
    np.testing.assert_allclose(got, potential_on_the_line(y), atol=0.05)


def test_two_points_in_the_plane_are_cut_by_a_hyperplane():
    data = jnp.array([[3.0, 1.0], [3.0, 5.0]])
    g = jnp.array([0.0, 4.0])
    x0 = PLANE.sample(KEY, 1000)
    rows = couplings.semidiscrete(g, data)(KEY, x0)
    # |x - y_1|^2 - g_1 < |x - y_0|^2 - g_0
    want = 2 * np.asarray(x0 @ (data[1] - data[0])) > 34 - 10 - 4
    np.testing.assert_array_equal(rows, want)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [1000.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_cells_have_equal_shares(shift):
    """chi^2 = mean (N p - 1)^2 falls with the steps; without a potential it is above 1."""
    data = 2 * np.random.default_rng(0).standard_normal((40, 2)) + 1 + shift
    source = fm.Source(lambda key, num: PLANE.sample(key, num) + shift, PLANE.log_prob)

    def chi2(g):
        p, num = shares(g, data, source), 200_000
        return np.mean((40 * p - 1) ** 2) - 39 / num  # less that of so many draws

    short, long = (chi2(potential(data, source, num_steps=n)) for n in (20, 1500))
    assert chi2(np.zeros(40)) > 1 and short > 10 * long and long < 3e-3


@pytest.mark.slow
def test_a_soft_potential_is_that_of_the_entropic_problem():
    """Two points y = -1, 3 on the line: for epsilon the share of one is the mean of a logistic
    function of x, one half where g_1 - g_0 = 8 by symmetry about 0; and the cells are soft."""
    data = np.array([[-1.0], [3.0]])
    g = potential(data, LINE, num_steps=1000, epsilon=8.0)
    np.testing.assert_allclose(g, [-4, 4], atol=0.1)
    assignment = couplings.semidiscrete(
        jnp.asarray([-4.0, 4.0]), jnp.asarray(data, jnp.float32), 8.0
    )
    x0 = jnp.full((20_000, 1), 1.0)
    share = np.mean(jit(assignment)(KEY, x0))
    np.testing.assert_allclose(share, 1 / (1 + np.exp(-1.0)), atol=4 * 0.5 / np.sqrt(20_000))


def test_the_pairs_cost_what_sorted_pairs_do():
    """On the line the map is monotone; its mean cost is that of the quantiles."""
    y = np.sort(np.random.default_rng(0).standard_normal(20)) * 2
    g = jnp.asarray(potential_on_the_line(y), jnp.float32)
    x0 = jnp.sort(LINE.sample(KEY, 4000), axis=0)
    rows = np.asarray(couplings.semidiscrete(g, jnp.asarray(y[:, None], jnp.float32))(KEY, x0))
    assert (np.diff(rows) >= 0).all() and rows.dtype == np.int32
    np.testing.assert_allclose(np.bincount(rows, minlength=20) / 200, 1, atol=0.35)  # 4 s.e.


@pytest.mark.slow
def test_batches_are_rows_and_dtypes_are_kept():
    data = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 3)), jnp.float32)
    assignment = couplings.semidiscrete(jnp.zeros(6), data)
    x0 = fm.standard_normal((2, 3)).sample(KEY, 10)
    want = np.square(np.asarray(x0)[:, None] - np.asarray(data)[None]).sum((-1, -2)).argmin(1)
    np.testing.assert_array_equal(jit(assignment)(KEY, x0), want)
    each = jit(jax.vmap(lambda x: assignment(KEY, x[None])[0]))(x0)
    np.testing.assert_array_equal(each, want)
    half = couplings.semidiscrete(jnp.zeros(6), data.astype(jnp.bfloat16))
    assert half(KEY, x0.astype(jnp.bfloat16)).shape == (10,)


def test_what_is_not_finite_comes_out_as_nan():
    assert np.isnan(potential([[0.0], [np.nan]], LINE, num_steps=5)).all()


def test_bad_input_is_refused():
    data = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match=r"g must be \[N\].*got \(2,\) for data \(3, 2\)"):
        couplings.semidiscrete(jnp.zeros(2), data)
    for epsilon in (-1.0, np.inf, None):
        with pytest.raises(ValueError, match="epsilon must be a finite number, 0 or more"):
            couplings.semidiscrete(jnp.zeros(3), data, epsilon)
    with pytest.raises(ValueError, match="one event shape; got"):
        couplings.semidiscrete(jnp.zeros(3), data)(KEY, jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="one event shape; got"):
        couplings.semidiscrete_potential(KEY, data, LINE)
    with pytest.raises(ValueError, match="source must be a Source.*got the function sample"):
        couplings.semidiscrete_potential(KEY, data, PLANE.sample)
    with pytest.raises(
        ValueError, match=r"sample\(key, 1024\) must return 1024 rows; got \(1, 2\)"
    ):
        bad = fm.Source(lambda key, num: jnp.zeros((1, 2)), PLANE.log_prob)
        couplings.semidiscrete_potential(KEY, data, bad)
    with pytest.raises(ValueError, match="at least one row"):
        couplings.semidiscrete_potential(KEY, data[:0], PLANE)
    with pytest.raises(ValueError, match="num_steps must be a positive number; got 0"):
        couplings.semidiscrete_potential(KEY, data, PLANE, num_steps=0)
    with pytest.raises(ValueError, match="num_steps must be a whole number; got 5.5"):
        couplings.semidiscrete_potential(KEY, data, PLANE, num_steps=5.5)
    couplings.semidiscrete(jnp.zeros(3), data, np.float32(0.1))
    with pytest.raises(ValueError, match="a Pairing's rows"):
        couplings.pair_pool(KEY, couplings.unbalanced(0.5, 1.0, 1.0), PLANE, jnp.ones((8, 2)), 8)
    with pytest.raises(ValueError, match="batch_size must divide the pool"):
        couplings.pair_pool(KEY, fm.independent, PLANE, jnp.ones((8, 2)), 8.0)


# Pools.


@pytest.mark.slow
def test_a_pool_is_paired_in_one_and_cut():
    x1 = jnp.asarray(np.random.default_rng(0).standard_normal((24, 2)), jnp.float32)
    x0, cut = jit(lambda key, x1: couplings.pair_pool(key, fm.minibatch_ot, PLANE, x1, 6))(KEY, x1)
    assert x0.shape == cut.shape == (4, 6, 2)
    np.testing.assert_array_equal(cut.reshape(24, 2), x1)
    flat = x0.reshape(24, 2)
    np.testing.assert_array_equal(fm.minibatch_ot(KEY, flat, x1), flat)  # none is cheaper
    again = couplings.pair_pool(KEY, fm.minibatch_ot, PLANE, x1, 6)[0]
    np.testing.assert_allclose(again, x0, rtol=1e-6)  # the bank is seeded
    other = couplings.pair_pool(jax.random.fold_in(KEY, 1), fm.minibatch_ot, PLANE, x1, 6)
    assert not np.isin(other[0], x0).any()


@pytest.mark.slow
def test_a_larger_pool_is_nearer_to_the_optimum():
    """On the line E |x0 - x1|^2 falls to W_2^2 = 0 of equal normals; 2 for independent pairs."""
    x1 = LINE.sample(jax.random.key(1), 512)

    def cost(batches):
        x0, cut = couplings.pair_pool(KEY, fm.minibatch_ot, LINE, x1, 32)
        if batches:  # each batch by itself
            x0 = jax.vmap(fm.minibatch_ot, (None, 0, 0))(KEY, x0[jnp.arange(16)[::-1]], cut)
        return float(jnp.mean(jnp.square(x0 - cut)))

    assert cost(False) < 0.3 * cost(True) < 0.1


@pytest.mark.parametrize("batch_size", [0, 5, -4])
def test_a_pool_that_is_no_whole_number_of_batches_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"batch_size must divide the pool; got {batch_size}"):
        couplings.pair_pool(KEY, fm.independent, PLANE, jnp.zeros((24, 2)), batch_size)
