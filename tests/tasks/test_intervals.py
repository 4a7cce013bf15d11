"""Between snapshots: pairs, lines and bridges, plans with growth, and left-out times known exactly.

The oracle is the Ornstein-Uhlenbeck process dx = A x dt + sqrt(2) s dB, normal at every time. What
straight interpolation of its outer snapshots misses at the middle one is then known too.
"""

import functools
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg, stats

import fmjax as fm
from experiments import single_cell
from experiments.benchmarks import single_cell as table
from fmjax.harness import train
from fmjax.tasks import intervals, snapshot_methods, snapshot_plans, snapshots

ROOT = pathlib.Path(__file__).parents[2]
CELLS = pathlib.Path(os.environ.get("FMJAX_DATA_DIR", ROOT.parent / "shared/data"))
CELLS = CELLS / "singlecell_time"
SIGMA = 1.5


def made(*cells, left_out=1):
    """Snapshots of these cells, at equal times."""
    facts = {"num_examples": max(map(len, cells)), "whitened by": "nothing"}
    cells = tuple(np.asarray(x, np.float32) for x in cells)
    return snapshots.Snapshots(cells, np.linspace(0, 1, len(cells)), left_out, facts)


def knots(batch=50):
    """Snapshots of one point each at 0, 1/4 and 1, as pairs."""
    x = jnp.array([[0.0, 0.0], [1.0, 2.0], [4.0, 2.0]])
    pairs = jnp.stack([x[:-1], x[1:]], axis=1)
    return x, jnp.array([0.0, 0.25, 1.0]), jnp.broadcast_to(pairs[None], (batch, 2, 2, 2))


def test_lines_are_the_broken_line_and_its_slope():
    x, ts, pairs = knots()
    key = jax.random.key(0)
    exact, noisy = jax.jit(
        lambda: [intervals.sample_lines(key, pairs, ts, fm.independent, s) for s in (0.0, 0.5)]
    )()
    t, x_t, u_t = exact
    assert t.shape == (100,) and (t[:50] <= 0.25).all() and (t[50:] >= 0.25).all()
    want = np.stack([np.interp(t, ts, x[:, d]) for d in range(2)], axis=1)
    np.testing.assert_allclose(x_t, want, atol=1e-5)
    np.testing.assert_allclose(u_t[:50], np.broadcast_to([4.0, 8.0], (50, 2)), rtol=1e-6)
    np.testing.assert_allclose(u_t[50:], np.broadcast_to([4.0, 0.0], (50, 2)), rtol=1e-6)
    np.testing.assert_array_equal(noisy.u_t, u_t)
    assert 0.4 < (noisy.x_t - x_t).std() < 0.6


def test_bridges_are_the_broken_line_with_noise_that_ends_at_every_snapshot():
    x, ts, pairs = knots()
    path = fm.brownian_bridge(SIGMA)
    sample = functools.partial(intervals.sample_bridges, coupling=fm.independent, path=path)
    mean, noise = jax.jit(sample)(jax.random.key(0), pairs, ts)
    line = np.stack([np.interp(mean.t, ts, x[:, d]) for d in range(2)], axis=1)
    s = np.interp(mean.t, ts, [0, 1, 2]) % 1
    want = line + SIGMA * np.sqrt(s * (1 - s))[:, None] * noise.u_t
    np.testing.assert_allclose(mean.x_t, want, atol=2e-5)
    np.testing.assert_allclose(mean.u_t[:50], np.broadcast_to([4.0, 8.0], (50, 2)), rtol=1e-6)
    np.testing.assert_array_equal(noise.x_t, mean.x_t)
    np.testing.assert_array_equal(noise.t, mean.t)
    assert abs(noise.u_t.std() - 1) < 4 * math.sqrt(0.5 / 200)


