"""The road from pixel values to densities and back, and the mirroring of images.

A pixel value v in {0, ..., L - 1}, L = `num_levels`, becomes a real number in [-1, 1):

    x = 2 (v + u) / L - 1,    u ~ U[0, 1)        (`dequantize`)
    v = floor(L (x + 1) / 2), clipped            (`quantize`)

Uniform dequantisation turns a density p of x into a lower bound on the probability of the values
v of an image with D dimensions (Theis et al. 2016, "A note on the evaluation of generative
models"): v + u has the density p(x) (2 / L)^D, since log|det dx/dv| = D log(2 / L), hence

    log P(v) >= E_u[log p(x)] + D log(2 / L)    in nats per example,
    bits/dim <= -E_u[log p(x)] / (D log 2) + log2(L / 2).

With L = 256 the last term is 7 bits, with L = 17 it is 3.09. One draw of u estimates the
expectation without bias; the larger the number of draws per image, the smaller its error.
"""

import jax
import jax.numpy as jnp


def dequantize(key: jax.Array, images: jax.Array, num_levels: int = 256) -> jax.Array:
    """Spreads pixel values over their bins: x = 2 (v + u) / num_levels - 1, u ~ U[0, 1).

    u is uniform on the 2^15 midpoints (k + 1/2) / 2^15. With up to 256 levels v + u then is exact
    in float32 and can't be rounded up into the next bin, as one in some 10^5 ordinary float32
    draws would be: x stays below 1, and `quantize` gives back every value.

    Args:
      key: of `jax.random`.
      images: integers in 0..num_levels-1, `[batch, height, width, channel]`.
      num_levels: L, from 2 to 256.

    Returns:
      float32 in [-1, 1), of the shape of `images`.

    Raises:
      ValueError: if the images are no integers, or for another number of levels.

    Example:
      >>> dequantize(jax.random.key(0), jnp.zeros((4, 8, 8, 1), jnp.uint8)).dtype
      dtype('float32')
    """
    _check_levels(num_levels)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(
            f"images must be integers in 0..{num_levels - 1}; got {images.dtype}. "
            "Have they been scaled already?"
        )
    odd = jax.random.bits(key, images.shape, jnp.uint16) | 1
    u = odd.astype(jnp.float32) / 2**16
    return 2 * (images.astype(jnp.float32) + u) / num_levels - 1


def quantize(x: jax.Array, num_levels: int = 256) -> jax.Array:
    """The inverse of `dequantize`: the level whose centre is nearest, floor(L (x + 1) / 2).

    Args:
      x: floats, `[batch, height, width, channel]`; beyond [-1, 1) they are clipped.
      num_levels: L, from 2 to 256.

    Returns:
      uint8 in 0..num_levels-1, of the shape of `x`.

    Raises:
      ValueError: for another number of levels.

    Example:
      >>> quantize(jnp.array([-1.0, 0.0, 2.0])).tolist()
      [0, 128, 255]
    """
    _check_levels(num_levels)
    level = jnp.floor((x.astype(jnp.float32) + 1) / 2 * num_levels)
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
    if images.ndim != 4:
        raise ValueError(f"images must be [batch, height, width, channel]; got {images.shape}.")
    flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def _check_levels(num_levels: int) -> None:
    if not 2 <= num_levels <= 256:
        raise ValueError(f"num_levels must be from 2 to 256, those of 8 bits; got {num_levels}.")
