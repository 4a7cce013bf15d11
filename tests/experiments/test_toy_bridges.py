"""The methods with noise on the way in the table of 2-D pairs: targets, pairs, both samplers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm
from experiments import toy_bridges, toy_data, toy_flows
from experiments.benchmarks import bridge_energy
from fmjax.metrics.transport import wasserstein2

X0, X1 = np.array([[1.0, -2.0]], np.float32), np.array([[3.0, 3.0]], np.float32)


def test_the_whole_velocity_is_the_papers():
    """(1 - 2t) / (2 t (1 - t)) (x_t - mean) + x1 - x0, at the times and points drawn."""
    x0, x1 = (np.repeat(x, 64, axis=0) for x in (X0, X1))
    path = fm.brownian_bridge(1.5)
    sample = toy_bridges.draw(path, toy_bridges.INSIDE, jax.random.key(0), (x0, x1))
    t, x_t, u_t = toy_bridges.whole_velocity(path, sample)
    t = np.asarray(t, np.float64)[:, None]
    assert 1e-3 <= t.min() < 0.1 < 0.9 < t.max() <= 1 - 1e-3
    want = (1 - 2 * t) / (2 * t * (1 - t)) * (x_t - t * x1 - (1 - t) * x0) + x1 - x0
    np.testing.assert_allclose(u_t, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_entropic_pairs_are_of_the_plan_and_of_the_seed():
    """Two x0 and two x1 at squared distances 0 and d: a pair is crossed with odds exp(-d / eps)."""
    sigma, steps = 0.7, 100
    x = np.array([[0.0, 0.0], [1.0, 0.0]], np.float32)
    chunk = np.broadcast_to(x, (steps, 3, 2, 2))
    (paired, x1), (second, _) = toy_bridges.entropic((0, 1, 7), [(chunk, chunk)] * 2, sigma)
    np.testing.assert_array_equal(x1, chunk)
    crossed = np.asarray(paired[..., 0] != chunk[..., 0])
    odds = np.exp(-1 / (2 * sigma**2))  # of two crossed pairs at cost 1 each against none
    share = odds / (1 + odds)
    assert abs(crossed.mean() - share) < 4 * np.sqrt(share * (1 - share) / crossed.size)
    assert (paired[:, 0] != paired[:, 1]).any() and (paired != second).any()
    one = chunk[:, 2:]
    alone = next(toy_bridges.entropic((7,), [(one, one)], sigma))[0]
    np.testing.assert_array_equal(alone[:, 0], paired[:, 2])


def gaussian_fields(name, sigma, m, s):
    """Exact w / sigma and z_hat between N(0, I) and N(m, s^2 I), independently paired."""
    path = toy_bridges.interpolant(sigma) if name == "interpolant" else fm.brownian_bridge(sigma)

    def fields(path_, params, t, x):
        del path_, params
        gamma = path.gamma(t)
        variance = t**2 * s**2 + (1 - t) ** 2 + gamma**2
        rest = (x - t * m) / variance
        return (m + (t * s**2 - (1 - t)) * rest) / sigma, gamma * rest

    return fields


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SF2M", "interpolant"])
def test_with_exact_fields_the_samplers_end_at_the_target(name, monkeypatch):
    """Mean and deviation of N((2, -1), 0.6^2 I), from 20,000 points, by flow and by equation.

    Euler's 100 steps, the first time of 1e-3 and the noise of the last step, 0.1 sigma before it
    is drawn in, leave about a hundredth.
    """
    m, s, sigma = jnp.array([[2.0, -1.0]]), 0.6, 0.5
    monkeypatch.setattr(toy_bridges, "fields", gaussian_fields(name, sigma, m, s))
    method = toy_bridges.make.__wrapped__(name, sigma)
    x0 = jax.random.normal(jax.random.key(0), (1, 20_000, 2))
    params = jnp.zeros(1)
    ends = [
        toy_flows.solve_all(params, x0, velocity=method.velocity, times=method.times)[0, -1, :, :2]
    ]
    if name == "SF2M":
        ends.append(toy_bridges.sample_all.__wrapped__((0,), params, x0, sigma)[0])
    for end in np.asarray(ends):
        np.testing.assert_allclose(end.mean(0), m[0], atol=0.03)
        np.testing.assert_allclose(end.std(0), s, rtol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", toy_bridges.METHODS)
def test_a_shifted_gaussian_is_learnt(name):
    """From N(0, I) to N((4, 0), I / 4): W2 well below the 4.0 at which it starts."""
    rng, seeds, steps = np.random.default_rng(0), (0, 1), 600
    x0 = rng.standard_normal((steps, 2, 64, 2), np.float32)
    x1 = 0.5 * rng.standard_normal(x0.shape, np.float32) + np.array([4, 0], np.float32)
    method, chunks = toy_bridges.make(name, 1.0), [(x0, x1)]
    if name != "interpolant":
        chunks = toy_bridges.entropic(seeds, chunks, 1.0)
    params, losses = toy_flows.train(seeds, chunks, method)
    assert np.isfinite(losses).all()
    start = rng.standard_normal((2, 300, 2)).astype(np.float32)
    target = 0.5 * rng.standard_normal((300, 2)) + np.array([4, 0])
    ways = toy_flows.solve_all(params, start, velocity=method.velocity, times=method.times)
    samples = [ways[:, -1, :, :2]]
    if name == "SF2M":
        samples.append(toy_bridges.sample_all(seeds, params, start, 1.0))
    for x in np.concatenate(samples):
        assert wasserstein2(x, target) < 0.7


def test_deviations_of_the_sources():
    for sampler, deviation in toy_data.DEVIATIONS.items():
        x = sampler(np.random.default_rng(0), 100_000)
        assert abs(x.std() / deviation - 1) < 0.01
    assert {pair.source for pair in toy_data.PAIRS.values()} == set(toy_data.DEVIATIONS)


@pytest.mark.slow
def test_the_energy_without_a_network_is_that_of_two_normal_distributions():
    """x0 ~ N(0, I), x1 ~ N(m, s^2 I) independent: u is linear in x, and E|u|^2 its two moments."""
    m, s, sigma = np.array([2.0, -1.0]), 0.6, 1.0
    path = fm.brownian_bridge(sigma)
    keys = jax.random.split(jax.random.key(0), 3)

    def pairs(key, num):
        x = jax.random.normal(key, (2, num, 2))
        return x[0], s * x[1] + m[None]

    t = bridge_energy.TIMES[5:-5]  # nearer to the ends the mixture falls apart
    u = bridge_energy.velocity(path, *pairs(keys[1], 20_000))
    got = bridge_energy.energy(keys[0], path, u, *pairs(keys[2], 2000), t)
    variance = t**2 * s**2 + (1 - t) ** 2 + sigma**2 * t * (1 - t)
    slope = (2 * t * s**2 - 2 * (1 - t) + sigma**2 * (1 - 2 * t)) / (2 * variance)
    want = np.trapezoid(m @ m + 2 * slope**2 * variance, t)
    assert abs(got / want - 1) < 0.02  # three standard errors of 2,000 points
