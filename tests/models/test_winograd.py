"""Winograd's convolution equals XLA's own, with all derivatives, batched and in parts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fmjax.models.cpu import winograd

# Unoptimised code compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

NUMBERS, SAME = ("NHWC", "HWIO", "NHWC"), ((1, 1), (1, 1))
# In no two axes alike.
SHAPES = {"x": (5, 16, 18, 17), "w": (3, 3, 17, 20), "y": (5, 16, 18, 20)}


@pytest.fixture(params=["whole", "in_parts"], autouse=True)
def tiles_at_a_time(request, monkeypatch):
    monkeypatch.setattr(winograd, "_TILES_AT_A_TIME", {"whole": 1024, "in_parts": 1}[request.param])


fast = winograd.conv3x3


def direct(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), SAME, dimension_numbers=NUMBERS)


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


def deep(conv):
    """Two convolutions and curvature, so that second derivatives reach every rule."""
    return lambda x, w: jnp.sum(conv(jnp.sin(conv(x, w)), w.swapaxes(2, 3)) ** 3)


def jvp(conv, a):
    return jax.jvp(conv, (a["x"], a["w"]), (a["x_dot"], a["w_dot"]))[1]


def linearized(conv, a):
    return jax.linearize(conv, a["x"], a["w"])[1](a["x_dot"], a["w_dot"])


def vjp(index):
    return lambda conv, a: jax.vjp(conv, a["x"], a["w"])[1](a["y"])[index]


def forward_over_reverse(index):
    return lambda conv, a: jvp(jax.grad(deep(conv), index), a)


def reverse_over_reverse(first, second):
    def gradient_of_gradient(conv, a):
        inner = jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w))), first)
        return jax.grad(lambda x, w: jnp.sum(inner(x, w) ** 2), second)(a["x"], a["w"])

    return gradient_of_gradient


def divergence_products(conv, a):
    tangents = jnp.stack([a["x"], a["x_dot"]])
    return jax.vmap(lambda v: jax.jvp(lambda x: conv(x, a["w"]), (a["x"],), (v,))[1])(tangents)


def batched_filters(conv, a):
    return jax.vmap(conv, (None, 0))(a["x"], jnp.stack([a["w"], a["w_dot"]]))


def gradients_per_example(conv, a):
    x = jnp.stack([a["x"], a["x_dot"]])
    return jax.vmap(lambda x: jax.grad(lambda w: jnp.sum(conv(x, w) ** 2))(a["w"]))(x)


CASES = {
    "value": lambda conv, a: conv(a["x"], a["w"]),
    "jvp": jvp,
    "linearize": linearized,
    "vjp_x": vjp(0),
    "vjp_w": vjp(1),
    "hessian_x": forward_over_reverse(0),
    "hessian_w": forward_over_reverse(1),
    "reverse_over_reverse_x": reverse_over_reverse(1, 0),
    "reverse_over_reverse_w": reverse_over_reverse(0, 1),
    "vmap_jvp": divergence_products,
    "vmap_filters": batched_filters,
    "gradients_per_example": gradients_per_example,
}


SLOW = ("hessian_w", "reverse_over_reverse_w", "gradients_per_example")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_equals_the_direct_convolution(name):
    with jax.enable_x64(True):
        arrays = draw(jnp.float64)
        got = jit(lambda a: CASES[name](fast, a))(arrays)
        expected = jit(lambda a: CASES[name](direct, a))(arrays)
        assert relative(got, expected) < 1e-13
        assert got.dtype == jnp.float64


@pytest.mark.parametrize("name", ["value", "vjp_x", "vjp_w"])
def test_rounds_as_the_direct_convolution_does(name):
    with jax.enable_x64(True):
        exact = CASES[name](direct, draw(jnp.float64))
    arrays = draw(jnp.float32)
    errors = [
        relative(jit(lambda a, c=c: CASES[name](c, a))(arrays), exact) for c in (fast, direct)
    ]
    assert errors[0] < 4 * errors[1] < 1e-5


def test_it_runs_where_it_should_and_nowhere_else():
    conv = nn.Conv(64, (3, 3), padding=1, conv_general_dilated=winograd.conv_general_dilated)

    def takes_it(shape, dtype=jnp.float32, **kwargs):
        this = conv.clone(dtype=dtype, **kwargs)
        jaxpr = jax.make_jaxpr(lambda x: this.init_with_output(jax.random.key(0), x)[0])
        return "conv3x3" in str(jaxpr(jnp.zeros(shape, dtype)))

    assert takes_it((16, 8, 8, 64))
    assert takes_it((1, 32, 32, 128))
    assert not takes_it((15, 8, 8, 64))
    assert not takes_it((16, 9, 8, 64))
    assert not takes_it((16, 8, 8, 32))
    assert not takes_it((16, 8, 8, 64), dtype=jnp.bfloat16)
    assert not takes_it((16, 8, 8, 64), strides=2)
    assert not takes_it((16, 8, 8, 64), padding=2)
    assert not takes_it((16, 8, 8, 64), padding="SAME")
    assert not takes_it((16, 8, 8, 64), kernel_dilation=2)
    assert not takes_it((16, 8, 8, 64), feature_group_count=2)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    x, w = jnp.concatenate([draw(jnp.float32)["x"]] * 2)[:8], draw(jnp.float32)["w"]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def gradient(conv):
        def loss(w, x):
            return jax.lax.psum(jnp.sum(conv(x, w) ** 2), "data")

        run = jax.shard_map(
            jax.grad(loss), mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=check_vma
        )
        return jit(run)(w, x)

    assert relative(gradient(fast), gradient(direct)) < 1e-5
