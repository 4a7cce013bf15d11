"""From pixel values to densities and back, and the mirroring of images.

A pixel value v in {0, ..., L - 1}, L = `num_levels`, is one of L equal bins that fill [low, high),
and becomes a real number in it:

    x = low + (high - low) (v + u) / L,    u ~ U[0, 1)        (`dequantize`)
    v = floor(L (x - low) / (high - low)), clipped            (`quantize`)

By default the bins fill [-1, 1). Other libraries put value v at 2 v / (L - 1) - 1 and round to the
nearest: these points are the middles, u = 1/2, of bins that fill `centred_range(L)`, for 256 levels
[-256/255, 256/255). What is trained on such a grid is to be quantised, and its likelihood counted,
with that low and high.

Uniform dequantisation turns a density p of x into a lower bound on the probability of the values
v of an image with D dimensions (Theis et al. 2016, "A note on the evaluation of generative
models"): v + u has the density p(x) ((high - low) / L)^D, hence

    log P(v) >= E_u[log p(x)] + D log((high - low) / L)    in nats per example,
    bits/dim <= -E_u[log p(x)] / (D log 2) + log2(L / (high - low)).

In [-1, 1) with L = 256 the last term is 7 bits, with L = 17 it is 3.09. One draw of u estimates the
expectation without bias; the larger the number of draws per image, the smaller its error.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import as_array, as_floating, is_concrete


def centred_range(num_levels: int = 256) -> tuple[float, float]:
    """low and high of the bins around 2 v / (L - 1) - 1: the grid of torchcfm and flow_matching.

    Args:
      num_levels: L, from 2 to 256.

    Returns:
      -L / (L - 1) and L / (L - 1).

    Raises:
      ValueError: for another number of levels.

    Example:
      >>> low, high = centred_range(256)
      >>> quantize(jnp.array([-1.0, 1.0]), low=low, high=high).tolist()
      [0, 255]
    """
    _check_levels(num_levels)
    return -num_levels / (num_levels - 1), num_levels / (num_levels - 1)


def dequantize(
    key: jax.Array,
    images: jax.Array,
    num_levels: int = 256,
    *,
    low: float = -1.0,
    high: float = 1.0,
) -> jax.Array:
    """Spreads pixel values over their bins: x = low + (high - low) (v + u) / L, u ~ U[0, 1).

    u is uniform on the 2^15 midpoints (k + 1/2) / 2^15. With up to 256 levels v + u then is exact
    in float32 and can't be rounded up into the next bin, as one in some 10^5 ordinary float32
    draws would be: in [-1, 1) x stays below 1, and `quantize` gives back every value.

    Args:
      key: of `jax.random`.
      images: integers in 0..num_levels-1, `[batch, height, width, channel]`.
      num_levels: L, from 2 to 256.
      low: where the bin of value 0 begins.
      high: where the last bin ends.

    Returns:
      float32 in [low, high), of the shape of `images`.

    Raises:
      ValueError: if the images are no integers, or hold known values beyond 0..num_levels-1; for
        another number of levels, or unless low < high.

    Example:
      >>> dequantize(jax.random.key(0), jnp.zeros((4, 8, 8, 1), jnp.uint8)).dtype
      dtype('float32')
    """
    _check_levels(num_levels)
    check_range(low, high)
    images = _as_values(images, num_levels)
    odd = jax.random.bits(key, images.shape, jnp.uint16) | 1
    u = odd.astype(jnp.float32) / 2**16
    return (high - low) * (images.astype(jnp.float32) + u) / num_levels + low


def quantize(
    x: jax.Array, num_levels: int = 256, *, low: float = -1.0, high: float = 1.0
) -> jax.Array:
    """The inverse of `dequantize`: the value of the bin that holds x, whose middle is the nearest.

    Args:
      x: floats, `[batch, height, width, channel]`; beyond [low, high) they are clipped.
      num_levels: L, from 2 to 256.
      low: where the bin of value 0 begins.
      high: where the last bin ends.

    Returns:
      uint8 in 0..num_levels-1, of the shape of `x`.

    Raises:
      ValueError: for another number of levels, or unless low < high; if x is not floating, or is
        known to hold a NaN.

    Example:
      >>> quantize(jnp.array([-1.0, 0.0, 2.0])).tolist()
      [0, 128, 255]
    """
    _check_levels(num_levels)
    check_range(low, high)
    given, x = x, as_floating("x", x)
    if is_concrete(given) and (num := int(jnp.isnan(x).sum())):
        raise ValueError(f"x must hold no NaN, which is no pixel value; got {num} in {x.shape}.")
    level = jnp.floor((x.astype(jnp.float32) - low) / (high - low) * num_levels)
    return jnp.clip(level, 0, num_levels - 1).astype(jnp.uint8)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2, independently.

    Args:
      key: of `jax.random`.
      images: `[batch, height, width, channel]`, of any dtype.

    Returns:
      The images, of the same shape and dtype.

    Raises:
      ValueError: if `images` has another rank.

    Example:
      >>> random_flip(jax.random.key(0), jnp.zeros((4, 8, 8, 1), jnp.uint8)).dtype
      dtype('uint8')
    """
    images = as_array("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channel]; got {images.shape}.")
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def _as_values(images: Any, num_levels: int) -> jax.Array:
    """Pixel values as an array, refused where they are known and not in 0..num_levels-1."""
    given, images = images, as_array("images", images)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(
            f"images must be integers in 0..{num_levels - 1}; got {images.dtype}. "
            "Have they been scaled already?"
        )
    if is_concrete(given) and images.size:
        values = np.asarray(given)  # before JAX narrows 64 bits
        if not 0 <= values.min() <= values.max() < num_levels:
            raise ValueError(
                f"images must be integers in 0..{num_levels - 1}, num_levels = {num_levels}; got "
                f"values from {values.min()} to {values.max()}. Is num_levels that of the data?"
            )
    return images


def _check_levels(num_levels: int) -> None:
    if not 2 <= num_levels <= 256:
        raise ValueError(f"num_levels must be from 2 to 256, those of 8 bits; got {num_levels}.")


def check_range(low: float, high: float) -> None:
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite, low < high; got {low} and {high}.")
