"""From 8-bit images to what the InceptionV3 looks at: resized to 299 x 299, then (x - 128) / 128.

Both protocols are bilinear and differ in where output pixel i samples an input of `size` pixels:

    `legacy_tensorflow`  at i size / 299, the first pixels aligned, without smoothing; beyond the
                         last pixel that pixel is repeated
    `torchmetrics`       at (i + 1/2) size / 299 - 1/2, the centres aligned; the triangle becomes
                         size / 299 pixels wide on each side where an image shrinks (antialiasing)

A resize is linear and separable, so it is two products with matrices `[299, size]`. Nothing is
rounded to 8 bits after it, in either protocol.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 299


def legacy_tensorflow(images: jax.Array) -> jax.Array:
    """TensorFlow 1's bilinear resize (no half-pixel centres), then (x - 128) / 128.

    So clean-fid works in its mode `legacy_tensorflow`, and torch-fidelity.

    Args:
      images: uint8, `[batch, height, width, channel]` with 1 or 3 channels; grey is repeated.

    Returns:
      float32 in [-1, 1), `[batch, 299, 299, 3]`.

    Raises:
      ValueError: if the images are of another dtype, rank or number of channels.

    Example:
      >>> legacy_tensorflow(jnp.full((1, 8, 8, 3), 192, jnp.uint8))[0, 0, 0]
      Array([0.5, 0.5, 0.5], dtype=float32)

    Source: Parmar et al. 2021, arXiv 2104.11222 (section 3); TensorFlow 1's `resize_bilinear`.
    """
    return _preprocess(images, _legacy_weights)


def torchmetrics(images: jax.Array) -> jax.Array:
    """Bilinear resize with antialiasing and half-pixel centres, then (x - 128) / 128.

    So torchmetrics 1.9 works by default (`antialias=True`), and with it the CIFAR-10 example of
    facebookresearch/flow_matching. With `normalize=True` it takes floats k / 255 and casts
    255 x to 8 bits, which gives back each of the 256 levels; here they come as they are.

    Args:
      images: uint8, `[batch, height, width, channel]` with 1 or 3 channels; grey is repeated.

    Returns:
      float32 in [-1, 1), `[batch, 299, 299, 3]`.

    Raises:
      ValueError: if the images are of another dtype, rank or number of channels.

    Example:
      >>> torchmetrics(jnp.full((1, 8, 8, 3), 192, jnp.uint8))[0, 0, 0]
      Array([0.5, 0.5, 0.5], dtype=float32)

    Source: torchmetrics' `NoTrainInceptionV3`; PyTorch's `interpolate(..., antialias=True)`.
    """
    return _preprocess(images, _antialias_weights)


def check_images(images: np.ndarray | jax.Array) -> None:
    """Refuses what is not uint8 `[batch, height, width, channel]` with 1 or 3 channels."""
    shape, dtype = tuple(images.shape), images.dtype
    if dtype != np.uint8:
        raise ValueError(
            f"images must be uint8, 0 to 255; got {dtype}. Floats in [-1, 1] become so by "
            "`fmjax.data.pixels.quantize` and a cast."
        )
    if len(shape) != 4 or shape[-1] not in (1, 3) or 0 in shape[1:]:
        raise ValueError(
            "images must be [batch, height, width, channel] with 1 or 3 channels; got shape "
            f"{shape}. Channels come last."
        )


def _preprocess(images: jax.Array, weights: Callable[[int], np.ndarray]) -> jax.Array:
    check_images(images)
    _, height, width, channels = images.shape
    x = jnp.asarray(images).astype(jnp.float32)
    x = jnp.einsum("xw,bhwc->bhxc", weights(width), x, precision="highest")
    x = jnp.einsum("yh,bhxc->byxc", weights(height), x, precision="highest")
    x = x if channels == 3 else jnp.repeat(x, 3, axis=-1)
    return (x - 128) / 128


def _legacy_weights(size: int) -> np.ndarray:
    """`[299, size]`; positions in float32, as the original computes them."""
    position = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = position.astype(np.int64)
    high = np.minimum(low + 1, size - 1)
    part = position - low.astype(np.float32)
    rows, weights = np.arange(SIZE), np.zeros((SIZE, size), np.float32)
    weights[rows, low] += 1 - part
    weights[rows, high] += part
    return weights


def _antialias_weights(size: int) -> np.ndarray:
    """`[299, size]`; triangles around the centres, cut at the edges, each row of sum 1.

    In float32 and in the original's order: it rounds centres, which is seen in the fourth digit.
    """
    scale = np.float32(size) / SIZE  # NumPy keeps float32 beside Python's numbers
    centre = scale * (np.arange(SIZE, dtype=np.float32) + 0.5)
    distance = np.arange(size, dtype=np.float32) - centre[:, None] + 0.5
    weights = np.maximum(0, 1 - np.abs(distance * (1 / np.maximum(scale, 1))))
    return weights / weights.sum(axis=1, keepdims=True)
