"""Images as sequences of tokens: patches, and rotary positions on the plane.

A patch of p x p pixels with c channels is one token of p p c numbers, row by row. Positions turn
the queries and keys of a head: of its 4 K channels, the first K pairs turn by the row and the
others by the column, pair k by

    angle = position w_k,   w_k = 100^(-k / K)

so that the product of a query and a key depends on their offset alone. Offsets go up to some tens
of patches, for which 100 is far enough; language models take 10,000.

Source: Su et al. 2021, arXiv 2104.09864, on each of two axes.
"""

import jax
import jax.numpy as jnp
import numpy as np

_LONGEST = 100.0


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """The patches of images, row by row.

    Args:
      x: `[batch, height, width, channel]`.
      patch_size: side of a patch, which divides height and width.

    Returns:
      `[batch, height / patch_size * width / patch_size, patch_size**2 * channel]`.

    Raises:
      ValueError: if it divides them not.

    Example:
      >>> patchify(jnp.zeros((2, 8, 12, 3)), 4).shape
      (2, 6, 48)
    """
    batch, height, width, channels = x.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"height and width must be divisible by patch_size; got x {x.shape} and patch_size="
            f"{patch_size}. Pad or resize the images, or take another patch."
        )
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(tokens: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Images of their patches: the inverse of `patchify`.

    Args:
      tokens: `[batch, rows * columns, patch_size**2 * channel]`.
      grid: the number of rows and of columns of patches.
      patch_size: side of a patch.

    Returns:
      `[batch, rows * patch_size, columns * patch_size, channel]`.

    Example:
      >>> unpatchify(jnp.zeros((2, 6, 48)), (2, 3), 4).shape
      (2, 8, 12, 3)
    """
    batch, (rows, columns) = tokens.shape[0], grid
    channels = tokens.shape[-1] // patch_size**2
    x = tokens.reshape(batch, rows, columns, patch_size, patch_size, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch_size, columns * patch_size, channels)


def rotary_angles(grid: tuple[int, int], head_size: int) -> np.ndarray:
    """The angles of every patch, in the order of `patchify`.

    Args:
      grid: the number of rows and of columns of patches.
      head_size: channels of a head, divisible by 4.

    Returns:
      `[rows * columns, head_size / 2]`, float64 of NumPy's, in radians: a pair of channels each.

    Example:
      >>> rotary_angles((2, 3), 8).shape
      (6, 4)
    """
    frequencies = _LONGEST ** (-np.arange(head_size // 4) / (head_size // 4))
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [position[:, None] * frequencies[None] for position in (rows, columns)]
    return np.concatenate(angles, axis=1)


def rotate(x: jax.Array, angles: np.ndarray | jax.Array) -> jax.Array:
    """Turns the pairs of channels (k, k + head_size / 2) by their angles, in at least float32.

    Args:
      x: queries or keys, `[batch, length, heads, head_size]`.
      angles: `[length, head_size / 2]`; zero for a token without a position.

    Returns:
      The shape and dtype of x.

    Example:
      >>> rotate(jnp.ones((1, 6, 2, 8)), rotary_angles((2, 3), 8)).shape
      (1, 6, 2, 8)
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    angles = jnp.asarray(angles, wide)[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = [first * cos - second * sin, first * sin + second * cos]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
