"""One image as a picture, a figure as a picture, and a picture as a file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image

from ..files import write_whole

BLUE, ORANGE, GREY = "#3b6fb6", "#d9762b", "#9a9a9a"
GREEN, VIOLET, DARK = "#4f9a5b", "#7a5aa6", "#444444"


def picture(image: ArrayLike, *, num_levels: int = 256) -> np.ndarray:
    """One image as a picture, pixel by pixel: level l is round(255 l / (num_levels - 1)).

    Args:
      image: integers in 0..num_levels-1, `[height, width, channel]`, 1 or 3 channels.
      num_levels: pixel values, 2 or more.

    Returns:
      uint8 `[height, width, 3]`.

    Raises:
      ValueError: for another shape, floats, or a level out of range.

    Example:
      >>> picture(np.array([[[0], [8], [16]]]), num_levels=17)[0, :, 0].tolist()
      [0, 128, 255]
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size:
        raise ValueError(
            "image must be [height, width, channel] with 1 or 3 channels, not empty; got shape "
            f"{image.shape}. plotting.grid draws several, and other channels side by side."
        )
    return np.broadcast_to(as_bytes(image, num_levels), (*image.shape[:2], 3)).copy()


def save(path: str | os.PathLike[str], picture: ArrayLike) -> None:
    """Writes a picture as PNG, by an atomic write: a kill leaves the old file or the new one.

    A picture without colour is written with one channel, which is smaller and is read back as one.

    Args:
      path: the file, its folder there already.
      picture: uint8 `[height, width, 3]`.

    Raises:
      ValueError: if it is no picture.
      OSError: if the file can't be written; what it held stays.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "white.png"
      >>> save(path, np.full((2, 3, 3), 255, np.uint8))
      >>> Image.open(path).size
      (3, 2)
    """
    pixels = as_picture(picture)
    grey = (pixels == pixels[..., :1]).all()
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]) if grey else pixels)
    write_whole(Path(path), lambda file: image.save(file, format="PNG", optimize=True))


def render(figure: Figure) -> np.ndarray:
    """A Matplotlib figure as a picture, uint8 `[height, width, 3]`, without pyplot's state."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def as_picture(picture: Any) -> np.ndarray:
    """`picture` as a contiguous uint8 array `[height, width, 3]`; refuses all else."""
    pixels = np.asarray(picture)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f"A picture is uint8 [height, width, 3], not empty; got {pixels.dtype} of shape "
            f"{pixels.shape}. plotting.picture or plotting.grid makes one of images."
        )
    return np.ascontiguousarray(pixels)


def as_bytes(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Integers in 0..num_levels-1 as uint8 in 0..255, of the same shape."""
    if not num_levels >= 2:
        raise ValueError(f"num_levels must be 2 or more; got {num_levels}. 256 is the usual.")
    if not np.issubdtype(levels.dtype, np.integer):
        raise ValueError(
            f"Images must be integers, 0..num_levels-1; got {levels.dtype}. Floats in [-1, 1] need "
            "fmjax.data.pixels.quantize."
        )
    low, high = levels.min(), levels.max()
    if low < 0 or high >= num_levels:
        raise ValueError(
            f"Levels must be in 0..{num_levels - 1}; got {low} to {high}. Does num_levels="
            f"{num_levels} belong to these images?"
        )
    return np.round(levels.astype(np.float32) * (255 / (num_levels - 1))).astype(np.uint8)
