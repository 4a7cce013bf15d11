"""Learned solvers: the methods that they contain and beat, the fit, what is refused."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianFlow, jit
from oracles import strict_dtypes as strict_dtypes
from oracles import x64 as x64

import fmjax as fm
from fmjax.flow_maps import (
    NonStationary,
    apply_solver,
    check_solver,
    fit_solver,
    fitting,
    from_euler,
    from_midpoint,
)

FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)
X0 = jax.random.normal(jax.random.key(0), (6, 2))


@fm.per_example
def curved(t, x):
    """Neither linear nor autonomous, the coordinates not apart."""
    return jnp.sin(3 * x[::-1]) + jnp.cos(4 * t) * x


APPLY = jit(lambda solver, x0: apply_solver(curved, solver, x0))
FIT = jit(lambda x0, x1: fit_solver(curved, from_euler(2), x0, x1, num_steps=4, num_held_out=2))


class Counter:
    """A velocity that counts its evaluations as they happen, not as they are traced."""

    def __init__(self):
        self.times = []

    def __call__(self, t, x):
        jax.debug.callback(lambda t: self.times.append(float(t)), t)
        return curved(t, x)


def rms(got, exact):
    return float(jnp.sqrt(jnp.mean(jnp.square(got - exact))))


@pytest.mark.parametrize(
    ("solver", "method", "num_steps"),
    [
        (from_euler(5), diffrax.Euler(), 5),
        (from_midpoint(8), diffrax.Midpoint(), 4),
    ],
    ids=["euler_5", "midpoint_8"],
)
def test_the_usual_methods_are_of_this_form(solver, method, num_steps):
    exact = jit(lambda x: fm.sample(curved, x, solver=method, num_steps=num_steps))(X0)
    np.testing.assert_allclose(APPLY(solver, X0), exact, atol=2e-6)


def test_every_entry_of_a_solver_has_its_place():
    """Three evaluations written out, with coefficients of which no two are alike."""
    ts, a = np.array([0.1, 0.4, 0.7]), np.array([0.9, 1.2, 0.7])
    b = np.array([[0.3, 0, 0], [-0.2, 0.5, 0], [0.15, 0.6, 0.25]])
    u0 = curved(ts[0], X0)
    x1 = a[0] * X0 + b[0, 0] * u0
    u1 = curved(ts[1], x1)
    x2 = a[1] * X0 + b[1, 0] * u0 + b[1, 1] * u1
    u2 = curved(ts[2], x2)
    x3 = a[2] * X0 + b[2, 0] * u0 + b[2, 1] * u1 + b[2, 2] * u2
    solver = NonStationary(*(jnp.asarray(part, jnp.float32) for part in (ts, a, b)))
    np.testing.assert_allclose(APPLY(solver, X0), x3, atol=1e-6)


def test_evaluations_are_counted():
    counter = Counter()
    apply_solver(counter, from_midpoint(6), X0).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(counter.times), np.arange(6) / 6, atol=1e-7)


def test_one_step_is_exact_for_normal_data():
    """u(0, x) = m - x, so x1 = (1 + tau) x0 + (m - x0) = m + tau x0: a = 1 + tau, b = 1."""
    flow = GaussianFlow(np.array([0.8, -1.1]), np.array([0.4, 0.4]))
    solver = NonStationary(jnp.zeros(1), jnp.full(1, 1.4), jnp.ones((1, 1)))
    got = apply_solver(flow.velocity, solver, X0)
    np.testing.assert_allclose(got, flow.flow(1.0, X0), atol=1e-6)


def test_the_fit_finds_that_step():
    flow = GaussianFlow(np.array([0.8, -1.1]), np.array([0.4, 0.4]))
    x1 = jnp.asarray(flow.flow(1.0, X0), jnp.float32)
    velocity = fm.per_example(lambda t, x: flow.velocity(t, x[None])[0])
    fitted = jit(lambda x1: fit_solver(velocity, from_euler(1), X0, x1, num_steps=10))(x1)
    assert fitted.rms[0] > 0.1 > 1e-6 > fitted.rms[-1]
    np.testing.assert_allclose(fitted.solver.a, [1.4], atol=1e-5)
    np.testing.assert_allclose(fitted.solver.b, [[1.0]], atol=1e-5)


def test_rms_is_that_of_the_solver_and_never_rises():
    """The start's rms is first; held-out pairs are left out of one and make up the other."""
    x1 = jit(lambda x: fm.sample(curved, x, solver=diffrax.Heun(), num_steps=64))(X0)
    start = from_euler(2)
    fitted = FIT(X0, x1)
    ends = APPLY(start, X0)
    np.testing.assert_allclose(fitted.rms[0], rms(ends[:4], x1[:4]), rtol=1e-5)
    np.testing.assert_allclose(fitted.held_out_rms[0], rms(ends[4:], x1[4:]), rtol=1e-5)
    assert (np.diff(fitted.rms) <= 0).all() and fitted.rms[-1] < 0.5 * fitted.rms[0]
    ends = APPLY(fitted.solver, X0)
    # The end point is computed anew, from times that went through a softmax.
    np.testing.assert_allclose(rms(ends[4:], x1[4:]), fitted.held_out_rms.min(), rtol=1e-3)


