"""Entropic plans against closed forms, and the pairs that are drawn from them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture

import fmjax as fm
from fmjax import couplings
from fmjax.couplings.sinkhorn import draw_rows
from fmjax.training import sharding

KEY = jax.random.key(0)


def draw(shape, seed=0):
    x0, x1 = np.random.default_rng(seed).standard_normal((2, *shape))
    return jnp.asarray(x0, jnp.float32), jnp.asarray(x1, jnp.float32)


def plan_of(x0, x1, epsilon, **options):
    """In float64, in one unoptimised program."""
    with jax.enable_x64(True):
        x0, x1 = (jnp.asarray(np.asarray(x, np.float64)) for x in (x0, x1))
        options = {k: np.asarray(v, np.float64) if k[0] == "w" else v for k, v in options.items()}
        plan = jit(lambda x0, x1: couplings.entropic_plan(x0, x1, epsilon, **options))(x0, x1)
        assert plan.dtype == np.float64
    return np.asarray(plan)


@pytest.mark.parametrize("sigma", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_the_plan_between_gaussians_is_the_schroedinger_bridges(sigma):
    """Weights on a grid: cov(x0, x1) = (sqrt(4 + sigma^4) - sigma^2) / 2 for unit variances."""
    grid = np.linspace(-6, 6, 121)[:, None]
    weights = np.exp(-0.5 * grid[:, 0] ** 2)
    weights = weights / weights.sum()
    plan = plan_of(grid, grid, 2 * sigma**2, weights0=weights, weights1=weights, threshold=1e-9)
    x = grid[:, 0]
    want = (np.sqrt(4 + sigma**4) - sigma**2) / 2
    np.testing.assert_allclose(x @ plan @ x, want, atol=1e-7)
    np.testing.assert_allclose(plan.sum(0), weights, atol=1e-8)


def test_two_points_by_hand():
    """x in {0, 1} on both sides: P_00 / P_01 = exp(1 / epsilon)."""
    x = jnp.array([[0.0], [1.0]])
    for epsilon in (0.2, 1.0, 30.0):
        plan = plan_of(x, x, epsilon, threshold=1e-12)
        np.testing.assert_allclose(plan.sum(), 1, rtol=1e-9)
        np.testing.assert_allclose(np.log(plan[0, 0] / plan[0, 1]), 1 / epsilon, rtol=1e-9)


@pytest.mark.slow
def test_a_small_epsilon_gives_the_assignment_and_a_large_one_independence():
    x1, noise = draw((20, 2))
    x0 = (jnp.arange(20.0)[:, None] + 0.1 * x1)[::-1]
    x1 = jnp.arange(20.0)[:, None] + 0.1 * noise
    paired = jit(fm.sinkhorn(0.02))(KEY, x0, x1)
    np.testing.assert_array_equal(paired, fm.minibatch_ot(KEY, x0, x1))
    small, large = (couplings.coupling_entropy(plan_of(x0, x1, e)) for e in (0.02, 1e6))
    assert small < 1e-3 and large > 1 - 1e-5  # the rounding of float32


@pytest.mark.slow
def test_costs_are_absolute_and_centred():
    """The plan of moved sets is the same; that of scaled ones has epsilon scaled by the square."""
    x0, x1 = draw((16, 3))
    plan = couplings.entropic_plan
    want = plan(x0, x1, 1.0)
    moved = couplings.entropic_plan(x0 + 1024.0, x1 - 512.0, 1.0)
    np.testing.assert_allclose(moved, want, rtol=2e-3)  # float32 rounds the points by 6e-5
    for scale in (2.0**60, 2.0**-60):
        np.testing.assert_allclose(
            couplings.entropic_plan(scale * x0, scale * x1, scale**2), want, rtol=1e-5
        )


def test_draws_follow_the_plan():
    x0, x1 = draw((4, 1))
    plan, num = plan_of(x0, x1, 2.0, threshold=1e-5), 8000
    pair = jit(jax.vmap(fm.sinkhorn(2.0, threshold=1e-5), (0, None, None)))
    drawn = np.asarray(pair(jax.random.split(KEY, num), x0, x1))
    for i in range(4):
        share = (drawn == np.asarray(x0)[i]).all(-1).mean(0)
        np.testing.assert_allclose(share, 4 * plan[i], atol=4 * np.sqrt(0.25 / num))


def test_rows_of_no_mass_are_never_drawn():
    mass = jnp.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1e-30]])
    rows = jax.vmap(lambda key: draw_rows(key, mass))(jax.random.split(KEY, 2000))
    np.testing.assert_array_equal(rows, np.broadcast_to([1, 0, 2], (2000, 3)))


@pytest.mark.slow
def test_source_keeps_its_law_and_x1_its_place():
    """At n = 256 half to two thirds of x0 are drawn; their mean is that of x0, to 4 errors."""
    x0, x1 = draw((256, 2))
    paired = np.asarray(jit(fm.sinkhorn(0.2))(KEY, x0, x1))
    assert paired.shape == x1.shape and {*map(tuple, paired)} <= {*map(tuple, np.asarray(x0))}
    assert 0.5 < len({*map(tuple, paired)}) / 256 < 0.9
    assert np.abs(paired.mean(0) - np.asarray(x0).mean(0)).max() < 4 / 16
    closer = np.square(paired - x1).sum(1).mean() / np.square(x0 - x1).sum(1).mean()
    assert closer < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_jit_is_eager_and_dtypes_are_kept(dtype):
    x0, x1 = (x.astype(dtype) for x in draw((12, 2, 3)))
    coupling = fm.sinkhorn(1.0)
    paired = coupling(KEY, x0, x1)
    assert (paired.shape, paired.dtype) == (x0.shape, dtype)
    np.testing.assert_array_equal(jax.jit(coupling)(KEY, x0, x1), paired)


@pytest.mark.slow
def test_vmap_is_the_loop():
    x0, x1 = draw((3, 10, 2))
    keys, coupling = jax.random.split(KEY, 3), fm.sinkhorn(0.5)
    want = [jit(coupling)(*args) for args in zip(keys, x0, x1, strict=True)]
    np.testing.assert_array_equal(jit(jax.vmap(coupling))(keys, x0, x1), np.stack(want))


@pytest.mark.slow
def test_gradients_follow_the_rows_alone():
    x0, x1 = draw((8, 2))
    coupling = fm.sinkhorn(0.5)
    of_x0, of_x1 = jit(jax.grad(lambda *x: jnp.sum(coupling(KEY, *x)), (0, 1)))(x0, x1)
    paired = np.asarray(coupling(KEY, x0, x1))
    count = [(paired == row).all(1).sum() for row in np.asarray(x0)]
    np.testing.assert_array_equal(of_x0[:, 0], count)
    np.testing.assert_array_equal(of_x1, 0)


@pytest.mark.parametrize("which", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_what_is_not_finite_comes_out_as_nan(which):
    pair = list(draw((8, 2)))
    pair[which] = pair[which].at[3, 1].set(np.inf)
    assert np.isnan(jit(fm.sinkhorn(1.0))(KEY, *pair)).all()
    assert np.isnan(plan_of(*pair, 1.0)).all()


@pytest.mark.slow
def test_eight_devices_agree_with_one_and_split_the_plan():
    """The batch split over eight devices: the same pairs, and an eighth of the matrices each."""
    mesh = sharding.make_mesh()
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    coupling = fm.sinkhorn(0.5)
    x0, x1 = draw((512, 4))
    want = jax.jit(coupling)(KEY, x0, x1)
    pair = jax.jit(coupling, in_shardings=(whole, split, split), out_shardings=split)
    args = KEY, *jax.device_put((x0, x1), split)
    got = pair(*args)
    assert got.sharding == split
    np.testing.assert_array_equal(got, want)
    temporary = [
        jax.jit(coupling, in_shardings=(whole, sharded, sharded)).lower(KEY, x0, x1).compile()
        for sharded in (split, whole)
    ]
    temporary = [program.memory_analysis().temp_size_in_bytes for program in temporary]
    assert temporary[0] < 0.3 * temporary[1], temporary
    hard = jax.jit(fm.sinkhorn(1e-4, max_iterations=10), in_shardings=(whole, split, split))
    assert np.isnan(hard(*args)).all()


@pytest.mark.slow
def test_a_plan_that_does_not_converge_is_refused_or_nan():
    x0, x1 = draw((32, 2))
    coupling = fm.sinkhorn(1e-4, max_iterations=10)
    with pytest.raises(RuntimeError, match="Sinkhorn must converge; got .* after 10 iterations"):
        coupling(KEY, x0, x1)
    assert np.isnan(jit(coupling)(KEY, x0, x1)).all()
    pairing = couplings.unbalanced(1e-4, np.inf, np.inf, max_iterations=10)
    with pytest.raises((RuntimeError, ValueError), match="Sinkhorn must converge"):
        jax.block_until_ready(jit(pairing)(KEY, x0, x1))


# Unbalanced.


@pytest.mark.parametrize("tau0, tau1", [(1.0, 3.0), (5.0, np.inf)])
def test_the_mass_between_two_points_is_the_closed_forms(tau0, tau1):
    """m minimises m c + eps KL(m | a b) + tau0 KL(m | a) + tau1 KL(m | b): a weighted mean of
    logarithms. Far apart and far from the origin."""
    a, b, epsilon, tau = 0.7, 2.0, 0.5, np.array([tau0, tau1])
    x0, x1 = jnp.array([[100.0, 1.0]]), jnp.array([[101.0, 0.5]])
    plan = plan_of(
        x0, x1, epsilon, tau0=tau0, tau1=tau1, weights0=[a], weights1=[b], threshold=1e-7
    )
    if np.isinf(tau1):
        want = b
    else:
        logs = epsilon * np.log(a * b) + tau @ np.log([a, b]) - 1.25
        want = np.exp(logs / (epsilon + tau.sum()))
    np.testing.assert_allclose(plan.item(), want, rtol=1e-6)


@pytest.mark.parametrize("tau", [0.5, pytest.param(10.0, marks=pytest.mark.slow)])
def test_unbalanced_plans_are_pots(tau):
    x0, x1 = draw((15, 2))
    x1 = x1[:11] + 1.0
    a, b = np.full(15, 1 / 15), np.linspace(1, 3, 11) / 11
    a0, a1 = (np.asarray(x, np.float64) for x in (x0, x1))
    cost = np.square(a0[:, None] - a1[None]).sum(-1)
    want = ot.unbalanced.sinkhorn_unbalanced(
        a, b, cost, 0.5, tau, reg_type="kl", stopThr=1e-12, numItermax=10_000
    )
    got = plan_of(x0, x1, 0.5, tau0=tau, tau1=tau, weights1=b, threshold=1e-10)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
def test_large_taus_are_the_balanced_plan():
    x0, x1 = draw((12, 2))
    want = plan_of(x0, x1, 1.0, threshold=1e-9)
    errors = []
    for tau in (1e3, 1e4):
        got = plan_of(x0, x1, 1.0, tau0=tau, tau1=tau, threshold=1e-9)
        errors.append(np.abs(got / want - 1).max())
    assert errors[0] < 0.02 and 8 < errors[0] / errors[1] < 12  # of first order in 1 / tau


def test_pairs_are_drawn_in_the_ratio_of_the_masses():
    """Masses 1 and 3 at one distance; 4 standard errors of the share are 0.017."""
    x0, x1 = jnp.zeros((2, 1)), jnp.array([[1.0], [-1.0]])
    pairing = couplings.unbalanced(0.1, 10.0, np.inf, weights1=[1.0, 3.0], num_pairs=10_000)
    rows0, rows1 = jit(pairing)(KEY, x0, x1)
    assert rows0.dtype == rows1.dtype == jnp.int32 and rows0.shape == (10_000,)
    assert abs(np.mean(rows1) - 0.75) < 0.017 and abs(np.mean(rows0) - 0.5) < 0.02


@pytest.mark.slow
def test_pairs_are_drawn_together():
    """Both rows, in proportion to the plan: its 12 shares to 4.5 standard errors."""
    x0, x1 = draw((4, 1))
    x0, num = x0[:3], 20_000
    want = plan_of(x0, x1, 1.0, tau0=2.0, tau1=1.0)
    want = want / want.sum()
    rows0, rows1 = jit(couplings.unbalanced(1.0, 2.0, 1.0, num_pairs=num))(KEY, x0, x1)
    share = np.histogram2d(rows0, rows1, bins=(np.arange(4), np.arange(5)))[0] / num
    assert (np.abs(share - want) < 4.5 * np.sqrt(want / num)).all()


@pytest.mark.slow
def test_an_outlier_is_left_out():
    """Balanced transport must serve it, at 400 a unit of mass; unbalanced, at tau = 1, lets go."""
    x0, x1 = draw((20, 1))
    x1 = x1.at[7].set(20.0)
    balanced, free = (
        jit(couplings.unbalanced(0.5, tau, tau, num_pairs=4000))(KEY, x0, x1)
        for tau in (np.inf, 1.0)
    )
    assert 0.03 < np.mean(balanced.rows1 == 7) < 0.07 and np.mean(free.rows1 == 7) == 0


@pytest.mark.slow
def test_sets_of_two_sizes_and_labels_at_the_rows():
    x0, x1 = draw((9, 2))[0], draw((5, 2), 1)[1]
    labels = jnp.arange(5)
    pairing: fm.Pairing = couplings.unbalanced(0.5, 5.0, 5.0)
    pairs = jit(pairing)(KEY, x0, x1)
    t = jnp.full(5, 0.25)
    sample = fm.sample_path(fm.cond_ot(), x0[pairs.rows0], x1[pairs.rows1], t)
    want = np.asarray(x1)[np.asarray(labels[pairs.rows1])] - np.asarray(x0)[pairs.rows0]
    np.testing.assert_allclose(sample.u_t, want, rtol=1e-6)


# The entropy.


@pytest.mark.parametrize("size", [1, 2, 6, 12])
def test_entropy_of_blocks(size):
    """Twelve points paired at random within blocks of `size`: E = log size / log 12."""
    plan = np.kron(np.eye(12 // size), np.ones((size, size)))
    with jax.enable_x64(True):
        got = couplings.coupling_entropy(jnp.asarray(plan[::-1]))
    np.testing.assert_allclose(got, np.log(size) / np.log(12), atol=1e-6)


def test_entropy_of_independent_weights_of_any_sum_is_one():
    a, b = jnp.array([0.1, 0.4, 0.5]), jnp.array([2.0, 1.0])
    np.testing.assert_allclose(couplings.coupling_entropy(a[:, None] * b[None]), 1, atol=1e-6)


# Bad input.


def test_without_ott_the_pip_line_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott.geometry", None)
    with pytest.raises(ValueError, match=r"need OTT-JAX.*pip install 'fmjax\[ot\]'"):
        fm.sinkhorn(1.0)(KEY, *draw((4, 2)))


@pytest.mark.parametrize("epsilon", [0, -1.0, np.nan, np.inf, None, "0.1"])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon must be a positive, finite number; got"):
        fm.sinkhorn(epsilon)
    with pytest.raises(ValueError, match="epsilon must be a positive, finite number; got"):
        couplings.unbalanced(epsilon, 1.0, 1.0)


BAD_WEIGHTS = {
    "negative": ([0.5, -0.5, 1.0, 0.0], "0 or more, and not all zero; got -0.5"),
    "zero": ([0.0] * 4, "not all zero; got zeros alone"),
    "NaN": ([1.0, np.nan, 1.0, 1.0], "got nan"),
    "a matrix": ([[1.0]], r"one for each point; got \(1, 1\)"),
    "integers": ([1, 1, 1, 1], "must be floating"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
@pytest.mark.parametrize("side", ["weights0", "weights1"])
def test_bad_weights_are_refused_before_the_training(name, side):
    weights, message = BAD_WEIGHTS[name]
    with pytest.raises(ValueError, match=f"{side} .*{message}"):
        couplings.unbalanced(0.1, 1.0, 1.0, **{side: weights})


def test_other_bad_input_is_refused():
    x0, x1 = draw((4, 2))
    with pytest.raises(ValueError, match=r"weights0 must be \[4\].*got \(3,\)"):
        couplings.unbalanced(0.1, 1.0, 1.0, weights0=[1.0, 1.0, 1.0])(KEY, x0, x1)
    with pytest.raises(ValueError, match="must have one sum; got 1 and 2"):
        couplings.entropic_plan(x0, x1, 0.1, weights1=[0.5] * 4)
    with pytest.raises(ValueError, match="tau1 must be positive"):
        couplings.unbalanced(0.1, 1.0, 0.0)
    for num_pairs in (0, 2.5):
        with pytest.raises(ValueError, match="num_pairs must be a whole number from 1 on"):
            couplings.unbalanced(1.0, 1.0, 1.0, num_pairs=num_pairs)
    with pytest.raises(ValueError, match="tau0 must be positive"):
        couplings.unbalanced(1.0, "1", 1.0)
    with pytest.raises(ValueError, match="plan must hold some mass"):
        couplings.coupling_entropy(jnp.zeros((3, 3)))
    assert np.isnan(couplings.coupling_entropy(jnp.zeros((3, 3)).at[0, 0].set(1.0)))
    with pytest.raises(ValueError, match=r"one event shape .* got shapes \(4, 2\) and \(4, 1\)"):
        couplings.entropic_plan(x0, x1[:, :1], 0.1)
    with pytest.raises(ValueError, match="at least one row"):
        couplings.entropic_plan(x0, x1[:0], 0.1)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        fm.sinkhorn(0.1)(KEY, x0, x1[:3])
    with pytest.raises(ValueError, match="max_iterations must be a positive"):
        fm.sinkhorn(0.1, max_iterations=0)
    with pytest.raises(ValueError, match="plan must be"):
        couplings.coupling_entropy(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        couplings.coupling_entropy(-jnp.ones((2, 2)))
    with pytest.raises((RuntimeError, ValueError), match="must be finite"):
        jax.block_until_ready(couplings.unbalanced(0.1, 1.0, 1.0)(KEY, x0 * np.nan, x1))
    assert fm.sinkhorn(0.1)(KEY, x0[:0], x1[:0]).shape == (0, 2)
