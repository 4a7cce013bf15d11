"""Bridges against closed forms: normal pairs, finite sets of pairs, the Schroedinger bridge."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianBridge, gaussian_bridge, jit, schroedinger_covariance
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax.paths.bridge_drifts import NEAREST

BRIDGES = {
    "brownian_1": fm.brownian_bridge(1.0),
    "brownian_0.3": fm.brownian_bridge(0.3),
    "trigonometric": fm.BridgePath(
        lambda t: jnp.sin(0.5 * jnp.pi * t),
        lambda t: jnp.sin(0.5 * jnp.pi * (1 - t)),
        lambda t: jnp.sqrt(2 * t * (1 - t)),
    ),
    "smooth": fm.BridgePath(lambda t: t**2, lambda t: 1 - t**2, lambda t: jnp.sin(jnp.pi * t) ** 2),
    "no noise": fm.BridgePath(lambda t: t, lambda t: 1 - t, lambda t: 0.0),
}
NOISY = [name for name in BRIDGES if name != "no noise"]
all_bridges = pytest.mark.parametrize("name", BRIDGES)
noisy_bridges = pytest.mark.parametrize("name", NOISY)
INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])
UNIT = np.eye(1)


def draw(event_shape=(3,), batch=5, dtype=None):
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, batch, *event_shape))
    return jnp.asarray(x0, dtype), jnp.asarray(x1, dtype)


def unit_bridge(cross, sigma=1.0):
    """One coordinate, unit variances, means that differ."""
    return GaussianBridge(np.array([-0.1]), UNIT, np.array([0.1]), UNIT, np.array([[cross]]), sigma)


def drift_of(bridge, diffusion=None, **kwargs):
    path = fm.brownian_bridge(bridge.sigma)
    diffusion = diffusion or (lambda t: bridge.sigma)
    return fm.bridge_drift(path, bridge.w, bridge.z_hat, diffusion, **kwargs)


def matrix_of(field, dim):
    """`t -> A` of a field that is affine in x."""
    return lambda t: jax.jacfwd(lambda x: field(t, x[None])[0])(jnp.zeros(dim))


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


@pytest.mark.parametrize("independent", [False, True])
def test_flow_and_drifts_have_the_marginals_of_normal_pairs(independent, x64):
    """S' = A S + S A' for the flow, plus g^2 I forwards and minus g^2 I backwards, for any g."""
    bridge = gaussian_bridge(0.8, independent=independent)
    path = fm.brownian_bridge(bridge.sigma)
    fields = [(fm.bridge_flow(path, bridge.w, bridge.z_hat), 0.0)]
    for g in (0.0, 0.5, bridge.sigma, 2.0):
        fields.append((drift_of(bridge, lambda t, g=g: g), g**2))
        fields.append((drift_of(bridge, lambda t, g=g: g, reverse=True), -(g**2)))
    for field, square in fields:
        a_of = jit(matrix_of(field, 2))
        for t in INSIDE:
            a, cov = np.asarray(a_of(t)), bridge.cov(t)
            got = a @ cov + cov @ a.T + square * np.eye(2)
            np.testing.assert_allclose(got, bridge.cov_dot(t), atol=1e-12)
            at_mean = field(jnp.asarray(t), jnp.asarray(bridge.mean(t))[None])[0]
            np.testing.assert_allclose(at_mean, bridge.mean1 - bridge.mean0, atol=1e-12)


def test_drifts_at_the_ends_of_a_brownian_bridge(x64):
    """Where a solve begins w alone; where it ends the limit, w + sigma^2 s and w - sigma^2 s."""
    bridge = gaussian_bridge(0.8)
    x, square = jnp.asarray(draw((2,))[0]), bridge.sigma**2
    forward, backward = drift_of(bridge), drift_of(bridge, reverse=True)

    def score(t, cov):
        return -np.linalg.solve(cov, (np.asarray(x) - bridge.mean(t)).T).T

    s0, s1 = score(0.0, bridge.cov0), score(1.0, bridge.cov1)
    w0, w1 = (np.asarray(bridge.w(t, x)) for t in (0.0, 1.0))
    for function in (lambda f: f, jit):
        for field, t, want in (
            (forward, 0.0, w0),
            (forward, 1.0, w1 + square * s1),
            (backward, 1.0, w1),
            (backward, 0.0, w0 - square * s0),
        ):
            got = function(field)(jnp.asarray(t), x)
            np.testing.assert_allclose(got, want, atol=20 * NEAREST)
    # Continuous: a float32 solve may end a rounding before 1.
    inner = forward(jnp.asarray(1 - 6e-8), x)
    np.testing.assert_allclose(inner, forward(jnp.ones(()), x), rtol=1e-12)
    # In between it is the formula: w -/+ sigma times a root times z_hat.
    t = jnp.asarray(INSIDE)
    ones = jnp.ones((5, 2))
    up, down = (
        fm.bridge_drift(
            fm.brownian_bridge(0.8), lambda t, x: 0 * x, lambda t, x: x, lambda t: 0.8, reverse=r
        )(t, ones)
        for r in (False, True)
    )
    ratio = np.sqrt(INSIDE / (1 - INSIDE))[:, None]
    np.testing.assert_allclose(up, -0.8 * ratio * ones, rtol=1e-12)
    np.testing.assert_allclose(down, 0.8 / ratio * ones, rtol=1e-12)


def test_drifts_at_the_ends_in_float32():
    bridge = gaussian_bridge(0.8)
    x = draw((2,), dtype=jnp.float32)[0]
    with jax.numpy_dtype_promotion("standard"):
        got = drift_of(bridge)(jnp.ones(()), x)
        w = bridge.w(jnp.ones(()), x)
    score = -np.linalg.solve(bridge.cov1, (np.asarray(x) - bridge.mean1).T).T
    # Half an ulp of 1 - NEAREST is 0.3 % of NEAREST.
    np.testing.assert_allclose(got, w + bridge.sigma**2 * score, rtol=5e-3, atol=5e-3)


class Pairs:
    """Three pairs in the plane: everything about x_t from the density of their mixture."""

    def __init__(self, path):
        rng = np.random.default_rng(4)
        self.path, self.x0, self.x1 = path, *(jnp.asarray(rng.standard_normal((2, 3, 2))))

    def centred(self, t, x):
        """`[batch, pair, dim]`: x less the mean of each pair's bridge."""
        mean = self.path.alpha(t) * self.x1 + self.path.sigma(t) * self.x0
        return x[:, None] - mean[None]

    def log_p(self, t, x):
        square, variance = (self.centred(t, x[None])[0] ** 2).sum(1), self.path.gamma(t) ** 2
        return jax.nn.logsumexp(-square / (2 * variance)) - jnp.log(variance)  # up to a constant

    def shares(self, t, x):
        return jax.nn.softmax(-(self.centred(t, x) ** 2).sum(2) / (2 * self.path.gamma(t) ** 2))

    def w(self, t, x):
        one = jnp.ones_like(t)
        alpha_dot, sigma_dot = (jax.jvp(f, (t,), (one,))[1] for f in self.path[:2])
        return self.shares(t, x) @ (alpha_dot * self.x1 + sigma_dot * self.x0)

    def z_hat(self, t, x):
        each = self.centred(t, x) / self.path.gamma(t)
        return (self.shares(t, x)[..., None] * each).sum(1)


