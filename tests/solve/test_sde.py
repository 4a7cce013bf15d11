"""SDE sampling: moments against closed forms, orders, both directions, DDPM's sampler, refusals."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    PATHS,
    GaussianFlow,
    gaussian_flow,
    gaussian_predictions,
    gaussian_velocity,
    jit,
    quick_on,
    whitened_normal,
)
from oracles import x64 as x64

import fmjax as fm
from fmjax.training import sharding

INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])
MEAN, STD = np.array([0.7, -1.2]), np.array([0.5, 1.5])
NARROW = GaussianFlow(np.zeros(1), np.full(1, 0.4))  # along cond_ot
ETAS = {"none": 0.0, "half": 0.5, "five": 5.0, "of t": lambda t: 3 * t * (1 - t)}
KEY = jax.random.key(1)
SLOW = pytest.mark.slow


def langevin(path, velocity, eta, **kwargs):
    return fm.langevin_drift(path, velocity, eta, **kwargs), fm.langevin_diffusion(path, eta)


def euler_variance(eta, ts, *, drift_sign=1, start=1.0):
    """The variance that Euler's steps give NARROW along cond_ot, by its linear recursion."""
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        rate = (t * 0.16 - (1 - t)) / (0.16 * t**2 + (1 - t) ** 2)
        slope = rate + drift_sign * eta * (t * rate - 1)
        start = (1 + (s - t) * slope) ** 2 * start + abs(s - t) * 2 * eta * (1 - t)
    return start


@pytest.mark.parametrize(
    "eta", ["half", *(pytest.param(e, marks=SLOW) for e in ETAS if e != "half")]
)
@quick_on("vp")
def test_the_moments_move_as_those_of_the_flow(name, eta, x64):
    """d mean / dt and d variance / dt = 2 A V + g^2 are the path's own, and backwards 2 A V - g^2.

    A and b of the drift A x + b are read from it; the moments are differentiated by themselves.
    """
    path, t = PATHS[name], jnp.asarray(INSIDE)

    def moments(t):
        alpha, sigma = (f(t)[:, None] for f in path)
        return alpha * MEAN[None], alpha**2 * STD[None] ** 2 + sigma**2

    velocity = gaussian_velocity(path, MEAN, STD)

    @functools.partial(jit, static_argnums=1)
    def slopes(t, reverse):
        drift, diffusion = langevin(path, velocity, ETAS[eta], reverse=reverse)
        (mean, variance), want = jax.jvp(moments, (t,), (jnp.ones(5),))
        at_mean, slope = jax.jvp(functools.partial(drift, t), (mean,), (jnp.ones((5, 2)),))
        square = diffusion(t)[:, None] ** 2
        return (at_mean, 2 * slope * variance + (-square if reverse else square)), want

    for reverse in (False, True):
        for got, want in zip(*slopes(t, reverse), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [pytest.param(0.0, marks=SLOW), 1.0, pytest.param(5.0, marks=SLOW)])
def test_the_variance_at_the_data_for_any_eta(eta):
    """0.16 but for the steps, by Euler's own recursion; ShARK's 50 steps are within 1 % of it."""
    num, num_steps = 50_000, 50
    x0 = jnp.asarray(whitened_normal(num, 1))
    drift, diffusion = langevin(fm.cond_ot(), NARROW.velocity, eta)
    euler, shark = (
        jit(
            lambda key, x0, s=solver: fm.sample_sde(
                key, drift, diffusion, x0, solver=s, num_steps=num_steps
            )
        )(KEY, x0)
        for solver in (diffrax.Euler(), diffrax.ShARK())
    )
    error = 4 * np.sqrt(2 / num)  # four standard errors of a variance, relative
    want = euler_variance(eta, np.linspace(0, 1, num_steps + 1))
    np.testing.assert_allclose(np.var(euler), want, rtol=error)
    np.testing.assert_allclose(np.var(shark), 0.16, rtol=0.01 + error)
    if eta == 0:
        ode = jit(lambda x0: fm.sample(NARROW.velocity, x0, solver=diffrax.Euler(), num_steps=50))
        np.testing.assert_allclose(euler, ode(x0), rtol=1e-5, atol=1e-6)


