"""The solves: closed forms, orders of convergence, the true number of evaluations, failures."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_flow, jit, whitened_normal
from oracles import x64 as x64

import fmjax as fm
from fmjax.solve import each

SOLVERS = {
    "euler": (diffrax.Euler(), 1),
    "heun": (diffrax.Heun(), 2),
    "midpoint": (diffrax.Midpoint(), 2),
    "tsit5": (diffrax.Tsit5(), 5),
    "dopri5": (diffrax.Dopri5(), 5),
}
FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)
X = jnp.array([[1.0, -0.5], [0.2, 2.0], [-1.5, 0.7]])


def curved(t, x):
    """dx/dt = -(1 + t) x^2, neither linear nor autonomous: 1 / x grows by t + t^2 / 2."""
    return -(1 + t) * x**2


def curved_flow(t, x0):
    return 1 / (1 / x0 + t + t**2 / 2)


def waves(t, x):
    """dx/dt = 4 cos(8 t) sqrt(1 + x^2): asinh x moves by sin(8 t) / 2."""
    return 4 * jnp.cos(8 * t) * jnp.sqrt(1 + x**2)


def growth(t, x):
    """dx/dt = cos(t) x: x_t = x_0 exp(sin t)."""
    return jnp.cos(t) * x


@pytest.mark.parametrize(("dim", "sigma_min"), [(2, 0.0), (64, 0.1)])
def test_gaussian_to_gaussian(dim, sigma_min):
    """Every sample where the exact flow takes it, hence the moments: the source has (0, 1)."""
    flow = gaussian_flow((dim,), sigma_min)
    x0 = whitened_normal(4 * dim, dim)
    x1 = jit(lambda x0: fm.sample(flow.velocity, x0, stepsize_controller=FINE))(x0)
    x1 = np.asarray(x1, np.float64)
    np.testing.assert_allclose(x1, flow.flow(1.0, x0), atol=1e-4)
    np.testing.assert_allclose(x1.mean(0), flow.mean, atol=1e-4)
    covariance = np.diag(flow.variance(1.0))
    np.testing.assert_allclose(np.cov(x1.T, bias=True), covariance, atol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, x64):
    solver, order = SOLVERS[name]
    num_steps = (32, 64, 128)
    x0 = jnp.array([[0.5, 1.0, -1.5]])
    want = np.sinh(np.arcsinh(x0) + np.sin(8.0) / 2)
    errors = []
    for n in num_steps:
        x1 = jit(lambda x0, n=n: fm.sample(waves, x0, solver=solver, num_steps=n))(x0)
        errors.append(np.linalg.norm(x1 - want))
    slope = np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
    # The order is that of the limit: at these steps the next term moves it by up to a fifth.
    np.testing.assert_allclose(-slope, order, atol=0.3)


SOLVERS_OF_DIFFRAX = [
    getattr(diffrax, name)()
    for name in ("Bosh3", "Dopri5", "Dopri8", "Heun", "Midpoint", "Ralston", "Tsit5")
]


class Counter:
    """Counts the calls of a velocity as it runs, inside a compiled solve as well."""

    def __init__(self, velocity):
        self.velocity, self.count = velocity, 0

    def __call__(self, t, x):
        jax.debug.callback(self.add)
        return self.velocity(t, x)

    def add(self):
        self.count += 1


def jump(t, x):
    """A jump that no step can cross at the default tolerance: steps are rejected before it."""
    return jnp.where(t < 0.5, 1.0, -40.0) * x


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_num_evaluations_is_the_number_of_calls(name, adaptive):
    solver, _ = SOLVERS[name]
    if adaptive and name == "euler":
        return  # it has no error estimate, and is refused below
    how = {} if adaptive else {"num_steps": 10}
    velocity = Counter(jump)
    got = jit(lambda x: fm.integrate(velocity, x, solver=solver, **how).num_evaluations)(X)
    jax.effects_barrier()
    assert got == velocity.count
    if not adaptive:
        assert got == {"euler": 10, "heun": 20, "midpoint": 20, "tsit5": 61, "dopri5": 61}[name]


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS_OF_DIFFRAX, ids=lambda s: type(s).__name__)
def test_evaluations_with_rejected_first_steps_are_counted(solver):
    """A first step rejected again and again evaluates its first stage each time, FSAL or not."""

    # A first step of a tenth is twenty times too long.
    forwards, backwards = Counter(lambda t, x: -200 * x), Counter(lambda t, x: 200 * x)
    coarse = diffrax.PIDController(rtol=1e-2, atol=1e-2)
    how = {"solver": solver, "stepsize_controller": coarse}
    got = jit(lambda x: fm.integrate(forwards, x, **how).num_evaluations)(X)
    of_log_prob = jit(lambda x: fm.integrate_log_prob(backwards, x, **how).num_evaluations)(X)
    jax.effects_barrier()
    assert (int(got), int(of_log_prob)) == (forwards.count, backwards.count)


def test_jump_times_are_stepped_to_and_counted():
    """Errors of the default at a jump are many tolerances; a step that ends on it has none."""
    half = jnp.array([0.5])
    jumps = diffrax.ClipStepSizeController(FINE, jump_ts=half)
    for t0, t1 in ((0.0, 1.0), (1.0, 0.0)):
        velocity = Counter(lambda t, x: jnp.where(t < 0.5, -1.0, 1.0) * x)
        got = jit(
            lambda x, v=velocity, t0=t0, t1=t1: fm.integrate(
                v, x, t0=t0, t1=t1, stepsize_controller=jumps
            )
        )(X)
        jax.effects_barrier()
        assert int(got.num_evaluations) == velocity.count
        np.testing.assert_allclose(got.x[-1], X, rtol=2e-6)


def test_the_jump_makes_rejected_steps():
    """What the counts above are worth, asked of Diffrax."""

    @jit
    def rejected(y0):
        term = diffrax.ODETerm(lambda t, y, args: jump(t, y))
        controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
        solution = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.0, 0.01, y0, stepsize_controller=controller
        )
        return solution.stats["num_rejected_steps"]

    assert rejected(X) >= 3


@pytest.mark.slow
def test_trajectories_in_both_directions():
    ts = jnp.array([0.0, 0.13, 0.5, 0.77, 1.0])
    forwards = jit(lambda x: fm.integrate(growth, x, ts=ts, stepsize_controller=FINE))(X)
    np.testing.assert_array_equal(forwards.t, ts)
    want = np.exp(np.sin(ts))[:, None, None] * X[None]
    np.testing.assert_allclose(forwards.x, want, rtol=1e-5)

    @jit
    def back(x, ts):
        return fm.integrate(growth, x, t0=1.0, t1=0.0, ts=ts, stepsize_controller=FINE)

    backwards = back(forwards.x[-1], ts[::-1])
    np.testing.assert_array_equal(backwards.t, ts[::-1])
    np.testing.assert_allclose(backwards.x, want[::-1], rtol=2e-5)
    np.testing.assert_allclose(backwards.x[-1], X, rtol=2e-5)  # there and back


def test_without_ts_the_end_alone_and_other_intervals():
    trajectory = jit(lambda x: fm.integrate(growth, x, t0=0.2, t1=0.9, num_steps=8))(X)
    np.testing.assert_array_equal(trajectory.t, np.float32([0.9]))
    want = np.exp(np.sin(0.9) - np.sin(0.2)) * X
    np.testing.assert_allclose(trajectory.x[0], want, rtol=1e-6)
    assert trajectory.x.shape == (1, *X.shape)


def test_the_default_is_adaptive_at_1e_5():
    controller = diffrax.PIDController(rtol=1e-5, atol=1e-5)
    given = jit(lambda x: fm.integrate(growth, x, stepsize_controller=controller))(X)
    default = jit(lambda x: fm.integrate(growth, x, solver=diffrax.Tsit5()))(X)
    assert given.num_evaluations == default.num_evaluations
    np.testing.assert_allclose(default.x, given.x, rtol=1e-7)
    np.testing.assert_allclose(default.x[0], np.exp(np.sin(1.0)) * X, rtol=1e-4)  # the tolerance


def test_a_grid_of_ones_own():
    grid = diffrax.StepTo(jnp.array([0.0, 0.5, 0.75, 1.0]))
    how = {"solver": diffrax.Euler(), "stepsize_controller": grid}
    got = jit(lambda x: fm.integrate(growth, x, **how))(X)
    factor = (1 + 0.5) * (1 + 0.25 * np.cos(0.5)) * (1 + 0.25 * np.cos(0.75))
    np.testing.assert_allclose(got.x[-1], factor * X, rtol=1e-6)
    assert got.num_evaluations == 3


@pytest.mark.slow
def test_jit_vmap_and_sample_agree():
    def one(x):
        return fm.sample(curved, x, num_steps=4)

    x0 = jnp.abs(X)
    eager = one(x0)
    np.testing.assert_allclose(jit(one)(x0), eager, rtol=1e-6)
    np.testing.assert_allclose(jit(jax.vmap(lambda x: one(x[None])[0]))(x0), eager, rtol=1e-6)
    np.testing.assert_allclose(eager, curved_flow(1.0, x0), rtol=5e-4)


@pytest.mark.slow
def test_bfloat16_is_solved_in_float32():
    seen = set()

    def velocity(t, x):
        seen.add((t.dtype, x.dtype))
        return growth(t, x).astype(jnp.bfloat16 if x.dtype == jnp.bfloat16 else x.dtype)

    solve = jit(lambda x: fm.sample(velocity, x, num_steps=4))
    low = solve(X.astype(jnp.bfloat16))
    assert seen == {(jnp.dtype("float32"), jnp.dtype("float32"))}
    assert low.dtype == jnp.bfloat16
    high = solve(X.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))


@pytest.mark.slow
def test_float32_stays_float32_under_x64(x64):
    """In the result, and in what the velocity is given, by fixed and by adaptive steps."""
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.float64, 1e-8)):
        for how in ({"num_steps": 8, "ts": jnp.array([0.5, 1.0])}, {"stepsize_controller": FINE}):
            seen = set()

            def velocity(t, x, seen=seen):
                seen.add((t.dtype, x.dtype))
                return growth(t, x)

            solve = jit(lambda x, v=velocity, how=how: fm.integrate(v, x, **how))
            trajectory = solve(X.astype(dtype))
            assert seen == {(jnp.dtype(dtype), jnp.dtype(dtype))}
            assert (trajectory.t.dtype, trajectory.x.dtype) == (dtype, dtype)
            want = np.exp(np.sin(1.0)) * np.asarray(X, np.float64)
            # The adaptive solve is as good as its tolerance of 1e-6.
            rtol = tolerance if "num_steps" in how else 1e-5
            np.testing.assert_allclose(trajectory.x[-1], want, rtol=rtol)


def test_errors_of_use():
    def refused(match, **kwargs):
        with pytest.raises(ValueError, match=match):
            fm.integrate(growth, X, **kwargs)

    refused("excludes stepsize_controller", num_steps=5, stepsize_controller=FINE)
    refused("num_steps must be at least 1", num_steps=0)
    refused("Euler has no error estimate", solver=diffrax.Euler())
    refused("by num_steps; got ConstantStepSize", stepsize_controller=diffrax.ConstantStepSize())
    refused("explicit Runge-Kutta", solver=diffrax.Kvaerno3())
    refused("explicit Runge-Kutta", solver=diffrax.ImplicitEuler(), num_steps=5)
    for solver in (diffrax.HalfSolver(diffrax.Euler()), diffrax.HalfSolver(diffrax.Tsit5())):
        refused("explicit Runge-Kutta.*got HalfSolver", solver=solver)
    refused("t0 and t1 must differ", t0=0.5, t1=0.5)
    refused("t0 and t1 must differ, in float32 too", t0=1.0, t1=1.0 + 1e-9)
    refused("t0 must be a single real number", t0=jnp.zeros(3))
    refused("t1 must be a single real number", t1=1j)
    for ts in ([0.0, 0.7, 0.3], [-0.1, 0.5], [0.5, 1.1]):
        refused("must run in order from t0 = 0.0 to t1 = 1.0", ts=jnp.array(ts))
    refused("must run in order from t0 = 1.0", t0=1.0, t1=0.0, ts=jnp.array([0.0, 1.0]))
    for ts in (jnp.array(0.5), jnp.zeros((0,)), jnp.zeros((2, 2))):
        refused("ts must be a vector", ts=ts)


NAN = float("nan")


@pytest.mark.parametrize("solve", [fm.sample, fm.log_prob, each.sample_each, each.log_prob_each])
def test_no_bound_of_a_solve_is_nan(solve):
    for how in ({"t1": NAN}, {"t0": NAN}, {"t1": np.inf}):
        with pytest.raises(ValueError, match="t0 and t1 must be finite"):
            solve(growth, X, **how)
    controller = diffrax.PIDController(rtol=NAN, atol=1e-5)
    with pytest.raises(ValueError, match="stepsize_controller must have no NaN"):
        solve(growth, X, stepsize_controller=controller)
    # Where its value is not known in time, the solve itself says so.
    with pytest.raises(RuntimeError, match="an end of the interval is not finite"):
        jax.block_until_ready(jit(lambda t: solve(growth, X, t1=t))(NAN))


def test_no_time_that_is_wanted_is_nan():
    for ts in ([0.0, NAN, 1.0], [NAN], [0.0, 1.0, NAN]):
        with pytest.raises(ValueError, match="ts must run in order"):
            fm.integrate(growth, X, ts=jnp.array(ts))


def bad_after(t_bad, value):
    return lambda t, x: jnp.where(t > t_bad, value, 1.0) * x


# An adaptive solve narrows down to the time itself, fixed steps to the step of 0.1.
FAILURES = {
    "nan": (bad_after(0.374, jnp.nan), {}, r"stopped at t = 0\.374: the state, the vel"),
    "inf": (bad_after(0.374, jnp.inf), {}, r"stopped at t = 0\.374: the state, the vel"),
    "fixed": (bad_after(0.55, jnp.nan), {"num_steps": 10}, r"t = 0\.(5|6): the state, the vel"),
    "steps": (bad_after(0.5, -1e3), {"max_steps": 40}, r"t = 0\.(49|5)\d*: max_steps = 40 were"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_name_the_time(name):
    velocity, how, message = FAILURES[name]
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(jit(lambda x: fm.sample(velocity, x, **how))(X))
    if name in ("nan", "steps"):
        with pytest.raises(RuntimeError, match=message):
            fm.sample(velocity, X, **how)


def test_failures_backwards_in_time():
    velocity = bad_after(0.0, 1.0)

    def until(t, x):
        return jnp.where(t < 0.374, jnp.nan, velocity(t, x))

    solve = lambda x: fm.sample(until, x, t0=1.0, t1=0.0)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"stopped at t = 0\.374"):
        jax.block_until_ready(jit(solve)(X))
    with pytest.raises(RuntimeError, match=r"stopped at t = 0\.374"):
        jax.block_until_ready(jit(jax.vmap(lambda x: solve(x[None])))(X))


@pytest.mark.slow
def test_a_failure_under_grad_is_named():
    velocity = bad_after(0.374, jnp.nan)
    with pytest.raises(RuntimeError, match=r"stopped at t = 0\.374"):
        jax.block_until_ready(jit(jax.grad(lambda x: fm.sample(velocity, x).sum()))(X))


@pytest.mark.slow
@pytest.mark.parametrize("length", [1e-2, 1e-6])
@pytest.mark.parametrize("solve", [fm.sample, each.sample_each])
def test_a_short_interval_is_no_stall(length, solve):
    """x = exp((1 - cos 30) / 3) at the end of 30 radians, however short they are made."""
    rate = 30 / length

    def velocity(t, x):
        return rate / 3 * jnp.sin(rate * t) * x

    x1 = jit(lambda x: solve(velocity, x, t1=length))(X)
    np.testing.assert_allclose(x1, np.exp((1 - np.cos(30)) / 3) * X, rtol=1e-4)


@pytest.mark.parametrize("solve", [fm.sample, each.sample_each])
def test_fine_structure_near_the_start_is_no_stall(solve):
    """Steps are far below 1e-6 at first, and the solve arrives; its end is off by the tolerance.

    The root is resolved from 1e-9 on, where one step covers many orders of magnitude of t.
    """
    slope = lambda t, x: 0.5 / jnp.sqrt(t) * jnp.ones_like(x)  # noqa: E731
    x1 = jit(lambda x: solve(slope, x, t0=1e-9))(X)
    np.testing.assert_allclose(x1, X + 1 - np.sqrt(1e-9), atol=2e-3)  # Diffrax's own is 9e-4 off


TRACED = {"adaptive": {}, "equal steps": {"num_steps": 16}}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRACED)
def test_ends_may_be_traced(name):
    """dx/dt = -x / 2: under jit, vmap and grad, in both ends, forwards and backwards."""
    decay, how = (lambda t, x: -0.5 * x), TRACED[name]

    def end(t0, t1):
        return fm.sample(decay, X, t0=t0, t1=t1, **how)

    for t0, t1 in ((0.0, 0.5), (1.0, 0.25)):
        want = np.exp(-0.5 * (t1 - t0)) * X
        np.testing.assert_allclose(jit(end)(t0, t1), want, rtol=1e-5)
        of_t0, of_t1 = jit(jax.jacrev(end, (0, 1)))(t0, t1)
        np.testing.assert_allclose(of_t1, -0.5 * want, rtol=2e-5)
        np.testing.assert_allclose(of_t0, 0.5 * want, rtol=2e-5)
    t1 = jnp.array([0.5, 1.0, 2.0])
    many = jit(jax.vmap(end, (None, 0)))(0.0, t1)
    np.testing.assert_allclose(many, np.exp(-0.5 * t1)[:, None, None] * X[None], rtol=1e-5)
    log_p = jit(lambda t0: fm.log_prob(decay, X, t0=t0, **how))(0.5)
    want = fm.standard_normal_log_prob(np.exp(0.25) * X) + 0.5 * 0.5 * 2
    np.testing.assert_allclose(log_p, want, rtol=1e-5)
    if name == "adaptive":  # an interval of no length ends where it starts
        np.testing.assert_array_equal(jit(end)(0.5, 0.5), X)


def test_ends_of_each_may_be_traced():
    solve = jit(lambda t0, t1: each.sample_each(growth, X, t0=t0, t1=t1))
    for t0, t1 in ((0.2, 0.9), (0.9, 0.2)):
        want = np.exp(np.sin(t1) - np.sin(t0)) * X
        np.testing.assert_allclose(solve(t0, t1), want, rtol=1e-4)


@pytest.mark.slow
def test_gradients_in_ts_are_the_velocity():
    """At both ends too, where a clip would halve them."""
    ts = jnp.array([0.0, 0.5, 1.0])
    states = lambda ts: fm.integrate(growth, X, ts=ts, num_steps=32).x[:, 0, 0]  # noqa: E731
    got = jnp.diag(jit(jax.jacrev(states))(ts))
    want = np.cos(ts) * np.exp(np.sin(ts)) * X[0, 0]
    np.testing.assert_allclose(got, want, rtol=1e-3)  # the slope of an interpolant


@pytest.mark.slow
def test_backsolve_adjoint():
    """Diffrax's adjoints pass through: the gradient by solving back in time."""
    adjoint = diffrax.BacksolveAdjoint()
    total = lambda x: fm.sample(growth, x, adjoint=adjoint).sum()  # noqa: E731
    want = np.full_like(X, np.exp(np.sin(1.0)))
    np.testing.assert_allclose(jit(jax.grad(total))(X), want, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"num_steps": 8}, {"stepsize_controller": FINE}])