@noisy_bridges
def test_score_continuity_and_fokker_planck_of_three_pairs(name, x64):
    """The residuals of the equations themselves, every derivative by autodiff, no moment in it."""
    path = BRIDGES[name]
    pairs = Pairs(path)
    score = fm.bridge_score(path, pairs.z_hat)
    flow = fm.bridge_flow(path, pairs.w, pairs.z_hat)

    def diffusion(t):
        return 0.4 + t

    drifts = [
        (fm.bridge_drift(path, pairs.w, pairs.z_hat, diffusion, reverse=r), sign)
        for r, sign in ((False, 1), (True, -1))
    ]

    def residuals(t, x):
        slope, gradient = jax.grad(pairs.log_p, (0, 1))(t, x)
        laplacian = jnp.trace(jax.hessian(pairs.log_p, 1)(t, x)) + gradient @ gradient

        def transport(field):
            divergence = jnp.trace(jax.jacfwd(lambda x: field(t, x[None])[0])(x))
            return slope + divergence + field(t, x[None])[0] @ gradient

        spread = 0.5 * diffusion(t) ** 2 * laplacian
        errors = [transport(flow), *(transport(f) - sign * spread for f, sign in drifts)]
        return jnp.stack(errors), score(t, x[None])[0] - gradient, spread

    x = jnp.asarray(np.random.default_rng(5).standard_normal((5, 2)))
    errors, of_score, spread = jit(jax.vmap(residuals))(jnp.asarray(INSIDE), x)
    size = 1 + np.abs(spread)[:, None]
    np.testing.assert_allclose(errors / size, 0, atol=1e-9)
    np.testing.assert_allclose(of_score / size, 0, atol=1e-9)


