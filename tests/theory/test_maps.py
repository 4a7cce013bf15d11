"""Theorem 3: the field of a map, and the many maps of one family of marginals.

Given a data point the path's own map is psi_t(x) = sigma x + alpha x1. A field whose flow it is has
at y the value d/dt psi_t(psi_t^-1(y)), and no other. With J the quarter turn, w = omega J (y -
alpha x1) turns about the mean: div(p_t w) = 0, so the marginals stay and the map is another.

Source: Lipman et al. 2022, arXiv 2210.02747 (theorem 3).
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, jit, quick_on
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

X1, OMEGA = np.array([[1.0, -0.5]]), 2.0
TURN = np.array([[0.0, -1.0], [1.0, 0.0]])
TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-10)
POINTS = np.random.default_rng(0).standard_normal((6, 2))


def field_of(path):
    """u(y) given the data point, in terms of y: `x1_to_velocity` of a constant."""
    return lambda t, x: fm.x1_to_velocity(path, t, x, jnp.broadcast_to(jnp.asarray(X1), x.shape))


def turning(path):
    """The same and a turn about the mean."""
    return lambda t, x: field_of(path)(t, x) + OMEGA * (x - path.alpha(t) * X1) @ TURN.T


@quick_on("cond_ot_0.1")
def test_the_field_is_read_off_the_map(name, x64):
    """At any y and t it is u_t of the one pair that passes y at t."""
    path, y, t = PATHS[name], jnp.asarray(POINTS), jnp.asarray(np.linspace(0.1, 0.9, 6))
    alpha, sigma = (f(t)[:, None] for f in path)
    x0 = (y - alpha * X1) / sigma
    got = fm.sample_path(path, x0, jnp.broadcast_to(jnp.asarray(X1), y.shape), t)
    np.testing.assert_allclose(got.x_t, y, atol=1e-12)
    np.testing.assert_allclose(field_of(path)(t, y), got.u_t, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_both_flows_and_their_one_density(name, x64):
    """sigma x + alpha x1, and sigma R(omega t) x + alpha x1; the log-densities are the same."""
    path, x = PATHS[name], jnp.asarray(POINTS)
    times = jnp.array([0.0, 0.3, 0.6, 0.9])
    start_alpha, start_sigma = (f(jnp.zeros(())) for f in path)  # 0 and 1 but for vp
    begin = start_sigma * x + start_alpha * X1

    def source(y):
        return fm.standard_normal_log_prob((y - start_alpha * X1) / start_sigma) - 2 * jnp.log(
            start_sigma
        )

    @jit
    def solve(t):
        tight = {"t1": t, "stepsize_controller": TIGHT, "source_log_prob": source}
        return [fm.sample_and_log_prob(f(path), begin, **tight) for f in (field_of, turning)]

    for t in times[1:]:
        alpha, sigma = (f(t) for f in path)
        with jax.numpy_dtype_promotion("standard"):  # Diffrax relies on it
            (plain, plain_log_p), (turned, turned_log_p) = solve(t)
        angle = OMEGA * float(t)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        np.testing.assert_allclose(plain, sigma * x + alpha * X1, atol=1e-8)
        np.testing.assert_allclose(turned, sigma * x @ rotation.T + alpha * X1, atol=1e-8)
        want = fm.standard_normal_log_prob(x) - 2 * jnp.log(sigma)  # |R x| = |x|
        np.testing.assert_allclose(plain_log_p, want, atol=1e-8)
        np.testing.assert_allclose(turned_log_p, want, atol=1e-8)
        assert abs(plain - turned).max() > 0.1 * sigma


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_the_turn_adds_energy_and_no_flux(name, x64):
    """div(p w) = p (div w + w . grad log p) = 0; E|u + w|^2 = E|u|^2 + 2 omega^2 sigma^2."""
    path, y, t = PATHS[name], jnp.asarray(POINTS), jnp.array(0.6)
    alpha, sigma = (f(t) for f in path)

    def turn(t, x):
        return turning(path)(t, x) - field_of(path)(t, x)

    w, div = fm.exact_divergence()(turn, t, y)
    score = fm.velocity_to_score(path, t, y, field_of(path)(t, y))
    np.testing.assert_allclose(score, (alpha * X1 - y) / sigma**2, rtol=1e-9)
    np.testing.assert_allclose(div + (w * score).sum(1), 0, atol=1e-9)
    # Four points with the moments of the normal: exact for squares of linear fields.
    nodes = np.sqrt(2) * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    x = sigma * nodes + alpha * X1
    plain, turned = ((f(path)(t, x) ** 2).sum(1).mean() for f in (field_of, turning))
    np.testing.assert_allclose(turned - plain, 2 * OMEGA**2 * sigma**2, rtol=1e-9)
