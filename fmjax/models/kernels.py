"""The costly operations of a network, as an object: a platform may hand in its own.

The parameters and, up to rounding, the numbers are the same whatever the kernels. `KERNELS` are
XLA's; `fmjax.models.cpu.KERNELS` are faster on a CPU and take longer to compile.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fmjax.types import at_least_float32

Convolution = Callable[..., jax.Array]  # as `lax.conv_general_dilated`


class Kernels(NamedTuple):
    """What `UNet(kernels=...)` takes.

    Attributes:
      conv: the convolution of images `[batch, height, width, in]`.
      upsampled_conv: the same after every pixel is repeated 2x2.
      attention: softmax(q k' / sqrt(dim)) v, all of the shape `[batch, length, heads, dim]`.
    """

    conv: Convolution
    upsampled_conv: Convolution
    attention: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def nearest_upsample(x: jax.Array) -> jax.Array:
    """Doubles height and width by repeating every pixel 2x2."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def average_pool(x: jax.Array) -> jax.Array:
    """Halves height and width by averaging 2x2 pixels, in at least float32."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.mean(axis=(2, 4))


def upsampled_conv(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> jax.Array:
    """`nearest_upsample`, then `lax.conv_general_dilated`."""
    return lax.conv_general_dilated(nearest_upsample(lhs), rhs, window_strides, padding, **kwargs)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(dim)) v, the softmax in at least float32.

    Written out, since cuDNN's has no forward-mode derivative, which an exact divergence needs, and
    `jax.nn.dot_product_attention` takes its softmax in float32 for float64 too.

    Args:
      q: `[batch, length, heads, dim]`, the queries.
      k: the same, the keys.
      v: the same, the values.

    Returns:
      The same, in the dtype of q.
    """
    wide = at_least_float32(q).dtype
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


KERNELS = Kernels(lax.conv_general_dilated, upsampled_conv, attention)