@SLOW
def test_backwards_the_term_changes_its_sign():
    """From the data to N(0, 1); with the forward drift the variance would be 6.6."""
    num, ts = 50_000, np.linspace(1, 0, 201)
    x1 = 0.4 * jnp.asarray(whitened_normal(num, 1))
    diffusion = fm.langevin_diffusion(fm.cond_ot(), 0.5)
    for reverse, limit in ((True, 1.0), (False, 6.57)):
        drift = fm.langevin_drift(fm.cond_ot(), NARROW.velocity, 0.5, reverse=reverse)
        solve = jit(
            lambda key, x, d=drift: fm.sample_sde(
                key, d, diffusion, x, t0=1.0, t1=0.0, num_steps=200
            )
        )
        sign = -1 if reverse else 1
        want = euler_variance(0.5, ts, drift_sign=sign, start=0.16)
        np.testing.assert_allclose(np.var(solve(KEY, x1)), want, rtol=4 * np.sqrt(2 / num))
        np.testing.assert_allclose(want, limit, rtol=0.03)


@SLOW
def test_weak_order_of_convergence():
    """Ornstein and Uhlenbeck's variance from 0, (1 - exp(-2)) / 2: Euler 1, ShARK more."""
    x0, exact, steps = jnp.zeros((2**18, 1)), 0.5 * (1 - np.exp(-2.0)), (4, 8, 16)
    cases = [(diffrax.Euler(), n) for n in steps] + [(diffrax.ShARK(), 4)]

    @jit
    def variances(keys):
        return [
            jnp.var(fm.sample_sde(key, ornstein, one, x0, solver=solver, num_steps=n))
            for key, (solver, n) in zip(keys, cases, strict=True)
        ]

    *errors, shark = np.array(variances(jax.random.split(KEY, 4))) - exact
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    # A standard error of 0.3 % of the variance is 7 % of the last error, and 0.05 of the slope.
    np.testing.assert_allclose(-slope, 1, atol=0.2)
    assert abs(shark) < abs(errors[0]) / 10


def ornstein(t, x):
    return -x


def one(t):
    return 1.0


@SLOW
def test_two_points_of_a_data_set():
    """Not Gaussian: the shares and the noise at the data, as the flow's own."""
    noise, num = 0.05, 4000
    path, data = fm.cond_ot(sigma_min=noise), jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.3, -1.2]])
    data = data[jnp.array([0, 0, 1, 2])]  # one of them twice
    drift, diffusion = langevin(path, fm.marginal_velocity(path, data), 1.0)
    x0 = jax.random.normal(jax.random.key(0), (num, 2))
    x1 = jit(lambda x0: fm.sample_sde(KEY, drift, diffusion, x0, num_steps=400))(x0)
    distance = np.linalg.norm(np.asarray(x1)[:, None] - np.asarray(data)[None, 1:], axis=-1)
    share = np.bincount(distance.argmin(1), minlength=3) / num
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=4 * np.sqrt(0.25 / num))
    scale = np.sqrt((distance.min(1) ** 2).mean() / 2)
    np.testing.assert_allclose(scale, noise, rtol=0.05)  # 400 steps; 0.6 % is its standard error