def test_gradients_in_a_parameter_and_in_x0(how):
    """x_1 = x_0 exp(a sin 1) has the derivatives sin(1) x_1 and exp(a sin 1)."""

    def total(a, x):
        return fm.sample(lambda t, x: a * growth(t, x), x, **how).sum()

    of_a, of_x = jit(jax.grad(total, (0, 1)))(jnp.asarray(0.7), X)
    factor = np.exp(0.7 * np.sin(1.0))
    np.testing.assert_allclose(of_a, np.sin(1.0) * factor * np.asarray(X).sum(), rtol=2e-5)
    np.testing.assert_allclose(of_x, np.full_like(X, factor), rtol=2e-5)


def test_forward_mode_with_the_direct_adjoint():
    def flow(a):
        velocity = lambda t, x: a * growth(t, x)  # noqa: E731
        return fm.sample(velocity, X, num_steps=8, adjoint=diffrax.DirectAdjoint())

    x1, tangent = jit(lambda a: jax.jvp(flow, (a,), (jnp.ones_like(a),)))(jnp.asarray(0.7))
    np.testing.assert_allclose(tangent, np.sin(1.0) * x1, rtol=2e-5)


@pytest.mark.parametrize("solve", [fm.sample, fm.log_prob])
@pytest.mark.parametrize("velocity", [lambda t, x: x[:, :1], lambda t, x: x[0], lambda t, x: 1.0])
def test_a_velocity_of_another_shape_is_refused_not_broadcast(solve, velocity):
    with pytest.raises(ValueError, match="the velocity must return a floating array of the shape"):
        solve(velocity, jnp.ones((2, 2)), num_steps=1)


@pytest.mark.parametrize("solve", [fm.sample, fm.log_prob])
def test_integers_are_refused(solve):
    with pytest.raises(ValueError, match="must be floating; got uint8"):
        solve(lambda t, x: x, jnp.ones((2, 2), jnp.uint8))