def kept(field, covariance, *, begin, end, num_steps):
    """Cov(x_end, x_begin) of a linear equation: K' = A K from K = Cov(x_begin), by RK4."""
    a_of, h = matrix_of(field, len(covariance)), (end - begin) / num_steps

    def step(k, t):
        k1 = a_of(t) @ k
        k2 = a_of(t + h / 2) @ (k + h / 2 * k1)
        k3 = a_of(t + h / 2) @ (k + h / 2 * k2)
        k4 = a_of(t + h) @ (k + h * k3)
        return k + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    ts = jnp.asarray(begin + h * np.arange(num_steps))
    return np.asarray(jit(lambda k: jax.lax.scan(step, k, ts)[0])(jnp.asarray(covariance)))


def test_the_schroedinger_bridge_keeps_its_pairs_and_others_do_not(x64):
    """Solved in either direction, its x_0 and x_1 are correlated as its pairs are."""
    bridge = gaussian_bridge(0.8)
    options = dict(num_steps=1000)
    got = kept(drift_of(bridge), bridge.cov0, begin=0.0, end=1.0, **options)
    np.testing.assert_allclose(got, bridge.cross.T, atol=2e-5)
    got = kept(drift_of(bridge, reverse=True), bridge.cov1, begin=1.0, end=0.0, **options)
    np.testing.assert_allclose(got, bridge.cross, atol=2e-5)
    other = gaussian_bridge(0.8, independent=True)
    got = kept(drift_of(other), other.cov0, begin=0.0, end=1.0, **options)
    assert abs(got).max() > 0.2


@pytest.mark.slow
def test_markovian_fitting_of_normal_pairs_converges_to_the_schroedinger_bridge(x64):
    """From independent pairs; unit variances at sigma = 1 reach (sqrt 5 - 1) / 2."""
    cross, found = 0.0, []
    for _ in range(8):
        bridge = unit_bridge(cross)
        cross = float(kept(drift_of(bridge), UNIT, begin=0.0, end=1.0, num_steps=500)[0, 0])
        found.append(cross)
    # By hand: the first slope is (t - 1) / (1 - t + t^2), whose integral is -pi / (3 sqrt 3).
    np.testing.assert_allclose(found[0], np.exp(-np.pi / (3 * np.sqrt(3))), atol=1e-5)
    np.testing.assert_allclose(found[-1], (np.sqrt(5) - 1) / 2, atol=2e-5)
    errors = abs(np.array(found[:4]) - (np.sqrt(5) - 1) / 2)
    assert (errors[1:] < 0.5 * errors[:-1]).all()


def test_the_covariance_of_the_schroedinger_bridge_in_its_limits():
    """Unit variances: (sqrt(4 + sigma^4) - sigma^2) / 2. Little noise: optimal transport's map."""
    for sigma in (0.1, 1.0, 3.0):
        got = schroedinger_covariance(UNIT, UNIT, sigma)
        np.testing.assert_allclose(got, (np.sqrt(4 + sigma**4) - sigma**2) / 2, rtol=1e-12)
    bridge = gaussian_bridge(1e-4)
    move = np.linalg.solve(bridge.cov0, bridge.cross)  # x1 = m1 + (x0 - m0) T, T symmetric
    np.testing.assert_allclose(move, move.T, atol=1e-6)
    np.testing.assert_allclose(move.T @ bridge.cov0 @ move, bridge.cov1, atol=1e-6)
    assert abs(gaussian_bridge(100.0).cross).max() < 1e-3