@SLOW
def test_a_velocity_of_optimal_pairs_has_no_score():
    """x0 to 0.4 x0: the flow's variance is right, 0.16; with a Langevin term it is 0.06."""

    def paired(t, x):
        return -0.6 / (1 - 0.6 * t) * x

    x0 = jnp.asarray(whitened_normal(20_000, 1))
    drift, diffusion = langevin(fm.cond_ot(), paired, 1.0)
    solver = diffrax.ShARK()
    x1 = jit(lambda x: fm.sample_sde(KEY, drift, diffusion, x, solver=solver, num_steps=100))(x0)
    ode = jit(lambda x0: fm.sample(paired, x0))(x0)
    np.testing.assert_allclose(np.var(ode), 0.16, rtol=1e-4)
    # dV/dt = 2 A V + 2 (1 - t) with A = u / x + (t u / x - 1), by 100,000 steps of Euler's method.
    variance = 1.0
    for t in np.arange(100_000) / 100_000:
        slope = -0.6 / (1 - 0.6 * t) * (1 + t) - 1
        variance += (2 * slope * variance + 2 * (1 - t)) / 100_000
    assert variance < 0.4 * 0.16
    np.testing.assert_allclose(np.var(x1), variance, rtol=0.01 + 4 * np.sqrt(2 / len(x0)))


def increments(key, ts, shape):
    """The normal numbers that a solve draws, divided by the root of the step."""
    path = diffrax.UnsafeBrownianPath(jax.ShapeDtypeStruct(shape, ts.dtype), key)
    pairs = zip(ts[:-1], ts[1:], strict=True)
    return [path.evaluate(t, s) / jnp.sqrt(s - t) for t, s in pairs]


def test_ddpms_ancestral_sampler(x64):
    """Its published loop over betas and noise predictions, with the same normal numbers."""
    path, n = fm.vp(), 12
    _, predict_x0 = gaussian_predictions(path, MEAN, STD)
    velocity = fm.from_x0(path, predict_x0, floor=1e-6)
    x0 = jnp.asarray(whitened_normal(16, 2), jnp.float64)
    drift, diffusion = fm.ancestral_drift(path, velocity, n), fm.ancestral_diffusion(path, n)
    got = jit(lambda x: fm.sample_sde(KEY, drift, diffusion, x, num_steps=n))(x0)

    ts = np.linspace(0, 1, n + 1)
    alpha_bar = np.asarray(path.alpha(jnp.asarray(ts))) ** 2  # from noise to data: it grows
    x, normals = x0, increments(KEY, jnp.asarray(ts), x0.shape)
    for k in range(n):
        beta = 1 - alpha_bar[k] / alpha_bar[k + 1]
        epsilon = predict_x0(ts[k], x)
        mean = (x - beta / np.sqrt(1 - alpha_bar[k]) * epsilon) / np.sqrt(1 - beta)
        variance = (1 - alpha_bar[k + 1]) / (1 - alpha_bar[k]) * beta
        x = mean + np.sqrt(variance) * normals[k]
    np.testing.assert_allclose(got, x, rtol=1e-12, atol=1e-12)


def test_the_last_ancestral_step_draws_nothing():
    """Compiled, (n - 1 + 1) / n need not be 1; past it sigma has no value."""
    counts = range(1, 300)

    @jit
    def last():
        return [fm.ancestral_diffusion(fm.vp(), n)(jnp.float32((n - 1) / n)) for n in counts[::13]]

    np.testing.assert_array_equal(last(), 0)


@SLOW
def test_ancestral_steps_tend_to_langevins_at_one_over_alpha(x64):
    path, x = fm.cosine(), jnp.asarray(whitened_normal(8, 2), jnp.float64)[:1]
    velocity, t = gaussian_velocity(path, MEAN, STD), jnp.asarray(0.5)
    drift, diffusion = langevin(path, velocity, lambda t: 1 / path.alpha(t))
    errors = [
        (
            float(jnp.abs(fm.ancestral_drift(path, velocity, n)(t, x) - drift(t, x)).max()),
            float(jnp.abs(fm.ancestral_diffusion(path, n)(t) - diffusion(t))),
        )
        for n in (1000, 2000)
    ]
    np.testing.assert_allclose(np.divide(*errors), 2, rtol=0.01)
    # From t = 0, where alpha is 0 and 1 / alpha is not, the first step is finite.
    assert np.isfinite(fm.ancestral_drift(path, velocity, 10)(jnp.asarray(0.0), x)).all()


