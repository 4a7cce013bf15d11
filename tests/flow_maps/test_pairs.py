"""Pairs of ends: exact on Gaussians, there and back, and how straight their paths are."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_flow, jit
from oracles import strict_dtypes as strict_dtypes

import fmjax as fm
from fmjax.flow_maps import flow_pairs, invert_pairs, straightness

FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)
FLOW = gaussian_flow((3,))
X0 = jax.random.normal(jax.random.key(0), (8, 3))


INVERT = jit(
    lambda x1, t0, t1: invert_pairs(FLOW.velocity, x1, t0=t0, t1=t1, stepsize_controller=FINE)
)


def reflowed(t, x):
    """The flow that matches the pairs of FLOW exactly: x_t = (1 - t) x0 + t (m + s x0)."""
    mean, std = jnp.asarray(FLOW.mean, x.dtype)[None], jnp.asarray(FLOW.std, x.dtype)[None]
    return mean + (std - 1) * (x - t * mean) / (1 - t + t * std)


def test_pairs_of_a_gaussian():
    x0, x1 = jit(lambda x: flow_pairs(FLOW.velocity, x, stepsize_controller=FINE))(X0)
    np.testing.assert_array_equal(x0, X0)
    np.testing.assert_allclose(x1, FLOW.flow(1.0, X0), atol=1e-5)


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.2, 0.7)])
def test_inverted_pairs_of_data(t0, t1):
    """t0 and t1 name the source and the data, as in the solve from source to data."""
    start, data = (jnp.asarray(FLOW.flow(t, X0), jnp.float32) for t in (t0, t1))
    x0, x1 = INVERT(data, t0, t1)
    np.testing.assert_array_equal(x1, data)
    np.testing.assert_allclose(x0, start, atol=2e-5)


def test_reflow_of_exact_pairs_is_one_euler_step():
    """Flow matching on the pairs has a linear velocity of loss zero, whose paths are straight."""
    x1 = jnp.asarray(FLOW.flow(1.0, X0), jnp.float32)
    t = jnp.linspace(0.05, 0.95, len(X0))
    pairs = fm.sample_path(fm.cond_ot(), X0, x1, t)
    velocity = fm.per_example(lambda t, x: reflowed(t, x[None])[0])
    np.testing.assert_allclose(fm.cfm_loss(velocity, pairs), 0, atol=1e-9)
    at_0 = jnp.zeros(())
    np.testing.assert_allclose(X0 + reflowed(at_0, X0), x1, atol=1e-5)
    assert np.abs(X0 + FLOW.velocity(at_0, X0) - x1).max() > 0.5


@jit
def measured(straight, x0, t0, t1):
    """The straightness of one of the two flows: compiled once for all tests."""

    def velocity(t, x):
        return jnp.where(straight, reflowed(t, x), FLOW.velocity(t, x))

    return straightness(velocity, x0, t0=t0, t1=t1, stepsize_controller=FINE)


@pytest.mark.slow
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.2, 0.6), (0.6, 0.2)])
def test_straightness_of_a_gaussian(t0, t1):
    """x_t = t m + sqrt(S_t) x0, so u - (x1 - x0) / (t1 - t0) is (d/dt sqrt(S_t) - its mean) x0."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t = (t0 + (t1 - t0) * (nodes + 1) / 2)[:, None]
    rate = (t * FLOW.std**2 - (1 - t)) / np.sqrt(FLOW.variance(t))
    mean = (np.sqrt(FLOW.variance(t1)) - np.sqrt(FLOW.variance(t0))) / (t1 - t0)
    integral = abs(t1 - t0) / 2 * weights @ (rate - mean) ** 2
    start = np.sqrt(FLOW.variance(t0))
    x0 = jnp.asarray(t0 * FLOW.mean + start * np.asarray(X0), jnp.float32)
    exact = np.mean(integral * np.asarray(X0) ** 2, axis=1)
    np.testing.assert_allclose(measured(False, x0, t0, t1), exact, rtol=1e-3)


def test_straightness_of_straight_paths_is_zero():
    np.testing.assert_allclose(measured(True, X0, 0.0, 1.0), 0, atol=1e-9)
    # A point of the path at 0.25; the way that is left is as straight.
    x = 0.75 * X0 + 0.25 * jnp.asarray(FLOW.flow(1.0, X0), jnp.float32)
    np.testing.assert_allclose(measured(True, x, 0.25, 0.75), 0, atol=1e-9)


@pytest.mark.slow
def test_a_batch_is_solved_as_its_members():
    solve = functools.partial(straightness, FLOW.velocity, solver=diffrax.Euler(), num_steps=4)
    one = jit(solve)(X0)
    np.testing.assert_allclose(jit(jax.vmap(lambda x: solve(x[None])[0]))(X0), one, rtol=1e-5)
    assert jax.eval_shape(solve, X0.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("make", [flow_pairs, invert_pairs, straightness])
def test_a_teacher_of_another_event_shape_is_refused(make):
    with pytest.raises(ValueError, match="velocity must return a floating array of the shape"):
        make(lambda t, x: x[:, :2], X0)
    with pytest.raises(ValueError, match="must be floating"):
        make(FLOW.velocity, jnp.ones((2, 3), jnp.int32))
