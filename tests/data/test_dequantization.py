"""Bounds on discrete probabilities against exact ones, and the errors that are reported of them.

The model is a Gaussian with a known flow; an image of levels then has the probability of its box,
in closed form where the pixels are independent.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianFlow, jit
from scipy import stats

import fmjax as fm
from fmjax.data import dequantization, pixels
from fmjax.evaluation import densities

KEY = jax.random.key(0)
SHAPE = (8, 8, 3)
DIM = 192
LEVEL = 2 / 256  # the width of a level in x


def images_and_flow(num, std_in_levels, seed=0):
    """Images of independent normal pixels, `[num, 8, 8, 3]` uint8, and the flow of the normal."""
    rng = np.random.default_rng(seed)
    mean = rng.uniform(-0.5, 0.5, SHAPE)
    flow = GaussianFlow(mean, np.full(SHAPE, std_in_levels * LEVEL))
    x = mean + flow.std * rng.standard_normal((num, *SHAPE))
    levels = np.floor((x + 1) / LEVEL)
    assert levels.min() >= 0 and levels.max() <= 255
    return jnp.asarray(levels.astype(np.uint8)), flow


def exact_bits(images, flow):
    """-log2 P(v) / D of each image, from the normal distribution function: `[num]`."""
    low = np.asarray(images, np.float64) * LEVEL - 1
    cdf = functools.partial(stats.norm.cdf, loc=flow.mean, scale=flow.std)
    return -np.log2(cdf(low + LEVEL) - cdf(low)).reshape(len(images), -1).mean(1)


def bits(log_weights):
    bound = dequantization.importance_weighted_bound(log_weights)
    return np.asarray(fm.bits_per_dim(bound, SHAPE, num_levels=256, low=0.0, high=256.0))


def log_weights(log_prob, dequantizer, images, num_draws):
    """`[num_draws, num]`."""

    def one(key):
        x, log_q = dequantizer(key, images)
        return log_prob(x) - log_q

    return jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(KEY, num_draws))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [dequantization.uniform_dequantizer, dequantization.truncated_normal_dequantizer]
)
def test_another_range_is_the_same_draw_moved(make):
    """x' = low + (high - low) (x + 1) / 2; its density is lower by the slope in each dimension."""
    images, (low, high) = jnp.full((2, *SHAPE), 255, jnp.uint8), pixels.centred_range()
    x, log_q = make()(KEY, images)
    moved, log_q_moved = make(low=low, high=high)(KEY, images)
    slope = (high - low) / 2
    np.testing.assert_allclose(moved, low + slope * (x + 1), atol=1e-6)
    np.testing.assert_allclose(log_q_moved, log_q - DIM * np.log(slope), rtol=1e-5)


DEQUANTIZERS = {
    "uniform": dequantization.uniform_dequantizer(),
    "narrow": dequantization.truncated_normal_dequantizer(std=0.3),
    "wide": dequantization.truncated_normal_dequantizer(std=2.0),
}