SDE_SOLVERS = ("EulerHeun", "Heun", "Midpoint", "Ralston", "ReversibleHeun", "SEA", "SRA1")
SDE_SOLVERS += ("ShARK", "SPaRK", "SlowRK", "GeneralShARK", "Euler")


@SLOW
@pytest.mark.parametrize("name", SDE_SOLVERS)
def test_every_solver_for_sdes_arrives(name):
    x0 = jnp.zeros((20_000, 1))
    solver = getattr(diffrax, name)()
    x1 = jit(lambda k: fm.sample_sde(k, ornstein, one, x0, solver=solver, num_steps=100))(KEY)
    exact = 0.5 * (1 - np.exp(-2.0))
    np.testing.assert_allclose(np.var(x1), exact, rtol=0.02 + 4 * np.sqrt(2 / 20_000))


@pytest.mark.slow
def test_keys_devices_dtype_and_directions():
    flow = gaussian_flow((2,))
    drift, diffusion = langevin(fm.cond_ot(), flow.velocity, 1.0)
    solve = jit(lambda key, x: fm.sample_sde(key, drift, diffusion, x, num_steps=8))
    x0 = jnp.asarray(whitened_normal(64, 2))
    alone = solve(KEY, x0)
    np.testing.assert_array_equal(solve(KEY, x0), alone)
    assert np.abs(solve(jax.random.key(2), x0) - alone).max() > 0.1
    split = solve(KEY, sharding.shard_batch(x0, sharding.make_mesh()))
    np.testing.assert_allclose(split, alone, rtol=1e-6, atol=1e-6)
    low = solve(KEY, x0.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16 and alone.dtype == jnp.float32
    # x0 and x(1) are rounded to 8 bits, and nothing between them.
    np.testing.assert_allclose(low.astype(jnp.float32), alone, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_forward_derivatives(x64):
    """Of x(1) in the rate of an Ornstein and Uhlenbeck process, for fixed noise."""
    x0 = jnp.asarray(whitened_normal(8, 2), jnp.float64)

    def end(rate):
        return fm.sample_sde(KEY, lambda t, x: -rate * x, one, x0, num_steps=5)

    value = jnp.asarray(0.7)
    _, slope = jit(lambda r: jax.jvp(end, (r,), (jnp.ones(()),)))(value)
    compiled = jit(end)
    difference = (compiled(value + 1e-6) - compiled(value - 1e-6)) / 2e-6
    np.testing.assert_allclose(slope, difference, rtol=1e-8, atol=1e-9)


def test_singular_ends_and_bad_rates_are_refused():
    path, x = fm.vp(), jnp.zeros((3, 2))
    for make in (fm.langevin_diffusion, lambda p, e: fm.langevin_drift(p, ornstein, e)):
        for eta in (-1.0, -1, float("nan"), float("inf"), None, "1", jnp.ones(2)):
            with pytest.raises(ValueError, match="eta must be a finite number, not negative"):
                make(path, eta)
        with pytest.raises(ValueError, match="path must be a path"):
            make(fm.vp, 1.0)
    with pytest.raises(ValueError, match=r"langevin_drift has no finite value.*t = 1"):
        fm.langevin_drift(path, ornstein, 1.0)(jnp.array(1.0), x)
    with pytest.raises(ValueError, match=r"langevin_diffusion has no finite value.*t = 1"):
        fm.langevin_diffusion(path, 1.0)(jnp.array(1.0))
    with pytest.raises(ValueError, match=r"langevin_diffusion has no finite value.*t = 0"):
        fm.langevin_diffusion(fm.cond_ot(), lambda t: 1 / t)(jnp.array(0.0))
    with pytest.raises(ValueError, match=r"eta must not be negative; got eta\(t\) = -0.5"):
        fm.langevin_diffusion(path, lambda t: -t)(jnp.array(0.5))
    with pytest.raises(ValueError, match="velocity must be a function"):
        fm.langevin_drift(path, None, 1.0)
    # A solve that would start there says so, compiled or not.
    drift, diffusion = langevin(path, ornstein, 1.0, reverse=True)

    def solve(x, t0=1.0):
        return fm.sample_sde(KEY, drift, diffusion, x, t0=t0, t1=0.0, num_steps=4)

    for function in (solve, jax.jit(solve)):
        with pytest.raises(ValueError, match=r"langevin_diffusion has no finite value.*t = 1"):
            function(x)
    assert np.isfinite(jax.jit(lambda x: solve(x, 1 - 1e-3))(x)).all()
    with pytest.raises(RuntimeError, match=r"The solve stopped at t = 0.75"):
        jax.block_until_ready(jax.jit(solve)(x, 1.0))
    for n in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="num_steps must be a whole number"):
            fm.ancestral_drift(path, ornstein, n)
        with pytest.raises(ValueError, match="num_steps must be a whole number"):
            fm.ancestral_diffusion(path, n)
    with pytest.raises(ValueError, match=r"ancestral_diffusion has no finite value.*last step"):
        fm.ancestral_diffusion(path, 4)(jnp.array(1.0))


def test_wrong_input_of_a_solve_is_refused():
    x0 = jnp.zeros((3, 2))

    def solve(drift=ornstein, diffusion=one, x0=x0, **options):
        return fm.sample_sde(KEY, drift, diffusion, x0, **{"num_steps": 4} | options)

    for solver in (diffrax.Tsit5(), diffrax.Dopri5(), diffrax.ItoMilstein(), diffrax.ALIGN(0.1)):
        with pytest.raises(ValueError, match="Diffrax's for SDEs with additive noise"):
            solve(solver=solver)
    with pytest.raises(ValueError, match=r"write Euler\(\)"):
        solve(solver=diffrax.Euler)
    with pytest.raises(ValueError, match="an object of Diffrax's; got str 'euler'"):
        solve(solver="euler")
    for n in (0, 2.5, None):
        with pytest.raises(ValueError, match="num_steps must be at least 1, a whole number"):
            solve(num_steps=n)
    for ends in ({"t1": 0.0}, {"t0": np.nan}, {"t1": np.inf}):
        with pytest.raises(ValueError, match="t0 and t1 must"):
            solve(**ends)
    with pytest.raises(ValueError, match=r"A constant is lambda t: 1.0"):
        solve(diffusion=1.0)
    for wrong in (lambda t: jnp.ones(3), lambda t: None):
        with pytest.raises(ValueError, match=r"diffusion\(t\) must return"):
            solve(diffusion=wrong)
    with pytest.raises(ValueError, match=r"diffusion\(t0\) must be finite; got inf at t0 = 0"):
        solve(diffusion=lambda t: 1 / t)
    with pytest.raises(ValueError, match=r"the drift must return.*Nothing is broadcast"):
        solve(drift=lambda t, x: x[:, :1])
    with pytest.raises(ValueError, match="the drift must be a function"):
        solve(drift=None)
    with pytest.raises(ValueError, match="x0 must be floating"):
        solve(x0=jnp.zeros((3, 2), int))
    with pytest.raises(RuntimeError, match=r"The solve stopped at t = 0.75"):
        solve(drift=lambda t, x: jnp.where(t > 0.4, jnp.nan, x))


def test_a_diffusion_that_does_not_match_a_bridge_is_named():
    """In a compiled solve the drift is NaN at the end where it begins."""
    path, field = fm.brownian_bridge(1.0), lambda t, x: jnp.zeros_like(x)
    drift = fm.bridge_drift(path, field, field, lambda t: 0.5)
    with pytest.raises(RuntimeError, match="A bridge's drift is not finite at an end that its"):
        fm.sample_sde(jax.random.key(0), drift, lambda t: 0.5, jnp.ones((2, 1)), num_steps=5)