def test_the_flow_of_a_bridge_is_that_of_its_fields_and_finite_at_the_snapshots():
    ts, path = jnp.array([0.0, 0.25, 1.0]), fm.brownian_bridge(SIGMA)
    network = lambda t, x: (x + t, 1 - x)  # noqa: E731
    at, x = jnp.array([0.0, 0.25, 0.625, 1.0]), jnp.array([[3.0, -2.0]])
    fields = intervals.two_fields(network, ts, path)
    z_hat = np.stack([fields(t, x)[1][0] for t in at])
    want = SIGMA / 2 * np.array([0, 0, 1, 0])
    np.testing.assert_allclose(z_hat, want[:, None] * (1 - np.asarray(x)), atol=1e-6)
    velocity = intervals.bridge_velocity(network, ts, SIGMA)
    slopes = np.array([1 / 0.25, 1 / 0.75, 0, -1 / 0.75]) * SIGMA**2 / 2
    found = np.stack([velocity(t, x)[0] for t in at])
    wanted = x + np.asarray(at)[:, None] + slopes[:, None] * (1 - np.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    s = jnp.array(0.3)  # inside the second interval, in whose own time w is 0.75 times as large
    w, z = (
        (lambda s, x: 0.75 * fields(0.25 + 0.75 * s, x)[0]),
        lambda s, x: fields(0.25 + 0.75 * s, x)[1],
    )
    same = fm.bridge_flow(path, w, z)(s, x) / 0.75
    np.testing.assert_allclose(velocity(0.25 + 0.75 * s, x), same, rtol=1e-5)


@pytest.mark.slow
def test_pairs_are_fresh_and_those_of_the_coupling():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 1, 2, 1)), jnp.float32)

    def moves(key, coupling):
        ts, coupling = jnp.array([0.0, 1.0]), intervals.shuffled(coupling)
        return intervals.sample_lines(key, x, ts, coupling, 0.0).u_t

    keys = jax.random.split(jax.random.key(0))
    a, b = jax.jit(jax.vmap(lambda key: moves(key, fm.independent)))(keys)
    assert (a != b).mean() > 0.9
    best = np.sort(x[:, 0, 1], axis=0) - np.sort(x[:, 0, 0], axis=0)
    paired = jax.jit(lambda key: moves(key, fm.minibatch_ot))(keys[0])
    np.testing.assert_allclose(np.sort(paired, axis=0), np.sort(best, axis=0), atol=1e-6)


def test_the_left_out_marginal_of_an_ou_process():
    """dx = -x dt + sqrt(2) s dB from N(6, 0.5^2). Between the outer times optimal transport moves
    mean and deviation in straight lines, so that what it misses at the middle one is a distance of
    two normals."""
    rate, noise, num = np.array([0.0, 1.0, 2.0]), 1.5, 500
    means = 6 * np.exp(-rate)
    stds = np.sqrt(0.25 * np.exp(-2 * rate) + noise**2 * (1 - np.exp(-2 * rate)))
    z = stats.norm.ppf((np.arange(num) + 0.5) / num)[:, None]  # quantiles: no noise of drawing
    data = made(*(m + s * z for m, s in zip(means, stds, strict=True)))

    def velocity(t, x):
        mean, std = (v[0] + t * (v[2] - v[0]) for v in (means, stds))
        return means[2] - means[0] + (stds[2] - stds[0]) / std * (x - mean)

    moved = jax.jit(lambda: intervals.move(data, velocity))()
    found = intervals.left_out_figures(data, {"flow": moved})
    between = (means[0] + means[2]) / 2, (stds[0] + stds[2]) / 2
    want = np.abs(between[0] - means[1] + (between[1] - stds[1]) * z).mean()
    still = np.abs(means[0] - means[1] + (stds[0] - stds[1]) * z).mean()
    assert want > 1  # the straight line misses the curve
    # Exact cells, linear in time: Euler has no error but rounding.
    np.testing.assert_allclose(found["w1"], want, rtol=1e-4)
    np.testing.assert_allclose(found["w1_still"], still, rtol=1e-4)


def stationary(num, angle=1.2, decay=0.3):
    """Cells of an OU process whose mean turns and shrinks while its covariance stays I.

    A = -decay I + angle J per time between snapshots, with the stationary noise s^2 = decay.
    """
    turn = linalg.expm(np.array([[-decay, -angle], [angle, -decay]]))
    means = [np.linalg.matrix_power(turn, k) @ [3.0, 0.0] for k in range(3)]
    z = np.random.default_rng(0).standard_normal((num, 2))
    z = (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T, ddof=0))).T
    return means, made(*(z + mean for mean in means))


def test_a_rotating_mean_is_missed_by_the_sagitta():
    """Of two translates W_1 is the distance of their means, here |(m_0 + m_2) / 2 - m_1|."""
    means, data = stationary(200)
    slope = jnp.asarray(means[2] - means[0], jnp.float32)
    moved = intervals.move(data, lambda t, x: jnp.broadcast_to(slope[None], x.shape))
    want = np.linalg.norm((means[0] + means[2]) / 2 - means[1])
    found = intervals.left_out_figures(data, {"flow": moved})["w1"]
    np.testing.assert_allclose(found, want, rtol=1e-5)


BOTH = math.sqrt(4 + SIGMA**4)


