"""Halving and doubling in closed form; the convolution after doubling equals the two apart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.models import kernels
from fmjax.models.cpu import upsampling, winograd

SHAPES = {"x": (5, 4, 6, 17), "w": (3, 3, 17, 20), "y": (5, 8, 12, 20)}  # in no two axes alike
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def apart(x, w):
    x, numbers = kernels.nearest_upsample(x), ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def draw(dtype):
    rng = np.random.default_rng(0)
    return {
        name + suffix: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in SHAPES.items()
        for suffix in ("", "_dot")
    }


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


CASES = {
    "value": lambda conv, a: conv(a["x"], a["w"]),
    "jvp": lambda conv, a: jax.jvp(conv, (a["x"], a["w"]), (a["x_dot"], a["w_dot"]))[1],
    "vjp_x": lambda conv, a: jax.vjp(conv, a["x"], a["w"])[1](a["y"])[0],
    "vjp_w": lambda conv, a: jax.vjp(conv, a["x"], a["w"])[1](a["y"])[1],
}


def test_resampling_in_closed_form():
    x = jnp.arange(2 * 4 * 2 * 3, dtype=jnp.float32).reshape(2, 4, 2, 3)
    up = kernels.nearest_upsample(x)
    np.testing.assert_array_equal(up, np.asarray(x).repeat(2, axis=1).repeat(2, axis=2))
    pooled = kernels.average_pool(x)
    assert pooled.shape == (2, 2, 1, 3)
    np.testing.assert_allclose(pooled[1, 1, 0], x[1, 2:, :].reshape(4, 3).mean(0), rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nine_products_equal_doubling_and_convolving(name):
    with jax.enable_x64(True):
        arrays = draw(jnp.float64)
        got = jit(lambda a: CASES[name](upsampling.upsampled_conv3x3, a))(arrays)
        exact = jit(lambda a: CASES[name](apart, a))(arrays)
        assert got.dtype == jnp.float64 and got.shape == exact.shape
        assert relative(got, exact) < 1e-14
    arrays = draw(jnp.float32)
    errors = [
        relative(jit(lambda a, c=c: CASES[name](c, a))(arrays), exact)
        for c in (upsampling.upsampled_conv3x3, apart)
    ]
    assert errors[0] < 4 * errors[1] < 1e-5


@pytest.mark.slow
def test_nine_products_where_winograd_would_run_and_the_two_elsewhere():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 64)), jnp.float32)
    conv = nn.Conv(64, (3, 3), padding=1)
    this = conv.clone(conv_general_dilated=upsampling.upsampled_conv_general_dilated)
    params = conv.init(jax.random.key(0), x)
    for image, products in ((x, 9), (x[:3], 0)):
        jaxpr = str(jax.make_jaxpr(this.apply)(params, image))
        assert jaxpr.count("dot_general") == products
        assert jaxpr.count("conv_general_dilated") == (0 if products else 1)
        assert "conv3x3" not in jaxpr
        got, want = this.apply(params, image), conv.apply(params, kernels.nearest_upsample(image))
        assert got.shape == (len(image), 16, 16, 64)
        assert relative(got, want) < 1e-6
    assert not winograd.fits(x[:3, :4], params["params"]["kernel"], (1, 1), ((1, 1), (1, 1)))
