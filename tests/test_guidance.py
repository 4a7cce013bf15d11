"""Classifier-free guidance: exact combinations, and the score that it stands for."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

X = jnp.array([[1.0, -2.0, 4.0], [0.5, 8.0, -16.0]])


@pytest.mark.parametrize(("scale", "factor"), [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0), (-1.0, -1.0)])
def test_the_combination(scale, factor):
    """u = t x and c = 3 t x make (1 + 2 scale) t x, in powers of two exact."""
    for s in (scale, jnp.asarray(scale, jnp.float32)):
        velocity = fm.classifier_free_guidance(lambda t, x: 3 * t * x, lambda t, x: t * x, scale=s)
        t = jnp.asarray(0.5, jnp.float32)
        np.testing.assert_array_equal(velocity(t, X), factor * 0.5 * X)
        np.testing.assert_array_equal(jit(velocity)(t, X), factor * 0.5 * X)


def test_a_scale_for_each_example():
    """As many examples as dimensions: the last axis would broadcast without an error."""
    x = X[:, :2]
    for scale in (jnp.array([1.0, 3.0]), [1, 3], np.array([1.0, 3.0])):
        velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, scale)
        for call in (velocity, jit(velocity)):
            got = call(jnp.zeros(()), x)
            np.testing.assert_array_equal(got, np.array([[2.0], [4.0]]) * x)
    images = jnp.ones((2, 2, 2, 2))
    np.testing.assert_array_equal(velocity(jnp.zeros(2), images)[:, 0, 0, 0], [2.0, 4.0])
    for scale in (jnp.ones((2, 1)), jnp.ones(3), jnp.ones((2, 2))):
        velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, scale)
        with pytest.raises(ValueError, match=r"scale must be a number or \[batch\]"):
            velocity(jnp.zeros(()), x)
    with pytest.raises(ValueError, match="scale must be floating; got complex"):
        fm.classifier_free_guidance(lambda t, x: x, lambda t, x: x, 1j)


def test_times_of_a_batch_reach_both():
    velocity = fm.classifier_free_guidance(
        lambda t, x: x + t[:, None], lambda t, x: x - t[:, None], 2.0
    )
    np.testing.assert_array_equal(velocity(jnp.array([1.0, 2.0]), X), X + np.array([[3.0], [6.0]]))


def test_bfloat16_is_kept():
    velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, 3.0)
    got = velocity(jnp.zeros(()), X.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), 4 * X)  # a difference in float32


@pytest.mark.parametrize("name", ["cond_ot", "vp", "cosine"])
def test_the_guided_score_of_two_gaussians(name, x64):
    """The guided velocity's score is s(x) + scale (s(x | c) - s(x)), for N(m, s^2) in closed form.

    The Gaussians' velocities come from their posterior means: test_paths.py checks that.
    """
    path, t, scale, x = PATHS[name], jnp.asarray(0.6), 3.0, jnp.asarray(X, jnp.float64)
    alpha, sigma = (float(f(t)) for f in path)

    def velocity_and_score(mean, std):
        variance = (alpha * std) ** 2 + sigma**2

        def velocity(t, x):
            x1 = mean + alpha * std**2 / variance * (x - alpha * mean)
            return fm.x1_to_velocity(path, t, x, x1)

        return velocity, -(np.asarray(x) - alpha * mean) / variance

    conditional, conditional_score = velocity_and_score(1.5, 0.3)
    unconditional, score = velocity_and_score(-0.2, 1.1)
    guided = fm.classifier_free_guidance(conditional, unconditional, scale)(t, x)
    want = score + scale * (conditional_score - score)
    np.testing.assert_allclose(fm.velocity_to_score(path, t, x, guided), want, rtol=1e-9)