def exact_network(means):
    """(w, r) of the Schroedinger bridge between N(m_0, I) and N(m_2, I); linear in x."""
    start, slope = (jnp.asarray(m, jnp.float32)[None] for m in (means[0], means[2] - means[0]))
    covariance = (BOTH - SIGMA**2) / 2

    def network(t, x):
        variance = (1 - t) ** 2 + t**2 + t * (1 - t) * BOTH
        z = (x - start - t * slope) / variance
        return slope + (2 * t - 1) * (1 - covariance) * z, z

    return network


def test_the_flow_and_the_equation_of_a_bridge_have_its_variance_at_the_left_out_time():
    """The exact fields of the Gaussian Schroedinger bridge: at the middle the variance is
    1/2 + sqrt(4 + sigma^4) / 4 where the OU process has 1: what the wrong reference costs."""
    means, data = stationary(4000)
    network, ts = exact_network(means), intervals.trained_times(data)
    path, variance = fm.brownian_bridge(SIGMA), 0.5 + BOTH / 4
    fields = intervals.two_fields(network, ts, path)

    @jax.jit
    def both(key):
        flow = intervals.move(data, intervals.bridge_velocity(network, ts, SIGMA))
        return flow, intervals.move_by_noise(data, fields, path, SIGMA, key)

    middle, num = (means[0] + means[2]) / 2, len(data.cells[0])
    flow, noisy = (np.asarray(x, np.float64) for x in both(jax.random.key(0)))
    # The flow's error is Euler's at 100 steps.
    np.testing.assert_allclose(flow.mean(0), middle, atol=5e-3)
    np.testing.assert_allclose(flow.var(0), variance, rtol=3e-3)
    error = math.sqrt(variance / num)
    assert abs(noisy.mean(0) - middle).max() < 4 * error
    assert abs(noisy.var(0) - variance).max() < 4 * variance * math.sqrt(2 / num)
    assert variance - 1 > 8 * variance * math.sqrt(2 / num)


@pytest.mark.parametrize("sampler", ["flow", "sde"])
@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow) for m in ("i-cfm", "sf2m-entropic")],
)
def test_trained_methods_predict_the_moments_of_their_interpolation(method, sampler):
    """On 2,000 cells of the rotating process, four seeds: the middle of the outer means; variance
    1/2 + sigma^2 of independent pairs, or that of the Schroedinger bridge."""
    if method == "i-cfm" and sampler == "sde":
        pytest.skip("lines have no noise")
    moved, middle, variance = trained(method)
    x = np.asarray(moved[sampler], np.float64)
    # What training leaves, of a deviation of about 1; the equation's noise adds its standard error.
    drawn = 4 / math.sqrt(len(x)) if sampler == "sde" else 0
    np.testing.assert_allclose(x.mean(0), middle, atol=0.06 + drawn * math.sqrt(variance))
    np.testing.assert_allclose(x.var(0).mean(), variance, rtol=0.08 + drawn)


@functools.cache
def trained(method):
    means, data = stationary(2000)
    sigma = {"i-cfm": 0.1, "sf2m-entropic": SIGMA}[method]
    flags = single_cell.Config(
        data=pathlib.Path("none.npz"), method=method, sigma=sigma, plan_cells=2000
    )
    learn = snapshot_methods.make_method(flags, data, table.MODEL)
    pairs, _ = snapshot_methods.make_pairs(flags, data)
    config = table.Config(seeds=(0, 1, 2, 3), num_steps=1500, batch_size=128, chunk_steps=500)
    params, _ = table.train(config, learn, [pairs] * 4)
    moved = jax.jit(jax.vmap(learn.moved))(params, jax.random.split(jax.random.key(0), 4))
    variance = {"i-cfm": 0.5 + sigma**2, "sf2m-entropic": 0.5 + BOTH / 4}
    return (
        {n: x.reshape(-1, 2) for n, x in moved.items()},
        (means[0] + means[2]) / 2,
        variance[method],
    )


def test_pairs_of_a_plan_are_drawn_in_its_proportions():
    data = made(np.arange(2.0)[:, None], np.zeros((1, 1)), 10 + np.arange(3.0)[:, None])
    mass = np.array([[0.0, 1.0, 2.0], [4.0, 0.0, 1.0]]) / 5
    plan = snapshot_plans.Plan(np.arange(2), np.arange(3), mass)
    pairs = snapshot_plans.pairs_of_plans(data, [plan], 20_000, 0)
    assert pairs.shape == (20_000, 1, 2, 1)
    counts = np.zeros((2, 3))
    np.add.at(counts, (pairs[:, 0, 0, 0].astype(int), pairs[:, 0, 1, 0].astype(int) - 10), 1)
    p = mass / mass.sum()
    assert (abs(counts / 20_000 - p) <= 4 * np.sqrt(p * (1 - p) / 20_000)).all()
    rows, grown = snapshot_plans.growth(data, [plan])
    np.testing.assert_array_equal(rows, [0, 1])
    np.testing.assert_allclose(grown, [6 / 5, 2.0])


