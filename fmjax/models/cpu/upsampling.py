"""A 3x3 convolution at double resolution, by nine products.

A 3x3 convolution after repeating every pixel 2x2 needs a quarter of its multiplications. Along one
axis, the outputs at the position of a pixel q between p and r are

    w_0 p + (w_1 + w_2) q = w_0 (p - q) + (w_0 + w_1 + w_2) q,
    (w_0 + w_1) q + w_2 r = (w_0 + w_1 + w_2) q - w_2 (q - r):

three products instead of six, and along two axes nine instead of 36. It is Winograd's F(2x2, 3x3)
where the repetition makes seven of its 16 products zero.

Source of the filtering: Lavin and Gray (2015), arXiv 1509.09308, section 4.1.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fmjax.models.cpu import winograd
from fmjax.models.kernels import nearest_upsample


def upsampled_conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> jax.Array:
    """A convolution after repeating pixels, by nine products where Winograd's method takes 16.

    Everything else is a repetition and `winograd.conv_general_dilated`.

    Args:
      lhs: `[batch, height, width, in]`.
      rhs: the filter.
      window_strides: of `lax.conv_general_dilated`.
      padding: the same.
      **kwargs: the same.

    Returns:
      What the two give, up to rounding: `[batch, 2 height, 2 width, out]` for stride 1 and padding
      1 around 3x3.
    """
    batch, height, width, channels = lhs.shape
    image = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, channels), lhs.dtype)
    if winograd.fits(image, rhs, window_strides, padding, **kwargs):
        return upsampled_conv3x3(lhs, rhs, kwargs.get("precision"))
    return winograd.conv_general_dilated(
        nearest_upsample(lhs), rhs, window_strides, padding, **kwargs
    )


def upsampled_conv3x3(x: jax.Array, w: jax.Array, precision: Any = None) -> jax.Array:
    """The same by nine products, whatever the device and the sizes.

    Args:
      x: `[batch, height, width, in]`.
      w: `[3, 3, in, out]`.
      precision: of the matrix products, as `jax.lax.dot` takes it.

    Returns:
      `[batch, 2 height, 2 width, out]`.
    """
    batch, height, width, _ = x.shape
    rows = _differences(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), axis=1)
    pixels = [_differences(row, axis=2) for row in rows]
    filters = [_sums(row) for row in _sums(w)]
    numbers = (((3,), (0,)), ((), ()))
    products = [
        [lax.dot_general(v, u, numbers, precision) for v, u in zip(*row, strict=True)]
        for row in zip(pixels, filters, strict=True)
    ]
    columns = [_outputs(*column) for column in zip(*products, strict=True)]
    y = [_outputs(*row) for row in zip(*columns, strict=True)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2)
    return y.reshape(batch, 2 * height, 2 * width, y.shape[-1])


def _differences(x: jax.Array, axis: int) -> list[jax.Array]:
    """p - q, q and q - r at every pixel q inside a border of one pixel."""
    size = x.shape[axis] - 2
    p, q, r = (lax.slice_in_dim(x, n, n + size, axis=axis) for n in range(3))
    return [p - q, q, q - r]


def _sums(w: jax.Array) -> list[jax.Array]:
    return [w[0], w[0] + w[1] + w[2], w[2]]


def _outputs(first: jax.Array, both: jax.Array, last: jax.Array) -> list[jax.Array]:
    return [first + both, both - last]
