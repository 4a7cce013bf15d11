"""Dequantisation, its inverse, and flips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm
from fmjax.data import dequantization, pixels


def values(num_levels, repeats=4096):
    """Every level `repeats` times, [num_levels, repeats, 1, 1]."""
    v = np.arange(num_levels, dtype=np.uint8)[:, None, None, None]
    return jnp.asarray(np.broadcast_to(v, (num_levels, repeats, 1, 1)))


@pytest.mark.parametrize("num_levels", [2, 17, 200, 256])
def test_quantize_inverts_dequantize(num_levels):
    v = values(num_levels)
    x = pixels.dequantize(jax.random.key(1), v, num_levels)
    assert x.dtype == jnp.float32 and x.min() >= -1 and x.max() < 1
    back = pixels.quantize(x, num_levels)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, v)


@pytest.mark.parametrize("num_levels", [17, 256])
@pytest.mark.parametrize("bits", [0, 0xFFFF])
@pytest.mark.parametrize("centred", [False, True])
def test_the_extreme_draws_stay_in_their_bin(monkeypatch, num_levels, bits, centred):
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.full(shape, bits, dtype))
    v = values(num_levels, 1)
    low, high = pixels.centred_range(num_levels) if centred else (-1.0, 1.0)
    x = pixels.dequantize(jax.random.key(0), v, num_levels, low=low, high=high)
    assert x.min() >= low and x.max() < high
    np.testing.assert_array_equal(pixels.quantize(x, num_levels, low=low, high=high), v)


def test_the_grid_of_other_libraries():
    """They train on 2 v / 255 - 1 and round 127.5 x + 127.5: up to half a level off our bins."""
    v = np.arange(256)
    low, high = pixels.centred_range()
    assert (low, high) == (-256 / 255, 256 / 255)
    x = np.float32(2 * v / 255 - 1)
    np.testing.assert_array_equal(pixels.quantize(x, low=low, high=high), v)
    x = np.random.default_rng(0).uniform(-1.02, 1.02, 5000).astype(np.float32)
    theirs = np.clip(np.round(127.5 * x.astype(np.float64) + 127.5), 0, 255)
    np.testing.assert_array_equal(pixels.quantize(x, low=low, high=high), theirs)
    assert (np.asarray(pixels.quantize(x)) != theirs).any()
    # A density of 1 / (high - low) in each dimension: 8 bits, as in any range.
    bits = fm.bits_per_dim(jnp.log(jnp.full(1, 255 / 512)), (1,), low=low, high=high)
    np.testing.assert_allclose(bits, 8, rtol=1e-6)


@pytest.mark.parametrize("num_levels", [17, 256])
def test_dequantize_is_uniform_within_the_bin(num_levels):
    v = values(num_levels)
    x = np.asarray(pixels.dequantize(jax.random.key(2), v, num_levels), np.float64)
    u = ((x + 1) * num_levels / 2 - np.asarray(v)).ravel()
    n = u.size  # 70,000 or 1,000,000 draws; each limit is 4 standard errors
    assert abs(u.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / n)
    assert abs((u**2).mean() - 1 / 3) < 4 * np.sqrt(4 / 45 / n)
    counts = np.histogram(u, 16, (0, 1))[0]
    assert abs(counts - n / 16).max() < 4.5 * np.sqrt(n * 15 / 256)  # 16 bins: 4.5 of them
    rows = u.reshape(num_levels, -1)
    correlation = np.corrcoef(rows[0], rows[1])[0, 1]  # levels have draws of their own
    assert abs(correlation) < 4 / np.sqrt(rows.shape[1])


def test_quantize_rounds_to_the_nearest_centre_and_clips():
    x = np.random.default_rng(0).uniform(-1.3, 1.3, (5000,)).astype(np.float32)
    centres = 2 * (np.arange(17) + 0.5) / 17 - 1
    nearest = np.abs(x[:, None] - centres).argmin(1)
    np.testing.assert_array_equal(pixels.quantize(jnp.asarray(x), 17), nearest)


def test_dequantize_refuses_scaled_images_and_other_levels():
    with pytest.raises(ValueError, match="integers in 0..255; got float32"):
        pixels.dequantize(jax.random.key(0), jnp.zeros((1, 2, 2, 1)))
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"from 2 to 256.*got {levels}"):
            pixels.dequantize(jax.random.key(0), jnp.zeros((1, 2, 2, 1), jnp.uint8), levels)
        with pytest.raises(ValueError, match=f"from 2 to 256.*got {levels}"):
            pixels.quantize(jnp.zeros((1, 2, 2, 1)), levels)


@pytest.mark.parametrize(
    ("image", "num_levels"),
    [(200, 17), (300, 256), (-3, 256), (65_535, 256), (2**40, 256), (17, 17)],
)
def test_values_beyond_the_levels_are_refused_where_they_are_known(image, num_levels):
    images = np.full((1, 2, 2, 1), image)
    key = jax.random.key(0)
    draws = [
        lambda x: pixels.dequantize(key, x, num_levels),
        lambda x: dequantization.uniform_dequantizer(num_levels)(key, x),
        lambda x: dequantization.truncated_normal_dequantizer(num_levels)(key, x),
    ]
    for draw in draws:
        for given in (images, images.tolist()) if image < 2**31 else (images,):
            with pytest.raises(ValueError, match=f"integers in 0..{num_levels - 1}.*{image}"):
                draw(given)
    jax.jit(draws[0])(jnp.zeros((1, 2, 2, 1), jnp.uint8))  # unknown values are taken


def test_a_nan_is_no_pixel():
    with pytest.raises(ValueError, match="no NaN, which is no pixel value; got 2"):
        pixels.quantize(jnp.array([0.0, jnp.nan, jnp.nan]))


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.0, -1.0), (np.nan, 1.0), (0.0, np.inf)])
def test_a_range_is_finite_and_not_empty(low, high):
    key, v = jax.random.key(0), jnp.zeros((1, 2, 2, 1), jnp.uint8)
    for use in (
        lambda: pixels.dequantize(key, v, low=low, high=high),
        lambda: pixels.quantize(jnp.zeros(3), low=low, high=high),
        lambda: dequantization.uniform_dequantizer(low=low, high=high),
        lambda: dequantization.truncated_normal_dequantizer(low=low, high=high),
    ):
        with pytest.raises(ValueError, match="low and high must be finite, low < high"):
            use()


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_random_flip_mirrors_half_of_the_images(dtype):
    n = 4096
    image = jnp.arange(2 * 5 * 3, dtype=dtype).reshape(1, 2, 5, 3)
    images = jnp.tile(image, (n, 1, 1, 1))
    flipped = pixels.random_flip(jax.random.key(0), images)
    assert flipped.dtype == dtype
    mirrored = (flipped == image[:, :, ::-1]).all((1, 2, 3))
    kept = (flipped == image).all((1, 2, 3))
    np.testing.assert_array_equal(mirrored, ~kept)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(n)  # 4 standard errors
    jitted = jax.jit(pixels.random_flip)(jax.random.key(0), images)
    np.testing.assert_array_equal(jitted, flipped)
    assert (pixels.random_flip(jax.random.key(1), images) != flipped).any()


def test_random_flip_wants_a_batch():
    with pytest.raises(ValueError, match=r"got \(8, 8, 1\)"):
        pixels.random_flip(jax.random.key(0), jnp.zeros((8, 8, 1)))


def test_dequantize_jit_and_key():
    v = values(256, 16)
    x = pixels.dequantize(jax.random.key(0), v)
    jitted = jax.jit(pixels.dequantize)(jax.random.key(0), v)
    np.testing.assert_array_equal(jitted, x)
    assert (pixels.dequantize(jax.random.key(1), v) != x).any()
    np.testing.assert_array_equal(jax.jit(pixels.quantize)(jitted), v)
