"""The adversary's losses: constant and linear discriminators, and the optimum of normal data."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianFlow, jit
from oracles import strict_dtypes as strict_dtypes

import fmjax as fm
from fmjax.flow_maps import gradient_penalty, relativistic_losses, transport_cost

X = jax.random.normal(jax.random.key(0), (5, 4, 3))
A = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def test_a_constant_discriminator_gives_log_2():
    losses = relativistic_losses(jnp.full(3, 7.0), jnp.full(3, 7.0))
    np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(gradient_penalty(lambda x: jnp.ones(len(x)), X), 0)


def test_losses_by_hand():
    """A lead of 2 of the real one: the discriminator is content, the generator is not."""
    losses = relativistic_losses(jnp.array([3.0]), jnp.array([1.0]))
    np.testing.assert_allclose(losses.discriminator, np.log1p(np.exp(-2)), rtol=1e-6)
    np.testing.assert_allclose(losses.generator, 2 + np.log1p(np.exp(-2)), rtol=1e-6)


def test_losses_far_apart_neither_overflow_nor_vanish():
    losses = relativistic_losses(jnp.array([300.0]), jnp.array([-300.0]))
    np.testing.assert_allclose(losses.generator, 600, rtol=1e-6)
    slope = jax.grad(lambda d: relativistic_losses(jnp.full(1, 300.0), d).generator[0])
    np.testing.assert_allclose(slope(jnp.full(1, -300.0)), -1)


def test_a_linear_discriminator_has_the_penalty_of_its_weights():
    got = jit(lambda x: gradient_penalty(lambda x: jnp.tensordot(x, A, 2) + 5, x))(X)
    np.testing.assert_allclose(got, np.sum(A**2), rtol=1e-5)


def test_the_penalty_of_a_curved_discriminator_and_its_gradient():
    """D = sum sin(w x): |grad D|^2 = w^2 sum cos^2, whose derivative in w is by differences."""

    def penalty(w):
        return gradient_penalty(lambda x: jnp.sum(jnp.sin(w * x), axis=(1, 2)), X)

    w = jnp.float32(1.3)
    exact = 1.3**2 * np.sum(np.cos(1.3 * np.asarray(X)) ** 2, axis=(1, 2))
    np.testing.assert_allclose(penalty(w), exact, rtol=1e-5)
    x = np.asarray(X, np.float64)
    slope = np.sum(2 * 1.3 * np.cos(1.3 * x) ** 2 - 1.3**2 * x * np.sin(2.6 * x), axis=(1, 2))
    np.testing.assert_allclose(jax.jacfwd(penalty)(w), slope, rtol=1e-4)


def test_the_optimum_for_normal_data_is_the_flow():
    """All x = m + tau R z have the data's distribution; the flow's R = 1 costs least.

    E|m + tau R(angle) z - z|^2 / 2 = |m|^2 / 2 + 1 + tau^2 - 2 tau cos(angle), the mean over z by
    points whose moments are exact.
    """
    mean, tau = np.array([0.7, -0.4]), 0.6
    z = np.sqrt(2) * jnp.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]], jnp.float32)
    for angle in (0.0, 0.5, np.pi):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        x = jnp.asarray(mean + tau * np.asarray(z) @ turn.T, jnp.float32)
        exact = np.sum(mean**2) / 2 + 1 + tau**2 - 2 * tau * np.cos(angle)
        np.testing.assert_allclose(np.mean(transport_cost(z, x)), exact, rtol=1e-5)
    flow = GaussianFlow(mean, np.array([tau, tau]))
    x = jit(lambda z: fm.sample(flow.velocity, z, solver=diffrax.Midpoint(), num_steps=200))(z)
    cost = transport_cost(z, x).mean()
    np.testing.assert_allclose(cost, np.sum(mean**2) / 2 + (1 - tau) ** 2, rtol=1e-4)


def test_dtypes():
    half = X.astype(jnp.bfloat16)
    assert transport_cost(half, half).dtype == jnp.float32
    assert relativistic_losses(half[:, 0, 0], half[:, 0, 1]).generator.dtype == jnp.float32
    # Squares of bfloat16 would have but 8 bits; the gradient itself is bfloat16.
    got = gradient_penalty(lambda x: jnp.sum(x * x, axis=(1, 2)), half)
    exact = np.sum(np.square(2 * np.asarray(half, np.float32)), axis=(1, 2))
    np.testing.assert_allclose(got, exact, rtol=1e-5)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"A column needs \[:, 0\]"):
        relativistic_losses(jnp.ones((3, 1)), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="one shape"):
        relativistic_losses(jnp.ones(3), jnp.ones(1))
    with pytest.raises(ValueError, match="discriminator must return.*One number per example"):
        gradient_penalty(lambda x: x[:, :, 0], X)
    with pytest.raises(ValueError, match="one shape"):
        transport_cost(X, X[:1])