def test_a_fit_that_helps_no_held_out_pair_keeps_the_start():
    start = from_euler(2)
    x1 = APPLY(start, X0).at[:4].add(1.0)  # of the held-out ones it is exact
    fitted = FIT(X0, x1)
    assert fitted.rms[-1] < fitted.rms[0] and fitted.held_out_rms[-1] > 0.01
    for got, kept in zip(fitted.solver, start, strict=True):
        np.testing.assert_allclose(got, kept, atol=1e-6)


@pytest.mark.slow
def test_eight_learned_evaluations_beat_the_usual_methods():
    """On points that the fit has not seen, of an exact flow to five points."""
    points = jnp.asarray(np.random.default_rng(1).normal(0, 1.5, (5, 2)), jnp.float32)
    # Of narrower points a few noises lie where the flow parts, and decide the mean square.
    velocity = fm.marginal_velocity(fm.cond_ot(sigma_min=0.3), points)
    x0 = jax.random.normal(jax.random.key(1), (320, 2))
    unseen = jax.random.normal(jax.random.key(2), (512, 2))
    exact = jax.jit(lambda x: fm.sample(velocity, x, stepsize_controller=FINE))
    fit = jax.jit(lambda x0, x1: fit_solver(velocity, from_euler(8), x0, x1, num_held_out=64))
    fitted, ends = fit(x0, exact(x0)), exact(unseen)
    learned = rms(apply_solver(velocity, fitted.solver, unseen), ends)
    for solver, num_steps in (
        (diffrax.Euler(), 8),
        (diffrax.Midpoint(), 4),
        (diffrax.Heun(), 4),
        (diffrax.Tsit5(), 2),
    ):
        usual = rms(fm.sample(velocity, unseen, solver=solver, num_steps=num_steps), ends)
        assert learned < 0.5 * usual, type(solver).__name__


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 4])
def test_the_triangle_holds_the_jacobian_of_forward_mode(n, x64):
    """All of it in the plane; of more coordinates what two projections of every pair see."""
    rng = np.random.default_rng(n)
    b = np.tril(rng.normal(1 / n, 0.2, (n, n)))
    parts = np.arange(n) / n + 0.1 * rng.uniform(size=n) / n, rng.normal(1, 0.2, n), b
    solver = NonStationary(*map(jnp.asarray, parts))
    theta, to_solver = fitting._coordinates(solver)
    for got, given in zip(to_solver(theta), solver, strict=True):
        np.testing.assert_allclose(got, given, atol=1e-12)
    for dim in (2, 5):
        x0, x1 = (jnp.asarray(rng.normal(size=(40, dim))) for _ in range(2))

        @jit
        def both(theta, x0=x0, x1=x1, dim=dim):
            def apart(theta):
                return (apply_solver(curved, to_solver(theta), x0) - x1)[:30]

            def seen(theta):
                """All coordinates, or every pair's two sums with random signs, halved."""
                signs = fitting._directions(x0, 30, 2)[:, :30]
                along = jnp.sum(signs * apart(theta)[None], axis=2) / jnp.sqrt(2.0)
                return (apart(theta) if dim == 2 else along).reshape(-1) / jnp.sqrt(30 * dim)

            residual = fitting._compressed(curved, to_solver, (x0, x1), 30, 2)
            found = []
            for function in (lambda theta: residual(theta)[0], seen):
                r, j = function(theta), jax.jacfwd(function)(theta)
                found.append((j.T @ j, j.T @ r, r @ r))
            rms = jnp.sqrt(jnp.mean(jnp.square(apart(theta))))
            return [*found[0], residual(theta)[1][0]], [*found[1], rms]

        for one, other in zip(*both(theta), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-10)


