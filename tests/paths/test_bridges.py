"""Points of bridges, their targets and their loss, against closed forms; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_bridges import BRIDGES, INSIDE, draw, matrix_of, noisy_bridges
from oracles import gaussian_bridge, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

all_bridges = pytest.mark.parametrize("name", BRIDGES)


@pytest.mark.slow
@all_bridges
def test_sample_bridge_is_the_path_and_its_noise(name, x64):
    """x_t from its z; both ends; the mean's target is the derivative of what is no noise."""
    path, (x0, x1) = BRIDGES[name], draw((2, 3))
    key, t = jax.random.key(0), jnp.asarray(INSIDE)
    mean, noise = fm.sample_bridge(key, path, x0, x1, t)
    alpha, sigma, gamma = (np.asarray(f(t) + 0 * t)[:, None, None] for f in path)
    np.testing.assert_allclose(mean.x_t, alpha * x1 + sigma * x0 + gamma * noise.u_t, rtol=1e-12)
    np.testing.assert_array_equal(noise.x_t, mean.x_t)
    step = 1e-6
    alpha_dot, sigma_dot = (
        np.asarray((f(t + step) - f(t - step)) / (2 * step))[:, None, None] for f in path[:2]
    )
    np.testing.assert_allclose(mean.u_t, alpha_dot * x1 + sigma_dot * x0, rtol=1e-8, atol=1e-8)
    for end, want in ((0.0, x0), (1.0, x1)):
        got = fm.sample_bridge(key, path, x0, x1, jnp.asarray(end)).mean.x_t
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_the_noise_is_standard_normal_and_the_brownian_bridge_has_its_variance():
    x0, x1 = jnp.full((100_000, 2), -1.0), jnp.full((100_000, 2), 3.0)
    sample = fm.sample_bridge(jax.random.key(0), fm.brownian_bridge(1.5), x0, x1, jnp.array(0.2))
    z, x_t = np.asarray(sample.noise.u_t, np.float64), np.asarray(sample.mean.x_t, np.float64)
    error = 1 / np.sqrt(z.size)
    assert abs(z.mean()) < 4 * error and abs(z.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((z[:, 0] * z[:, 1]).mean()) < 4 / np.sqrt(len(z))
    # sigma^2 t (1 - t) = 0.36, about 0.8 x0 + 0.2 x1 = -0.2
    assert abs(x_t.mean() + 0.2) < 4 * 0.6 * error
    assert abs(x_t.var() - 0.36) < 4 * 0.36 * np.sqrt(2) * error


def test_without_noise_it_is_the_affine_path(x64):
    x0, x1 = draw((2, 3))
    t = jnp.asarray(INSIDE)
    want = fm.sample_path(fm.cond_ot(), x0, x1, t)
    got = fm.sample_bridge(jax.random.key(0), BRIDGES["no noise"], x0, x1, t).mean
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
    w, z_hat = (lambda t, x: 3 * x), (lambda t, x: jnp.ones_like(x))
    for field in (
        fm.bridge_flow(BRIDGES["no noise"], w, z_hat),
        fm.bridge_drift(BRIDGES["no noise"], w, z_hat, lambda t: 0.0),
    ):
        for at in (0.0, 0.4, 1.0):
            np.testing.assert_allclose(field(jnp.asarray(at), x0), 3 * x0, rtol=1e-12)


@pytest.mark.slow
@noisy_bridges
def test_jit_vmap_and_a_single_time_agree(name):
    path, (x0, x1), key = BRIDGES[name], draw((2, 3)), jax.random.key(3)
    t = jnp.asarray(INSIDE, jnp.float32)
    w, z_hat = (lambda t, x: 2 * x - 1), (lambda t, x: 0.5 * x)
    fields = [
        fm.bridge_flow(path, w, z_hat),
        fm.bridge_score(path, z_hat),
        fm.bridge_drift(path, w, z_hat, lambda t: 0.5),
        fm.bridge_drift(path, w, z_hat, lambda t: 0.5, reverse=True),
    ]

    def all_of(t, x):
        return [field(t, x) for field in fields]

    def sampled(t):
        return fm.sample_bridge(key, path, x0, x1, t)

    for got, want in zip(
        jax.tree.leaves(jit(sampled)(t)), jax.tree.leaves(sampled(t)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    for at in (0, 3):
        one, many = sampled(t[at]).mean.x_t[at], sampled(t).mean.x_t[at]
        np.testing.assert_allclose(one, many, rtol=2e-6, atol=2e-6)
    eager = all_of(t, x0)
    mapped = jax.vmap(lambda t, x: [u[0] for u in all_of(t, x[None])])(t, x0)
    for e, c, m in zip(eager, jit(all_of)(t, x0), mapped, strict=True):
        np.testing.assert_allclose(c, e, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(m, e, rtol=2e-5, atol=2e-6)
    for e, one in zip(eager, all_of(t[1], x0[1:2]), strict=True):
        np.testing.assert_allclose(one, e[1:2], rtol=2e-5, atol=2e-6)


@noisy_bridges
def test_dtype_is_kept_and_the_sum_rounded_once(name):
    path, (x0, x1), key = BRIDGES[name], draw(dtype=jnp.bfloat16), jax.random.key(0)
    t = jnp.asarray(INSIDE, jnp.float32)
    wide = [x.astype(jnp.float32) for x in (x0, x1)]
    low = jax.tree.leaves(fm.sample_bridge(key, path, x0, x1, t))
    high = jax.tree.leaves(fm.sample_bridge(key, path, *wide, t))
    for i in (1, 2, 4, 5):
        assert (low[i].dtype, high[i].dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(low[i].astype(jnp.float32), high[i], rtol=2**-8)

    def field(t, x):
        return x

    for made in (
        fm.bridge_flow(path, field, field),
        fm.bridge_score(path, field),
        fm.bridge_drift(path, field, field, lambda t: 1.0),
    ):
        got, want = made(t, x0), made(t, wide[0])
        assert (got.dtype, want.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)


@pytest.mark.parametrize("independent", [False, True])
def test_the_targets_regress_on_the_closed_forms(independent):
    """Least squares of x1 - x0 and of z on x_t have the slopes of w and z_hat."""
    bridge, num, t = gaussian_bridge(0.8, independent=independent), 100_000, 0.3
    x0, x1 = bridge.sample_pairs(np.random.default_rng(0), num).astype(np.float32)
    path = fm.brownian_bridge(bridge.sigma)
    sample = fm.sample_bridge(jax.random.key(0), path, x0, x1, jnp.array(t, jnp.float32))
    x = np.asarray(sample.mean.x_t, np.float64) - bridge.mean(t)
    for part, field in ((sample.mean, bridge.w), (sample.noise, bridge.z_hat)):
        target = np.asarray(part.u_t, np.float64)
        slope, *_ = np.linalg.lstsq(x, target - target.mean(0), rcond=None)
        with jax.enable_x64(True):
            want = np.asarray(matrix_of(field, 2)(jnp.array(t)))
        rest = (target - target.mean(0) - x @ slope).std(0)
        error = np.sqrt(np.diag(np.linalg.inv(x.T @ x)))[:, None] * rest
        assert (abs(slope - want.T) < 4 * error).all() and error.max() < 0.01


def test_the_loss_is_that_of_both_path_samples_in_one_call():
    (x0, x1), calls = draw((2, 3)), []
    t = jnp.asarray(INSIDE, jnp.float32)
    sample = fm.sample_bridge(jax.random.key(0), fm.brownian_bridge(1.0), x0, x1, t)

    def fields(t, x):
        calls.append(1)
        return 2 * x, x - 1

    got = fm.bridge_loss(fields, sample)
    assert len(calls) == 1
    want = fm.cfm_loss(lambda t, x: 2 * x, sample.mean) + fm.cfm_loss(
        lambda t, x: x - 1, sample.noise
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    by_hand = ((2 * sample.mean.x_t - sample.mean.u_t) ** 2).mean((1, 2))
    by_hand += ((sample.mean.x_t - 1 - sample.noise.u_t) ** 2).mean((1, 2))
    np.testing.assert_allclose(got, by_hand, rtol=1e-6)


def test_a_network_that_gives_both_fields_is_called_once_under_jit():
    weights = jax.random.normal(jax.random.key(0), (64, 128))
    x = jnp.ones((256, 64))

    def fields(t, x):
        return jnp.split(jnp.tanh(x @ weights), 2, axis=1)

    w, z_hat = (lambda t, x: fields(t, x)[0]), (lambda t, x: fields(t, x)[1])
    path = fm.brownian_bridge(1.0)
    alone = 2 * 256 * 64 * 128
    for field in (
        fm.bridge_flow(path, w, z_hat),
        fm.bridge_drift(path, w, z_hat, lambda t: 1.0),
    ):
        compiled = jax.jit(field).lower(jnp.array(0.5), x).compile()
        assert compiled.cost_analysis()["flops"] < 1.3 * alone


def test_wrong_paths_times_and_functions_are_refused():
    path, (x0, x1), key = fm.brownian_bridge(1.0), draw(), jax.random.key(0)
    w = z_hat = lambda t, x: x
    leaky = path._replace(gamma=lambda t: 0.1 + 0 * t)
    at_one = path._replace(gamma=lambda t: jnp.sqrt(t))
    makers = [
        lambda p: fm.sample_bridge(key, p, x0, x1, jnp.array(0.5)),
        lambda p: jit(lambda t: fm.sample_bridge(key, p, x0, x1, t))(jnp.array(0.5)),
        lambda p: fm.bridge_flow(p, w, z_hat),
        lambda p: fm.bridge_score(p, z_hat),
        lambda p: fm.bridge_drift(p, w, z_hat, lambda t: 1.0),
    ]
    for make in makers:
        for bad, got in ((leaky, "got 0.1"), (at_one, "got 0.0 and 1.0")):
            with pytest.raises(ValueError, match=f"gamma must be 0 at t = 0 and t = 1; {got}"):
                make(bad)
        with pytest.raises(ValueError, match=r"which makes one: brownian_bridge\(1.0\)"):
            make(fm.brownian_bridge)
        with pytest.raises(ValueError, match=r"three functions of time; got a tuple of 2"):
            make(fm.cond_ot())
        backwards = fm.BridgePath(path.sigma, path.alpha, path.gamma)
        with pytest.raises(ValueError, match="A bridge must begin at x0 and end at x1"):
            make(backwards)
    for sigma in (0.0, -1.0, np.inf, np.nan, "1"):
        with pytest.raises(ValueError, match="sigma must be a finite number, positive; got"):
            fm.brownian_bridge(sigma)
    jit(lambda s: fm.sample_bridge(key, fm.brownian_bridge(s), x0, x1, jnp.array(0.5)))(0.5)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        fm.sample_bridge(key, path, x0, x1[:2], jnp.array(0.5))
    with pytest.raises(ValueError, match=r"diffusion must be a function t -> g; got 1.0"):
        fm.bridge_drift(path, w, z_hat, 1.0)
    fields = [
        fm.bridge_flow(path, w, z_hat),
        fm.bridge_score(path, z_hat),
        fm.bridge_drift(path, w, z_hat, lambda t: 1.0),
        lambda t, x: fm.sample_bridge(key, path, x, x, t),
    ]
    for field in fields:
        for shape in ((3,), (5, 1), (5, 3)):
            with pytest.raises(ValueError, match="prefix of the shape of x"):
                field(jnp.full(shape, 0.5), x0)
        for t in (-0.1, 1.1, np.nan):
            with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
                field(t, x0)
    for make in (
        lambda f: fm.bridge_flow(path, f, z_hat),
        lambda f: fm.bridge_flow(path, z_hat, f),
        lambda f: fm.bridge_score(path, f),
        lambda f: fm.bridge_drift(path, f, z_hat, lambda t: 1.0),
    ):
        with pytest.raises(ValueError, match="(w|z_hat) must return a floating array"):
            make(lambda t, x: x[:, :1])(jnp.array(0.5), x0)
    sample = fm.sample_bridge(key, path, x0, x1, jnp.array(0.5))
    with pytest.raises(ValueError, match=r"fields must return two arrays, \(w, z_hat\)"):
        fm.bridge_loss(lambda t, x: jnp.concatenate([x, x], axis=1), sample)
    with pytest.raises(ValueError, match="z_hat must return a floating array of the shape"):
        fm.bridge_loss(lambda t, x: (x, x[:, :1]), sample)
    with pytest.raises(ValueError, match="bridge_sample must be BridgeSample"):
        fm.bridge_loss(lambda t, x: (x, x), sample.mean)
