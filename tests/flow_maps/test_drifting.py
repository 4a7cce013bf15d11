"""The drift: by hand, its symmetries, its equilibrium."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes
from oracles import x64 as x64

from fmjax.flow_maps import drift, drifting_loss

RNG = np.random.default_rng(0)
X: Any = RNG.normal(size=(5, 3))
P: Any = RNG.normal(size=(6, 3)) + 0.7
N: Any = RNG.normal(size=(4, 3)) - 0.4
NO_LIST: Any = 0.1
RS = (0.05, 0.3)


def by_hand(x, p, n, temperatures, masked):
    """The formula at the top of the module, product by product."""
    x, p, n = (np.asarray(rows).reshape(len(rows), -1) for rows in (x, p, n))
    y = np.concatenate([n, p])
    d = np.array([[np.linalg.norm(a - b) for b in y] for a in x])
    pair = np.array([[not (masked and i == j) for j in range(len(y))] for i in range(len(x))])
    mean = d[pair].mean()
    total = np.zeros_like(x)
    for R in temperatures:
        e = np.exp(-d / mean / R) * pair
        a = np.sqrt(e / e.sum(1, keepdims=True) * e / e.sum(0, keepdims=True))
        force = np.zeros_like(x)
        for i in range(len(x)):
            for j in range(len(p)):
                for k in range(len(n)):
                    force[i] += a[i, len(n) + j] * a[i, k] * (p[j] - n[k])
        total += force / np.sqrt(np.mean(force**2))
    return total * mean / np.sqrt(x.shape[1]), mean / np.sqrt(x.shape[1])


def test_the_formula(x64):
    got = jit(lambda x, p, n: drift(x, p, n, temperatures=RS))(X, P, N)
    np.testing.assert_allclose(got, by_hand(X, P, N, RS, False)[0], rtol=1e-12)


def test_no_example_pushes_itself(x64):
    exact, unit = by_hand(X, P, X, RS, True)
    np.testing.assert_allclose(drift(X, P, temperatures=RS), exact, rtol=1e-11)
    loss, slope = jax.value_and_grad(lambda x: drifting_loss(x, P, temperatures=RS).sum())(
        jnp.asarray(X)
    )
    np.testing.assert_allclose(loss, np.sum(exact**2) / 3 / unit**2, rtol=1e-11)
    np.testing.assert_allclose(slope, -2 * exact / 3 / unit**2, rtol=1e-11)


def test_one_point_between_two():
    """Halfway between a positive and a negative: the term is of size 1 and points to the one."""
    got = drift(jnp.zeros((1, 2)), jnp.array([[3.0, 0]]), jnp.array([[-3.0, 0]]))
    unit = 3 / np.sqrt(2)  # the mean distance is 3
    np.testing.assert_allclose(got, [[3 * np.sqrt(2) * unit, 0]], rtol=1e-6)


def test_exchanged_sets_change_the_sign_and_equal_ones_give_zero(x64):
    np.testing.assert_allclose(drift(X, P, N), -drift(X, N, P), rtol=1e-10)
    assert np.abs(drift(X, P, N)).max() > 0.1
    np.testing.assert_array_equal(drift(X, P, P), 0)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equal_sets_in_another_order_give_zero_up_to_rounding(offset):
    p = jnp.asarray(RNG.normal(size=(64, 3)) + offset, jnp.float32)
    x = jnp.asarray(RNG.normal(size=(32, 3)) + offset, jnp.float32)
    assert np.abs(drift(x, p, p[::-1])).max() < 0.1
    assert np.abs(drift(x, p, p[::-1] + 0.1)).max() > 1


def test_it_moves_turns_and_grows_with_the_points(x64):
    turn = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
    expected = np.asarray(drift(X, P, N))
    np.testing.assert_allclose(drift(X + 1e3, P + 1e3, N + 1e3), expected, rtol=1e-9)
    np.testing.assert_allclose(drift(X @ turn, P @ turn, N @ turn), expected @ turn, rtol=1e-9)
    np.testing.assert_allclose(drift(1e3 * X, 1e3 * P, 1e3 * N), 1e3 * expected, rtol=1e-9)
    images = [a.reshape(-1, 3, 1) for a in (X, P, N)]
    np.testing.assert_allclose(drift(*images), expected[..., None], rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(scale):
    sets = [jnp.asarray(points, jnp.float32) for points in (X, P, N)]
    expected = drift(*sets)
    np.testing.assert_allclose(drift(*(scale * s for s in sets)) / scale, expected, rtol=1e-3)
    assert np.isnan(drift(sets[0].at[0, 0].set(jnp.nan), *sets[1:])).any()


def test_sets_far_apart_still_attract():
    """Weights of e^-100 and less, whose products have no float32."""
    x = jnp.asarray(X, jnp.float32)
    got = np.asarray(drift(x, x + jnp.array([[1e4, 0, 0]]), temperatures=[0.001]))
    mean = 1e4 * 25 / 45  # of 25 pairs far apart, and 20 near by
    np.testing.assert_allclose(np.sqrt(np.mean(got**2)), mean / np.sqrt(3), rtol=1e-3)
    assert (got[:, 0] > 0).all()


def test_a_generator_of_two_numbers_reaches_normal_data():
    """Data N(1.3, 0.4^2), x = a + b z: at the equilibrium a = 1.3 and |b| = 0.4."""

    def step(params, key):
        z, data = jax.random.normal(key, (2, 256, 1))

        def loss(params):
            return drifting_loss(params["a"] + params["b"] * z, 1.3 + 0.4 * data).mean()

        slopes = jax.grad(loss)(params)
        return jax.tree.map(lambda p, slope: p - 0.02 * slope, params, slopes), params

    params = {"a": jnp.float32(-1.0), "b": jnp.float32(1.0)}
    keys = jax.random.split(jax.random.key(0), 300)
    _, path = jit(lambda params: jax.lax.scan(step, params, keys))(params)
    np.testing.assert_allclose(path["a"][200:].mean(), 1.3, atol=0.02)
    np.testing.assert_allclose(path["b"][200:].mean(), 0.4, atol=0.02)


def test_dtypes_and_no_gradient_of_the_drift():
    x, p = jnp.asarray(X, jnp.bfloat16), jnp.asarray(P, jnp.float32)
    assert drift(x, x + 1).dtype == drifting_loss(x, x + 1).dtype == jnp.float32
    slope = jax.grad(lambda p: drifting_loss(x, p).sum())(p)
    np.testing.assert_array_equal(slope, 0)
    same = jnp.ones((3, 2))
    np.testing.assert_array_equal(drift(same, same), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: drift(jnp.ones((1, 2)), jnp.ones((3, 2))), "two examples or more"),
        (lambda: drift(jnp.ones((2, 2)), jnp.ones((3, 1))), "event shape of x; got \\(3, 1\\)"),
        (lambda: drift(jnp.ones((2, 2)), jnp.ones((0, 2))), "not empty"),
        (lambda: drift(jnp.ones((2, 2), int), jnp.ones((3, 2))), "x must be floating"),
        (lambda: drift(jnp.ones((2, 2)), jnp.ones((3, 2)), temperatures=[]), "one or more"),
        (lambda: drift(jnp.ones((2, 2)), jnp.ones((3, 2)), temperatures=NO_LIST), "one or more"),
        (lambda: drift(jnp.ones((2, 2)), jnp.ones((3, 2)), temperatures=[0.0]), "positive"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
