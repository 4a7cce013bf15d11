"""The Schroedinger bridge between normal distributions, whose covariance is known."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_bridges import UNIT, drift_of, matrix_of, unit_bridge
from oracles import GaussianBridge, gaussian_bridge, jit, schroedinger_covariance
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm


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
