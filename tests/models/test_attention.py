"""Attention equals JAX's own, with its derivatives, in every dtype and however large the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.models import kernels
from fmjax.models.cpu.attention import attention

SHAPE = (2, 9, 3, 8)


def draw(dtype, scale=1.0):
    rng = np.random.default_rng(0)
    return [jnp.asarray(scale * rng.normal(size=SHAPE), dtype) for _ in range(6)]


def formula(q, k, v):
    """The definition, place by place, in JAX's default dtype."""
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(SHAPE[-1]), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def library(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


CASES = {
    "value": lambda f, a: f(*a[:3]),
    "jvp": lambda f, a: jax.jvp(f, a[:3], a[3:])[1],
    "vjp": lambda f, a: jnp.stack(jax.vjp(f, *a[:3])[1](a[3])),
    "jvp_of_vjp": lambda f, a: jnp.stack(
        jax.jvp(lambda *qkv: jax.vjp(f, *qkv)[1](a[3]), a[:3], a[3:])[1]
    ),
}


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ours", [kernels.attention, attention])
def test_equals_the_formula_and_rounds_as_the_library_does(name, ours):
    case = jax.jit(CASES[name], static_argnums=0)
    with jax.enable_x64(True):  # the library's softmax is float32 even in float64
        exact = case(formula, draw(jnp.float64))
        assert relative(case(ours, draw(jnp.float64)), exact) < 1e-14
    arrays = draw(jnp.float32)
    errors = [relative(case(f, arrays), exact) for f in (ours, library)]
    assert errors[0] < 2 * errors[1] < 1e-5


@pytest.mark.slow
def test_large_logits_neither_overflow_nor_lose_the_largest():
    q, k, v, *_ = draw(jnp.float32, scale=300.0)
    got = attention(q, k, v)
    np.testing.assert_allclose(got, library(q, k, v), rtol=1e-3, atol=1e-3)
    gradient = jax.grad(lambda q: jnp.sum(attention(q, k, v)))(q)
    assert np.isfinite(got).all() and np.isfinite(gradient).all()


def test_small_dtypes_are_the_librarys():
    q, k, v, *_ = draw(jnp.bfloat16)
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, library(q, k, v))
