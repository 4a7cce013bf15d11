"""The loss against numpy, example by example; its theorem is in tests/theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture

import fmjax as fm


def path_sample(shape=(4, 2, 3), dtype=jnp.float32):
    t, x_t, u_t = np.random.default_rng(0).uniform(0, 1, (3, *shape))
    return fm.PathSample(
        jnp.asarray(t[(slice(None),) + (0,) * (len(shape) - 1)], jnp.float32),
        jnp.asarray(x_t, dtype),
        jnp.asarray(u_t, dtype),
    )


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2, 3), (4,)])
def test_one_value_per_example(shape):
    sample = path_sample(shape)

    def velocity(t, x):
        return x * t.reshape(-1, *[1] * (x.ndim - 1))

    want = []
    for t, x_t, u_t in zip(*(np.asarray(a, np.float64) for a in sample), strict=True):
        want.append(np.mean((t * x_t - u_t) ** 2))
    loss = fm.cfm_loss(velocity, sample)
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # a difference of numbers near 1
    np.testing.assert_allclose(jit(lambda s: fm.cfm_loss(velocity, s))(sample), want, rtol=1e-5)


def test_zero_at_the_target_and_one_call():
    sample, calls = path_sample(), []

    def velocity(t, x):
        calls.append((t, x))
        return sample.u_t

    np.testing.assert_array_equal(fm.cfm_loss(velocity, sample), np.zeros(4))
    ((t, x),) = calls
    assert t is sample.t and x is sample.x_t


def test_shapes_must_agree():
    sample = path_sample((4, 3))
    for wrong in (lambda t, x: x[:, :1], lambda t, x: x[0], lambda t, x: x[None]):
        with pytest.raises(ValueError, match=r"the velocity must return .* shape \(4, 3\)"):
            fm.cfm_loss(wrong, sample)
    with pytest.raises(ValueError, match="x_t and u_t must have one shape"):
        fm.cfm_loss(lambda t, x: x, sample._replace(u_t=sample.u_t[:, :1]))


def test_at_least_float32():
    low = path_sample((4, 300), dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        loss = fm.cfm_loss(lambda t, x: x, low)
    assert loss.dtype == jnp.float32
    x_t, u_t = (np.asarray(a.astype(jnp.float32), np.float64) for a in low[1:])
    np.testing.assert_allclose(loss, ((x_t - u_t) ** 2).mean(1), rtol=1e-6)  # not summed in bf16
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert fm.cfm_loss(lambda t, x: x, path_sample(dtype=jnp.float64)).dtype == jnp.float64