@pytest.mark.slow
def test_a_plan_with_free_earlier_weights_finds_who_grew():
    """Cells at 0 and at 5, as many of each; later three times as many at 5. No mass need cross
    where the cells at 5 may grow to 3/2 and the others shrink to 1/2."""
    at = np.array([0.0, 5.0])
    before, after = np.repeat(at, 8)[:, None], np.repeat(at, [4, 12])[:, None]
    data = made(before, np.zeros((1, 1)), after)
    (plan,) = snapshot_plans.solve_plans(data, 1.0, 0.5, most=16, seed=0)
    across = plan.mass[:8, 4:].sum() + plan.mass[8:, :4].sum()
    assert across < 1e-6
    _, grown = snapshot_plans.growth(data, [plan])
    within = 4 * snapshot_plans.THRESHOLD
    np.testing.assert_allclose([grown[:8].mean(), grown[8:].mean()], [0.5, 1.5], atol=within)


@pytest.mark.slow
@pytest.mark.skipif(not CELLS.exists(), reason="needs the cells in FMJAX_DATA_DIR")
def test_unbalanced_pairs_of_ten_gaussian_dimensions_stay_in_their_cluster():
    """400 cells below become 400, 100 above become 1,000: no pair need cross, and growth is what
    the counts say. Kept weights must carry the difference of the shares across."""
    cells, times = snapshots.load(CELLS / "gaussian_10d.csv")
    data = made(cells[times == 0], cells[:1], cells[times == 1])
    found = {}
    for tau0 in (math.inf, 0.3):
        (plan,) = snapshot_plans.solve_plans(data, 0.1, tau0, most=200, seed=0)
        above0 = data.cells[0][plan.rows0][:, 1] > 1
        above1 = data.cells[2][plan.rows1][:, 1] > 1
        across = plan.mass[np.ix_(above0, ~above1)].sum() + plan.mass[np.ix_(~above0, above1)].sum()
        _, grown = snapshot_plans.growth(data, [plan])
        found[tau0] = across, grown[above0].mean(), grown[~above0].mean()
    share0, share1 = above0.mean(), above1.mean()
    assert share1 - share0 > 0.4
    within = snapshot_plans.THRESHOLD
    np.testing.assert_allclose(found[math.inf][0], share1 - share0, atol=within)
    across, up, down = found[0.3]
    assert across < within
    np.testing.assert_allclose(up, share1 / share0, rtol=2 * within / share0)
    np.testing.assert_allclose(down, (1 - share1) / (1 - share0), rtol=2 * within / (1 - share1))


def test_weighted_figures_follow_the_cells_that_grew():
    """Cells stay at 0 and 5; later three quarters are at 5: weights take the distance to 0."""
    before, there = np.array([[0.0], [5.0]]), np.array([[0.0], [5.0], [5.0], [5.0]])
    data = made(before, there, there)
    found = intervals.left_out_figures(
        data, {"flow": before}, (np.arange(2), np.array([0.5, 1.5]))
    )  # fmt: skip
    np.testing.assert_allclose([found["w1"], found["w1_weighted"]], [1.25, 0], atol=1e-12)


def test_sigma_is_refused_where_it_cant_be():
    _, data = stationary(10)
    for method, sigma in (("i-cfm", -0.1), ("i-cfm", math.inf), ("sf2m-exact", 0.0)):
        flags = single_cell.Config(data=pathlib.Path("none.npz"), method=method, sigma=sigma)
        with pytest.raises(ValueError, match="sigma must be"):
            snapshot_methods.make_method(flags, data, table.MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ot-cfm", "unbalanced", "sf2m-entropic"])
def test_a_run_predicts_the_time_that_was_left_out(tmp_path, method):
    rng = np.random.default_rng(0)
    x, k = rng.standard_normal((900, 2)) * [1.0, 10.0], np.repeat([0, 1, 2], 300)
    x[:, 0] += 3 * k
    np.savez(tmp_path / "cells.npz", pcs=x, sample_labels=k)
    flags = single_cell.Config(
        data=tmp_path / "cells.npz", method=method, num_steps=600, checkpoint_every=600,
        workdir=tmp_path / "run",
    )  # fmt: skip
    summary = train(flags, single_cell.make_task)
    assert summary["w1"] < 0.35 * summary["w1_still"]
    assert ("w1_weighted" in summary) == (method == "unbalanced")
    assert ("w1_sde" in summary) == (method == "sf2m-entropic")
    assert "time 1 left out; 300 true cells" in summary["w1_method"]
