"""Theorem 2, what it does not say, and the target (x1 - x0) / t of many tutorials.

Between N(0, 1) and N(m, s^2), independently paired, all is known along cond_ot: the conditional
velocity has the variance s^2 / S_t given x_t, whose integral over t in [0, 1] is pi s / 2.

Sources: Lipman et al. 2022, arXiv 2210.02747 (theorem 2); Tong et al. 2023, arXiv 2302.00482 (for
any coupling).
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import JointNormals, gaussian_velocity, jit, schroedinger_covariance
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

MEAN, STD = np.array([2.0, -1.0]), np.array([0.5, 1.5])
NUM = 80_000


def normal_sample(path, num=NUM):
    """Independent pairs of N(0, I) and N(MEAN, STD^2) at uniform times."""
    key_x0, key_x1, key_t = jax.random.split(jax.random.key(0), 3)
    x0 = jax.random.normal(key_x0, (num, 2))
    x1 = jnp.asarray(MEAN)[None] + jnp.asarray(STD)[None] * jax.random.normal(key_x1, (num, 2))
    return fm.sample_path(path, x0, x1, fm.uniform(key_t, (num,)).astype(x0.dtype))


def standard_errors(draws, want=0.0):
    """How many standard errors the mean of `[num, ...]` is from `want`, and the largest of them."""
    draws = np.asarray(draws, np.float64)
    error = draws.std(0) / np.sqrt(len(draws))
    return np.abs(draws.mean(0) - want) / error, np.max(error)


def tanh_net(params, t, x):
    hidden = jnp.tanh(x @ params["first"] + t[:, None] * params["slope"][None])
    return hidden @ params["second"]


def net(num_out):
    shapes = {"first": (2, 3), "slope": (3,), "second": (3, num_out)}
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def gradients(loss, params, sample):
    """Example by example, `[num, num_params]`."""

    def one(params, example):
        return loss(params, jax.tree.map(lambda a: a[None], example))[0]

    each = jit(jax.vmap(jax.grad(one), (None, 0)))(params, sample)
    return np.concatenate([g.reshape(len(g), -1) for g in jax.tree.leaves(each)], axis=1)


def flow_matching(params, sample):
    return fm.cfm_loss(lambda t, x: tanh_net(params, t, x), sample)


def bridge_matching(params, sample):
    return fm.bridge_loss(lambda t, x: jnp.split(tanh_net(params, t, x), 2, axis=1), sample)


@pytest.mark.parametrize("kind", ["path", pytest.param("bridge", marks=pytest.mark.slow)])
def test_theorem_2_equal_gradients(kind, x64):
    """Of both losses, at the same (t, x_t), on entropic pairs of three normals each.

    The standard error is that of the difference, example by example. A target that is off by a
    tenth is told from the right one.
    """
    mean0, mean1 = np.random.default_rng(6).standard_normal((2, 3, 2))
    cov0, cov1 = np.array([[0.5, 0.2], [0.2, 0.3]]), np.array([[0.2, -0.1], [-0.1, 0.6]])
    cross = schroedinger_covariance(cov0, cov1, 0.8)
    path = fm.cond_ot() if kind == "path" else fm.brownian_bridge(0.8)
    pairs = JointNormals(path, mean0, mean1, cov0, cov1, cross)
    x0, x1 = (jnp.asarray(x) for x in pairs.sample_pairs(np.random.default_rng(0), NUM))
    t = fm.uniform(jax.random.key(1), (NUM,)).astype(x0.dtype)
    if kind == "path":
        conditional, loss, params = fm.sample_path(path, x0, x1, t), flow_matching, net(2)
        marginal = conditional._replace(u_t=jit(pairs.velocity)(t, conditional.x_t))
        wrong = conditional._replace(u_t=1.1 * conditional.u_t)
    else:
        conditional = fm.sample_bridge(jax.random.key(2), path, x0, x1, t)
        loss, params, (mean, noise) = bridge_matching, net(4), conditional
        x0_hat, x1_hat, z_hat = jit(pairs.expectations)(t, mean.x_t)
        w, z_hat = mean._replace(u_t=x1_hat - x0_hat), noise._replace(u_t=z_hat)
        marginal = fm.BridgeSample(w, z_hat)
        wrong = conditional._replace(noise=noise._replace(u_t=1.1 * noise.u_t))
    want = gradients(loss, params, marginal)
    apart, error = standard_errors(gradients(loss, params, conditional) - want)
    assert apart.max() < 3.5 and error < 0.02 * abs(want.mean(0)).max()
    assert standard_errors(gradients(loss, params, wrong) - want)[0].max() > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cond_ot", pytest.param("cosine", marks=pytest.mark.slow)])
def test_the_losses_themselves_differ_by_a_known_constant(name, x64):
    """The mean over the axes of int W^2 s^2 / S_t dt, W = 1 or pi / 2, whatever the velocity."""
    # W is constant, and W s dt / S_t the differential of an angle that goes from 0 to pi / 2.
    path, w = {"cond_ot": (fm.cond_ot(), 1.0), "cosine": (fm.cosine(), np.pi / 2)}[name]
    want = w * np.pi / 2 * STD.mean()
    sample, best = normal_sample(path), gaussian_velocity(path, MEAN, STD)
    marginal = sample._replace(u_t=best(sample.t, sample.x_t))
    for velocity in (best, lambda t, x: jnp.zeros_like(x), lambda t, x: tanh_net(net(2), t, x)):
        apart, error = standard_errors(
            fm.cfm_loss(velocity, sample) - fm.cfm_loss(velocity, marginal), want
        )
        assert apart < 3.5 and error < 0.02


def test_a_loss_of_another_power_has_other_gradients(x64):
    """|v - u|^4 at the marginal velocity plus c: 4 c^3 + 12 c pi s / 2, and 4 c^3 of the marginals.

    So the theorem is one of squares: at the minimum of the one the other has a slope.
    """
    sample, best, c = normal_sample(fm.cond_ot()), gaussian_velocity(fm.cond_ot(), MEAN, STD), 0.3
    marginal = sample._replace(u_t=best(sample.t, sample.x_t))

    def slopes(sample):
        error = best(sample.t, sample.x_t) - sample.u_t
        return jax.jvp(lambda c: (error + c) ** 4, (jnp.asarray(c),), (jnp.ones(()),))[1]

    apart, _ = standard_errors(slopes(sample), 4 * c**3 + 12 * c * np.pi * STD / 2)
    assert apart.max() < 3.5
    np.testing.assert_allclose(slopes(marginal), 4 * c**3, rtol=1e-9)


def divided_by_t(t, x):
    """The minimum of the regression on (x1 - x0) / t: the marginal velocity over t."""
    t = jnp.asarray(t)
    return gaussian_velocity(fm.cond_ot(), MEAN, STD)(t, x) / t.reshape(-1, 1)


def arrives_at(t0):
    """(scale, shift): a flow along u / t from (t0, x) is at scale x + shift at t = 1.

    With the angle a = atan2(s t, 1 - t), whose slope is s / S_t, the homogeneous solution is
    sqrt(S_t) exp(s a) / t and the other term the integral of cos(a) exp(-s a).
    """
    angle = np.arctan2(STD * t0, 1 - t0)
    growth = np.exp(STD * (np.pi / 2 - angle))
    scale = STD * growth * t0 / np.hypot(STD * t0, 1 - t0)
    return scale, MEAN * (1 - growth * (np.sin(angle) - STD * np.cos(angle))) / (1 + STD**2)


def test_the_target_divided_by_t_generates_a_point(x64):
    """Any x at t0 -> 0 comes to m (1 + s exp(pi s / 2)) / (1 + s^2): no spread, another mean.

    Beside it the right target, m + s x. From t0 the spread is in proportion to t0.
    """
    x0 = np.array([[-1.0, 2.0], [0.5, 0.0], [2.0, -1.0]])
    controller = diffrax.PIDController(rtol=1e-10, atol=1e-10)

    @jit
    def solve(t0):
        start, tight = jnp.asarray(x0), {"stepsize_controller": controller}
        right = gaussian_velocity(fm.cond_ot(), MEAN, STD)
        return fm.sample(divided_by_t, start, t0=t0, **tight), fm.sample(right, start, **tight)

    for t0 in (0.1, 1e-2, 1e-3):
        with jax.numpy_dtype_promotion("standard"):  # Diffrax relies on it
            wrong, right = solve(t0)
        scale, shift = arrives_at(t0)
        np.testing.assert_allclose(wrong, scale * x0 + shift, atol=1e-7)
        np.testing.assert_allclose(right, MEAN + STD * x0, atol=1e-7)
    limit = MEAN * (1 + STD * np.exp(np.pi / 2 * STD)) / (1 + STD**2)
    np.testing.assert_allclose(arrives_at(1e-9)[1], limit, rtol=1e-8)
    np.testing.assert_allclose(arrives_at(1e-9)[0], 0, atol=1e-7)
    # How wrong: the 2-Wasserstein distance to N(m, s^2), a coordinate each.
    distance = np.hypot(limit - MEAN, STD)
    np.testing.assert_allclose(distance, [1.443955, 4.438409], atol=1e-6)


def test_it_is_the_minimum_of_that_regression(x64):
    """Its error is uncorrelated with 1, x and t x; that of the marginal velocity is not."""
    sample = normal_sample(fm.cond_ot())
    late = np.asarray(sample.t) > 0.05  # the mean square of the target is infinite up to t = 0
    t, x, u = (jnp.asarray(np.asarray(a)[late]) for a in sample)
    features = jnp.stack([jnp.ones_like(x), x, t[:, None] * x])

    def correlations(velocity):
        error = velocity(t, x) - u / t[:, None]
        return standard_errors((error[None] * features).swapaxes(0, 1))[0]

    assert correlations(divided_by_t).max() < 3.5
    assert correlations(gaussian_velocity(fm.cond_ot(), MEAN, STD)).max() > 10
