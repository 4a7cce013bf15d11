"""Grids of images: as they come, a row for each class, and two beside each other."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .pictures import as_bytes, as_picture

GAP = 4  # white pixels between two images


def grid(images: ArrayLike, *, columns: int | None = None, num_levels: int = 256) -> np.ndarray:
    """A grid of images, row by row, small ones enlarged by a whole factor to about 64 pixels.

    Args:
      images: integers in 0..num_levels-1, `[num, height, width, channel]`. Other channels than 1
        or 3 are drawn grey, side by side.
      columns: images per row; None for about a square.
      num_levels: pixel values.

    Returns:
      A picture, uint8 `[rows * (scale * height + 4) + 4, columns * (scale * width + 4) + 4, 3]`
      with scale = max(1, round(64 / height)).

    Raises:
      ValueError: for another shape, no image, floats, a level out of range, or `columns < 1`.

    Example:
      >>> grid(np.zeros((6, 8, 8, 1), np.uint8), columns=3).shape
      (140, 208, 3)
    """
    images = _as_images(images)
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be 1 or more; got {columns}. None makes about a square.")
    if images.shape[3] not in (1, 3):
        images = np.concatenate(np.split(images, images.shape[3], axis=3), axis=2)
    num, height, width, _ = images.shape
    columns = columns or int(np.ceil(np.sqrt(num)))
    rows, scale = -(-num // columns), max(1, round(64 / height))
    pixels = as_bytes(images, num_levels).repeat(scale, axis=1).repeat(scale, axis=2)
    cell_height, cell_width = height * scale + GAP, width * scale + GAP
    sheet = np.full((rows * cell_height + GAP, columns * cell_width + GAP, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = GAP + i // columns * cell_height, GAP + i % columns * cell_width
        sheet[y : y + height * scale, x : x + width * scale] = image
    return sheet


def by_class(
    images: ArrayLike,
    labels: ArrayLike,
    num_levels: int = 256,
    *,
    classes: Sequence[int] | None = None,
) -> np.ndarray:
    """A grid with a row for each class, short rows filled up with white.

    Args:
      images: integers in 0..num_levels-1, `[num, height, width, channel]`.
      labels: their classes, integers `[num]`.
      num_levels: pixel values.
      classes: the rows from top to bottom, all of `labels` among them; None for the order in which
        the labels first come.

    Returns:
      A picture, uint8 `[height, width, 3]`, as `grid` makes it.

    Raises:
      ValueError: as `grid` does; if there isn't one label for each image; if `classes` lacks one
        of the labels.

    Example:
      >>> images, labels = np.zeros((5, 8, 8, 1), np.uint8), [7, 3, 7, 7, 0]
      >>> by_class(images, labels).shape  # three rows of up to three
      (208, 208, 3)
    """
    images, labels = _as_images(images), np.asarray(labels)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [num], one for each of {len(images)} images; got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    rows = list(dict.fromkeys(labels.tolist() if classes is None else classes))
    if missing := set(labels.tolist()) - {*rows}:
        raise ValueError(
            f"classes must hold every label; got {rows} without {sorted(missing)}. Leave out the "
            "images that are not to be drawn."
        )
    columns = int(max(np.count_nonzero(labels == label) for label in rows))
    sheet = np.full((len(rows), columns, *images.shape[1:]), num_levels - 1, images.dtype)
    for row, label in enumerate(rows):
        members = images[labels == label]
        sheet[row, : len(members)] = members
    return grid(sheet.reshape(-1, *images.shape[1:]), columns=columns, num_levels=num_levels)


def beside(left: ArrayLike, right: ArrayLike, *, gap: int = 32) -> np.ndarray:
    """Two pictures side by side, their upper edges level, a thin line in the gap between them.

    Real images left and drawn ones right, a row for each class:

        beside(*(by_class(x, y, classes=range(10)) for x, y in ((real, labels), (drawn, wanted))))

    Args:
      left: a picture, uint8 `[height, width, 3]`.
      right: another, perhaps of another size.
      gap: pixels between them, 1 or more.

    Returns:
      A picture, uint8 `[max height, width + gap + width, 3]`, white where there is neither.

    Raises:
      ValueError: if one is no picture, or `gap < 1`.

    Example:
      >>> black = np.zeros((40, 50, 3), np.uint8)
      >>> beside(black, black).shape
      (40, 132, 3)
    """
    if gap < 1:
        raise ValueError(f"gap must be 1 pixel or more; got {gap}. 32 can be seen at a glance.")
    left, right = as_picture(left), as_picture(right)
    height, start = max(len(left), len(right)), left.shape[1] + gap
    sheet = np.full((height, start + right.shape[1], 3), 255, np.uint8)
    sheet[:, left.shape[1] + gap // 2] = 170
    sheet[: len(left), : left.shape[1]] = left
    sheet[: len(right), start:] = right
    return sheet


def _as_images(images: ArrayLike) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or not images.size:
        raise ValueError(
            "images must be [num, height, width, channel], at least one; got shape "
            f"{images.shape}. A single image needs images[None], grey ones images[..., None]."
        )
    return images
