"""The transformer over patches: its tokens, positions, conditions; the rest is in test_models.

In float64, on random parameters, as the conformance suite.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import jit, random_params, relative

from fmjax import models, training
from fmjax.models import tokens
from fmjax.models.dit import Block, hidden_width
from fmjax.models.kernels import KERNELS

MODEL = models.DiT(
    patch_size=2, width=16, depth=1, num_heads=2, num_time_tokens=2, num_classes=3, horizon=True
)
EVENT, BATCH = (4, 6, 3), 3
LABELS = jnp.asarray([0, 2, 1])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@functools.cache
def build():
    """(apply, jvp): u = apply(t, h, x); (u, du) = jvp(t, h, x, dt, dh, dx), compiled once."""
    model = MODEL.clone(param_dtype=jnp.float64)
    params = random_params(model, EVENT, jnp.float64)
    apply = lambda t, h, x: model.apply(params, t, x, LABELS, horizon=h)  # noqa: E731
    jvp = jit(lambda *a: jax.jvp(apply, a[:3], a[3:]))
    return params, apply, jvp


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def points():
    return jnp.asarray([0.1, 0.5, 0.8]), jnp.asarray([0.0, 0.3, 0.2]), numbers(BATCH, *EVENT)


@pytest.mark.parametrize(("size", "patch"), [((8, 12), 4), ((3, 2), 1), ((6, 6), 6)])
def test_patches_are_squares_of_pixels_row_by_row(size, patch):
    x = np.arange(2 * 3 * np.prod(size), dtype=np.float32).reshape(2, *size, 3)
    patches = tokens.patchify(jnp.asarray(x), patch)
    columns = size[1] // patch
    for n in range(patches.shape[1]):
        row, column = patch * (n // columns), patch * (n % columns)
        square = x[:, row : row + patch, column : column + patch]
        np.testing.assert_array_equal(patches[:, n], square.reshape(2, -1))
    grid = size[0] // patch, columns
    np.testing.assert_array_equal(tokens.unpatchify(patches, grid, patch), x)


def test_products_of_turned_queries_and_keys_depend_on_the_offset_alone():
    rows, columns, size = 5, 7, 8
    angles = tokens.rotary_angles((rows, columns), size)
    same = lambda a: jnp.broadcast_to(a, (1, rows * columns, 1, size))  # noqa: E731
    q, k = (tokens.rotate(same(numbers(size, seed=s)), angles)[0, :, 0] for s in (1, 2))
    logits = np.asarray(q @ k.T).reshape(rows, columns, rows, columns)
    np.testing.assert_allclose(logits[1:, 2:, 1:, 2:], logits[:-1, :-2, :-1, :-2], atol=1e-12)
    # Rows and columns turn different channels, and no two offsets of these are the same.
    offsets = np.unique(np.round(logits[2, 3].ravel(), 6))
    assert len(offsets) == rows * columns
    turned = tokens.rotate(numbers(1, rows * columns, 2, size), angles)
    np.testing.assert_allclose(
        jnp.linalg.norm(turned, axis=-1),
        jnp.linalg.norm(numbers(1, rows * columns, 2, size), axis=-1),
        rtol=1e-12,
    )


def test_a_block_is_equivariant_to_patches_that_move_with_their_positions():
    block = Block(2, 0.0, KERNELS, dtype=jnp.float64, param_dtype=jnp.float64)
    h, angles = numbers(2, 6, 16), jnp.asarray(tokens.rotary_angles((2, 3), 8))
    order = np.array([3, 1, 5, 0, 2, 4])
    init = jax.eval_shape(lambda k: block.init(k, h, angles, True), jax.random.key(0))
    params = jax.tree.map(lambda s: numbers(*s.shape) / s.shape[0] ** 0.5, init)
    apply = jit(lambda h, angles: block.apply(params, h, angles, True))
    out = apply(h, angles)
    np.testing.assert_allclose(apply(h[:, order], angles[order]), out[:, order], atol=1e-12)
    assert relative(apply(h[:, order], angles), out[:, order]) > 1e-4  # positions matter


def test_a_fresh_network_is_the_zero_velocity_that_can_learn():
    t, h, x = points()
    params = jit(MODEL.init)(jax.random.key(0), t, x)
    loss = lambda p: jnp.sum((MODEL.apply(p, t, x, LABELS, horizon=h) - 1) ** 2)  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(params)
    assert value == x.size  # u = 0
    assert jnp.abs(gradient["params"]["Output_0"]["Dense_0"]["kernel"]).max() > 0.1


def test_derivatives_in_time_horizon_and_image_match_finite_differences():
    _, _, jvp = build()
    at, zero = points(), [jnp.zeros_like(a) for a in points()]
    for i in range(3):
        tangent = [a for a in zero]
        tangent[i] = numbers(*at[i].shape, seed=3)
        u, du = jvp(*at, *tangent)
        ahead, behind = (
            jvp(*(a + s * 1e-5 * d for a, d in zip(at, tangent, strict=True)), *tangent)[0]
            for s in (1, -1)
        )
        assert relative(du, (ahead - behind) / 2e-5) < 1e-7
        assert np.linalg.norm(du) > 1e-2 * np.linalg.norm(u)


def test_a_horizon_is_one_for_all_or_one_each_and_none_is_zero():
    params, apply, jvp = build()
    t, h, x = points()
    each, _ = jvp(t, h, x, t, h, x)
    one = jit(apply)(jnp.asarray(0.5), jnp.asarray(0.3), x)
    np.testing.assert_allclose(one[1], each[1], atol=1e-12)
    none = jit(MODEL.apply)(params, t, x, LABELS)
    np.testing.assert_allclose(none[0], each[0], atol=1e-12)
    assert relative(none[1], each[1]) > 1e-3
    without = MODEL.clone(horizon=False)
    with pytest.raises(ValueError, match=r"horizon needs .*\(3,\) and horizon=False"):
        jax.eval_shape(lambda p: without.apply(p, t, x, LABELS, horizon=h), params)
    with pytest.raises(ValueError, match="a prefix of the shape of x"):
        jax.eval_shape(lambda p: MODEL.apply(p, t, x, LABELS, horizon=h[:2]), params)


def test_a_batch_is_the_map_of_its_examples():
    params, _, jvp = build()
    t, h, x = points()
    each, _ = jvp(t, h, x, t, h, x)

    def single(t, h, x, label):
        return MODEL.apply(params, t[None], x[None], label[None], horizon=h[None])[0]

    np.testing.assert_allclose(jit(jax.vmap(single))(t, h, x, LABELS), each, atol=1e-12)


@pytest.mark.slow
def test_an_empty_batch_is_one():
    params, empty = build()[0], jnp.zeros((0, *EVENT))
    assert MODEL.apply(params, jnp.zeros(0), empty).shape == empty.shape


def test_remat_changes_no_number():
    params, _, _ = build()
    t, h, x = points()

    def gradient(model):
        loss = lambda p: jnp.sum(model.apply(p, t, x, LABELS, horizon=h) ** 2)  # noqa: E731
        return jit(jax.grad(loss))(params)

    got, want = gradient(MODEL.clone(remat=True)), gradient(MODEL)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


@pytest.mark.parametrize(
    ("model", "size", "channels"),
    [(MODEL, 4, 3), (models.DiT(8, 64, 3, 4), 32, 1), (models.DiT(16, 32, 2, 2, 10), 256, 3)],
)
def test_parameter_count_in_closed_form(model, size, channels):
    x = jnp.zeros((1, size, size, channels))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(()), x)
    assert jax.eval_shape(model.apply, params, jnp.zeros(()), x).shape == x.shape
    d, tokens_each = model.width, model.num_time_tokens
    pixels, hidden, head = model.patch_size**2 * channels, hidden_width(d), d // model.num_heads
    block = 4 * d * d + 3 * d * hidden + 2 * d + 2 * head
    time = (d + 1) * d + (d + 1) * tokens_each * d
    want = (pixels + 1) * d + model.depth * block + (1 + model.horizon) * time
    want += d + (d + 1) * pixels
    want += 0 if model.num_classes is None else (model.num_classes + 1) * tokens_each * d
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == want


def test_muon_takes_the_matrices_of_the_blocks_and_no_others():
    params = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros(()), points()[2])
    matrices = training.matrix_axes(params)["params"]
    block = {
        name: leaf["kernel"] for name, leaf in matrices.pop("Block_0").items() if "kernel" in leaf
    }
    assert {name for name, m in block.items() if m} == {
        "qkv",
        "attention_out",
        "gate",
        "value",
        "feed_forward_out",
    }
    assert block["qkv"].shape == (16, 3, 16)
    assert not any(jax.tree.leaves(matrices))