@pytest.mark.parametrize("name", DEQUANTIZERS)
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_draws_stay_in_their_box_and_have_the_density_that_is_claimed(name, num_levels):
    make = {
        "uniform": dequantization.uniform_dequantizer,
        "narrow": functools.partial(dequantization.truncated_normal_dequantizer, std=0.3),
        "wide": functools.partial(dequantization.truncated_normal_dequantizer, std=2.0),
    }[name]
    levels = jnp.tile(jnp.arange(num_levels, dtype=jnp.uint8), 40_000 // num_levels)[:, None]
    x, log_q = map(np.asarray, jit(make(num_levels))(KEY, levels))
    u = ((x.astype(np.float64) + 1) * num_levels / 2 - np.asarray(levels))[:, 0]
    assert u.min() >= 0 and u.max() < 1
    std = {"uniform": np.inf, "narrow": 0.3, "wide": 2.0}[name]
    law = (
        stats.uniform()
        if name == "uniform"
        else stats.truncnorm(-0.5 / std, 0.5 / std, loc=0.5, scale=std)
    )
    assert stats.kstest(u, law.cdf).pvalue > 1e-3
    np.testing.assert_allclose(log_q, law.logpdf(u) + np.log(num_levels / 2), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_bits_per_dim_agree_with_the_truth():
    """Levels much narrower than the density: no gap to speak of, one draw is enough."""
    images, flow = images_and_flow(400, std_in_levels=12.0)
    log_prob = functools.partial(fm.log_prob, flow.velocity, divergence=diagonal_trace)
    got = bits(log_weights(log_prob, DEQUANTIZERS["uniform"], images, 1)).astype(np.float64)
    truth = exact_bits(images, flow)
    entropy = np.log2(12.0 * np.sqrt(2 * np.pi * np.e))  # of the pixels, 5.63 bits
    standard_error = got.std(ddof=1) / np.sqrt(len(got))
    assert abs(got.mean() - entropy) < 2 * standard_error
    # Image by image, where only the draw is random, the gap itself: 1 / (24 s^2) nats a pixel.
    difference = got - truth
    gap = 1 / (24 * 12.0**2) / np.log(2)
    assert abs(difference.mean() - gap) < 3 * difference.std() / np.sqrt(len(got)) < 0.001


def diagonal_trace(velocity, t, x):
    """The divergence of a velocity whose pixels don't see one another, in one product."""
    u, slope = jax.jvp(lambda x: velocity(t, x), (x,), (jnp.ones_like(x),))
    return u, slope.sum((1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEQUANTIZERS)
def test_the_bound_tightens_with_draws_and_holds(name):
    """Levels as wide as two thirds of the density's standard deviation, where the gap shows.

    16 pixels of each image count here: the draws that close the gap grow exponentially with D.
    """
    images, flow = images_and_flow(200, std_in_levels=1.5)
    images = images[:, :4, :4, :1]
    flow = GaussianFlow(flow.mean[:4, :4, :1], flow.std[:4, :4, :1])

    def log_prob(x):
        z = (x - flow.mean.astype("f")[None]) / flow.std.astype("f")[None]
        return (jax.scipy.stats.norm.logpdf(z) - np.log(flow.std).astype("f")[None]).sum((1, 2, 3))

    weights = log_weights(log_prob, DEQUANTIZERS[name], images, 1024)
    truth = exact_bits(images, flow) * 16 * np.log(2)  # nats

    def gap(num_draws):
        groups = weights.reshape(num_draws, -1, len(images))
        bound = dequantization.importance_weighted_bound(groups)
        return float((-np.asarray(bound, np.float64).mean(0) - truth).mean())

    gaps = [gap(k) for k in (1, 4, 32, 1024)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] - 0.01 and gaps[2] > 0.0, gaps
    assert abs(gaps[3]) < 0.02 and gaps[0] > 0.1, gaps
    if name == "uniform":  # KL(uniform || p on the box), 1 / (24 s^2) a pixel to leading order
        u = (np.arange(4096) + 0.5) / 4096
        x = (np.asarray(images, np.float64)[..., None] + u) * LEVEL - 1
        log_p = stats.norm.logpdf(x, flow.mean[..., None], flow.std[..., None]) + np.log(LEVEL)
        want = -log_p.mean(-1).reshape(len(images), -1).sum(1) - truth
        assert abs(gaps[0] - want.mean()) < 0.02, (gaps[0], want.mean())


def correlated_flow(rng):
    """A normal over 3x8x8 images whose pixels hang together; its velocity, mean and covariance."""
    rotation, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    std = np.geomspace(6, 40, DIM) * LEVEL
    mean = rng.uniform(-0.1, 0.1, DIM)
    basis, variance = jnp.asarray(rotation, jnp.float32), jnp.asarray(std**2, jnp.float32)[None]
    centre = jnp.asarray(mean, jnp.float32)[None]

    def velocity(t, x):
        y = (x.reshape(-1, DIM) - t * centre) @ basis
        y = y * (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
        return (y @ basis.T + centre).reshape(x.shape)

    return velocity, mean, (rotation * std) @ rotation.T, std


@pytest.mark.slow
def test_hutchinson_agrees_with_exact_and_its_intervals_cover():
    """On 3x8x8 images: 200 repetitions of 32 images, one probe, one draw each.

    Quantised and dequantised again, x has its covariance C plus 1/6 of a squared level (Sheppard),
    so the bound's expectation is that of a Gaussian and known to far below the error.
    """
    rng = np.random.default_rng(1)
    velocity, mean, root, std = correlated_flow(rng)
    repetitions, num = 200, 32
    x = mean + rng.standard_normal((repetitions * num, DIM)) @ root
    levels = np.floor((x + 1) / LEVEL)
    assert levels.min() >= 0 and levels.max() <= 255
    images = jnp.asarray(levels.reshape(-1, *SHAPE).astype(np.uint8))
    nats = 0.5 * np.sum(np.log(2 * np.pi * std**2) + 1 + LEVEL**2 / 6 / std**2)
    truth = (nats / DIM - np.log(LEVEL)) / np.log(2)

    def solve(divergence):
        x, log_q = dequantization.uniform_dequantizer()(jax.random.key(3), images)
        log_p = jit(lambda x: fm.log_prob(velocity, x, divergence=divergence, num_steps=12))(x)
        return bits((log_p - log_q[(None,) * (log_p.ndim - 1)])[None]).astype(np.float64)

    one = solve(fm.hutchinson_divergence(KEY)).reshape(repetitions, num)
    intervals = [densities.interval(bits[None])[0] for bits in one]
    covered = np.mean([abs(i.value - truth) < 1.96 * i.standard_error for i in intervals])
    assert 0.90 <= covered <= 0.99, covered

    # Against the exact trace, which is the same at every place here: sixteen probes, an image's
    # own error from their spread.
    images = images[:128]
    estimates, exact = solve(fm.hutchinson_estimates(KEY, 16)), solve(fm.exact_divergence(64))
    error = estimates.std(0, ddof=1) / 4
    z = (estimates.mean(0) - exact) / error
    assert np.mean(np.abs(z) < stats.t(15).ppf(0.975)) > 0.88, z
    assert abs(z.mean()) < 4 * np.sqrt(15 / 13 / len(z))
    assert 1e-4 < error.mean() < 0.1  # in bits/dim: there was something to estimate


def test_errors():
    images = jnp.zeros((1, 2, 2, 1), jnp.uint8)
    with pytest.raises(ValueError, match="must be integers"):
        dequantization.uniform_dequantizer()(KEY, images.astype(jnp.float32))
    for std in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="std must be positive"):
            dequantization.truncated_normal_dequantizer(std=std)
    with pytest.raises(ValueError, match="num_levels must be from 2"):
        dequantization.truncated_normal_dequantizer(300)(KEY, images)
    for bad in (jnp.zeros(()), jnp.zeros((0, 3))):
        with pytest.raises(ValueError, match="K of at least 1"):
            dequantization.importance_weighted_bound(bad)