def test_jit_and_vmap_change_nothing():
    solver = from_midpoint(4)
    one = apply_solver(curved, solver, X0)
    np.testing.assert_allclose(APPLY(solver, X0), one, atol=1e-6)
    each = jit(jax.vmap(lambda x: apply_solver(curved, solver, x[None])[0]))(X0)
    np.testing.assert_allclose(each, one, atol=1e-6)


def test_half_precision_is_solved_in_float32():
    x0 = X0.astype(jnp.bfloat16)
    got, exact = (APPLY(from_euler(5), x) for x in (x0, x0.astype(jnp.float32)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (diffrax.Euler(), "must be NonStationary"),
        (from_euler(4)._replace(ts=from_euler(8).ts), "fit another"),
        (from_euler(4)._replace(b=from_euler(8).b), "fit another"),
        (from_euler(4)._replace(ts=jnp.array([0, 0.5, 0.5, 0.8])), "must increase"),
        (from_euler(4)._replace(ts=jnp.array([0, 0.2, 0.5, 1.0])), r"within \[0, 1\)"),
        (from_euler(4)._replace(b=jnp.ones((4, 4))), "zero above"),
        (from_euler(4)._replace(a=jnp.full(4, jnp.nan)), "finite"),
    ],
)
def test_what_is_no_solver_is_refused(solver, message):
    with pytest.raises(ValueError, match=message):
        apply_solver(curved, solver, X0)


def test_bad_calls_are_refused():
    with pytest.raises(ValueError, match="even.*got 7. Take 8"):
        from_midpoint(7)
    with pytest.raises(ValueError, match="from 1 on; got 0"):
        from_euler(0)
    with pytest.raises(ValueError, match="velocity must return"):
        apply_solver(lambda t, x: x[:, :1], from_euler(2), X0)
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        fit_solver(curved, from_euler(2), X0, X0[:, :1])
    with pytest.raises(ValueError, match="hold out fewer"):
        fit_solver(curved, from_euler(2), X0, X0, num_held_out=5)
    with pytest.raises(ValueError, match="num_held_out must be"):
        fit_solver(curved, from_euler(2), X0, X0, num_held_out=-1)
    with pytest.raises(ValueError, match="num_steps must be"):
        fit_solver(curved, from_euler(2), X0, X0, num_steps=0)


def test_the_memory_of_a_fit_grows_with_the_evaluations_and_not_with_their_square():
    x0 = jnp.zeros((16, 4096))

    def temporaries(n):
        fit = jit(lambda s: fit_solver(lambda t, x: -x, s, x0, x0, num_steps=1, num_projections=16))
        return fit.lower(from_euler(n)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 2.2 * temporaries(8)


def test_pairs_that_are_not_finite_are_refused_or_give_no_solver():
    x0 = jax.random.normal(jax.random.key(0), (16, 2))
    for row in (0, 15):  # fitted, held out
        x1 = (x0 / jnp.e).at[row].set(jnp.nan)
        with pytest.raises(ValueError, match="must be finite"):
            fit_solver(lambda t, x: -x, from_euler(2), x0, x1, num_held_out=4)
        fit = jit(lambda x1: fit_solver(lambda t, x: -x, from_euler(2), x0, x1, num_held_out=4))
        assert all(np.isnan(part).any() for part in fit(x1).solver)


def test_fewer_than_two_hundred_numbers():
    solver = from_euler(17)
    check_solver(solver)
    assert 16 + 17 + np.count_nonzero(np.asarray(solver.b)) == 186