@pytest.mark.slow
def test_the_flow_between_other_times_costs_their_distance(x64):
    """From x0 itself at t = d to 1 - d: an error of the variance in proportion to d."""
    cov0, cov1 = np.array([[1.0]]), np.array([[0.25]])
    cross = schroedinger_covariance(cov0, cov1, 1.0)
    bridge = GaussianBridge(np.zeros(1), cov0, np.zeros(1), cov1, cross, 1.0)
    flow = fm.bridge_flow(fm.brownian_bridge(1.0), bridge.w, bridge.z_hat)
    controller = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    errors = []
    for d in (1e-2, 1e-3, 1e-4):
        solve = functools.partial(fm.sample, flow, t0=d, t1=1 - d, stepsize_controller=controller)
        with jax.numpy_dtype_promotion("standard"):
            scale = float(jit(solve)(jnp.ones((1, 1)))[0, 0])
        np.testing.assert_allclose(scale**2, bridge.cov(1 - d) / bridge.cov(d), rtol=1e-6)
        errors.append(abs(scale**2 - 0.25))
    np.testing.assert_allclose(np.log10(np.array(errors[:-1]) / errors[1:]), 1, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_samples_of_the_schroedinger_bridge(reverse):
    """End to end in 50 steps, against the exact moments of those very steps."""
    bridge, num, num_steps = gaussian_bridge(0.8), 40_000, 50
    drift = drift_of(bridge, reverse=reverse)
    ends = (1.0, 0.0) if reverse else (0.0, 1.0)
    h, sign = 1 / num_steps, -1 if reverse else 1
    with jax.enable_x64(True):
        # Arrays of its own: JAX keeps what it made of a NumPy constant, in the precision it had.
        a_of = jit(matrix_of(drift_of(gaussian_bridge(0.8), reverse=reverse), 2))
        steps = [np.asarray(a_of(ends[0] + sign * n * h)) for n in range(num_steps)]
    x0, x1 = bridge.sample_pairs(np.random.default_rng(1), num).astype(np.float32)
    begin = x1 if reverse else x0
    with jax.numpy_dtype_promotion("standard"):
        end = jit(
            lambda x: fm.sample_sde(
                jax.random.key(2),
                drift,
                lambda t: bridge.sigma,
                x,
                t0=ends[0],
                t1=ends[1],
                num_steps=num_steps,
            )  # fmt: skip
        )(jnp.asarray(begin))
    cov = k = bridge.cov1 if reverse else bridge.cov0
    for a in steps:
        move = np.eye(2) + sign * h * a
        cov, k = move @ cov @ move.T + bridge.sigma**2 * h * np.eye(2), move @ k
    begin, end = (np.asarray(x, np.float64) for x in (begin, end))
    begin_mean, end_mean = (bridge.mean(t) for t in ends)
    error = np.sqrt(np.diag(cov) / num)
    assert (abs(end.mean(0) - end_mean) < 4 * error).all()
    for other, other_mean, want in ((end, end_mean, cov), (begin, begin_mean, k)):
        products = (end - end_mean)[:, :, None] * (other - other_mean)[:, None]
        error = products.std(0) / np.sqrt(num)
        assert (abs(products.mean(0) - want) < 4 * error).all()
    # And those steps are near the bridge itself: Euler's error, of order 1 / 50.
    np.testing.assert_allclose(cov, bridge.cov0 if reverse else bridge.cov1, atol=0.02)
    np.testing.assert_allclose(k, bridge.cross if reverse else bridge.cross.T, atol=0.02)


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


def test_the_ends_are_refused_where_nothing_is_finite_there():
    path, x = fm.brownian_bridge(1.0), draw()[0]
    w = z_hat = lambda t, x: x
    drift, wrong = (fm.bridge_drift(path, w, z_hat, lambda t, g=g: g) for g in (1.0, 0.5))
    for t in (0.0, 1.0):
        for name, field in (
            ("bridge_flow", fm.bridge_flow(path, w, z_hat)),
            ("bridge_score", fm.bridge_score(path, z_hat)),
        ):
            with pytest.raises(ValueError, match=f"^{name} has no finite value.*got t = {t}"):
                field(jnp.asarray(t), x)
            assert not np.isfinite(jit(field)(jnp.asarray(t), x)).any()
        for at in (jnp.asarray(t), jnp.array([0.5, t, 0.5, 0.5, 0.5])):
            assert np.isfinite(drift(at, x)).all()
            with pytest.raises(ValueError, match=rf"= 1; got 0.25 at t = {t}"):
                wrong(at, x)
        assert np.isnan(jit(wrong)(jnp.asarray(t), x)).all()
    assert np.isfinite(wrong(jnp.asarray(1e-5), x)).all()
    smooth = fm.bridge_flow(BRIDGES["smooth"], w, z_hat)
    np.testing.assert_allclose(smooth(jnp.zeros(()), x), x, rtol=1e-6)  # gamma' is 0 there


ENDS = {  # gamma, its diffusions that match at both ends, and those that do not
    "brownian_1": (fm.brownian_bridge(1.0).gamma, 1.0, (0.9, 0.0, np.inf, np.nan)),
    "brownian_1e-4": (fm.brownian_bridge(1e-4).gamma, 1e-4, (0.9e-4, 0.0, 1e-3)),
    "brownian_1e3": (fm.brownian_bridge(1e3).gamma, 1e3, (1.0, 0.9e3)),
    "sine": (lambda t: jnp.sin(jnp.pi * t), 0.0, (0.5, np.inf)),
    "parabola": (lambda t: 1e-3 * t * (1 - t), 0.0, (0.5, 1e-3)),
    "sine squared": (lambda t: jnp.sin(jnp.pi * t) ** 2, 0.0, (0.5,)),
    "no noise": (lambda t: 0 * t, 0.0, (0.5,)),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENDS)
def test_only_the_matching_diffusion_has_a_drift_at_an_end(name, dtype):
    """Of any scale, at both ends, in both directions; w alone where a solve begins."""
    gamma, matches, others = ENDS[name]
    path = fm.BridgePath(lambda t: t, lambda t: 1 - t, gamma)

    def drift(g, reverse):
        w, z_hat = (lambda t, x: 3 * x), (lambda t, x: gamma(t) * x)
        return fm.bridge_drift(path, w, z_hat, lambda t: g + 0 * t, reverse=reverse)

    with jax.enable_x64(dtype == "float64"):
        x = jnp.ones((2, 1), dtype)
        for reverse in (False, True):
            traced = jit(lambda g, t, x, reverse=reverse: drift(g, reverse)(t, x))
            for end in (0.0, 1.0):
                t, excess = jnp.asarray(end, dtype), 0.0 if bool(end) == reverse else matches**2
                want = 3 + (excess if reverse else -excess)
                for got in (
                    drift(matches, reverse)(t, x),
                    traced(jnp.asarray(matches, dtype), t, x),
                ):
                    np.testing.assert_allclose(got, want, rtol=5e-3)  # 1 - NEAREST, rounded
                for g in others:
                    with pytest.raises(ValueError, match=r"must be \|\(gamma\^2\)'\| ="):
                        drift(g, reverse)(t, x)
                    assert np.isnan(traced(jnp.asarray(g, dtype), t, x)).all()


def test_a_gamma_that_is_zero_inside_is_refused_there_too():
    x, w = draw()[0], lambda t, x: x
    three_zeros = BRIDGES["no noise"]._replace(gamma=lambda t: t * (1 - t) * (1 - 2 * t))
    for path in (BRIDGES["no noise"], three_zeros):
        with pytest.raises(ValueError, match="bridge_drift has no finite value.*got t = 0.5"):
            fm.bridge_drift(path, w, w, lambda t: 1.0)(jnp.array(0.5), x)
        without = fm.bridge_drift(path, w, w, lambda t: 0.0)
        np.testing.assert_array_equal(without(jnp.array(0.5), x), x)
