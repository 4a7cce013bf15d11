"""Animations: frames of one size as a GIF, and the frames of flows in the plane and of images."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image
from scipy import spatial

from ..files import write_whole
from .grids import grid
from .panels import (
    Extent,
    as_density,
    as_extent,
    as_trajectories,
    draw_density,
    draw_points,
    spaced,
    tidy,
    widened,
)
from .pictures import as_picture

SHORTEST = 0.02  # seconds; browsers slow down a GIF whose frames are shorter


def animation(
    frames: Sequence[ArrayLike] | np.ndarray,
    path: str | os.PathLike[str],
    *,
    seconds: float = 4.0,
    hold: float = 2.0,
) -> None:
    """Writes frames as a GIF that loops, its last frame held, by an atomic write.

    All frames share one palette of the 256 colours that serve them best, without dithering: what
    stands still does not flicker, and costs nothing in the file. A frame equal to the one before
    prolongs it.

    Args:
      frames: pictures of one size, uint8 `[num_frames, height, width, 3]` or a sequence of them.
      path: the file, its folder there already.
      seconds: from the first frame to the last; a GIF counts in hundredths.
      hold: seconds that the last frame stays.

    Raises:
      ValueError: for no frame, pictures of several sizes, or frames shorter than 0.02 seconds.
      OSError: if the file can't be written; what it held stays.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "grey.gif"
      >>> animation([np.full((8, 8, 3), grey, np.uint8) for grey in (0, 80, 160)], path)
      >>> Image.open(path).n_frames
      3
    """
    pictures = [as_picture(frame) for frame in frames]
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise ValueError(
            f"frames must be one or more pictures of one size; got {len(pictures)} of the shapes "
            f"{sorted(shapes)}."
        )
    moving = len(pictures) - 1
    if not (hold >= SHORTEST and seconds >= SHORTEST * moving):
        raise ValueError(
            f"A frame must last at least {SHORTEST} seconds; got {moving} of them in "
            f"seconds={seconds}, and hold={hold} for the last. Take fewer frames or more time."
        )
    ends = np.round(np.linspace(0.0, 100 * seconds, moving + 1)) if moving else np.zeros(1)
    durations = [*np.diff(ends).tolist(), round(100 * hold)]
    first, *others = _with_one_palette(pictures)
    write_whole(
        Path(path),
        lambda file: first.save(
            file,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=[int(10 * duration) for duration in durations],
            loop=0,
        ),
    )


def plane_frames(
    x: ArrayLike, densities: ArrayLike, extent: Extent, *, t: ArrayLike | None = None
) -> np.ndarray:
    """Frames of a flow in the plane: the points of each time, and the model's density beside them.

    One scale of colours holds for all times, so that the density is seen to rise.

    Args:
      x: from the noise to the samples, `[num_times, num, 2]`.
      densities: of the same times, at `grid_points(extent, side)`: `[num_times, side, side]`;
        that of time t is `exp(fm.log_prob(velocity, grid, t1=t))`.
      extent: (left, right, bottom, top); `limits(x)` holds all points.
      t: the times, `[num_times]`, which are then written above the points.

    Returns:
      Pictures, uint8 `[num_times, 330, 640, 3]`.

    Raises:
      ValueError: for another shape, other numbers of times, a value that is not finite, a negative
        density, or a bad extent.

    Example:
      >>> from fmjax import plotting
      >>> t, x0 = np.array([0.0, 0.5]), np.random.default_rng(0).standard_normal((100, 2))
      >>> extent, scale = plotting.limits(x0), 1 - t[:, None, None]
      >>> square = np.square(plotting.grid_points(extent, 200) / scale).sum(axis=2)
      >>> p = (np.exp(-square / 2) / (2 * np.pi * scale[..., 0] ** 2)).reshape(2, 200, 200)
      >>> plane_frames(scale * x0, p, extent, t=t).shape
      (2, 330, 640, 3)
    """
    x, extent = as_trajectories("x", x), as_extent(extent)
    densities = np.asarray(densities)
    if densities.ndim != 3 or len(densities) != len(x):
        raise ValueError(
            f"densities must be [num_times, rows, columns], one for each of {len(x)} times; got "
            f"shape {densities.shape}."
        )
    densities = as_density("densities", densities.reshape(len(x), -1)).reshape(densities.shape)
    titles = _titles(t, len(x))
    figure = Figure(figsize=(6.4, 3.3), dpi=100, layout=spaced())
    canvas, (left, right) = FigureCanvasAgg(figure), figure.subplots(1, 2)
    points = draw_points(left, x[0])
    image = draw_density(right, densities[0], extent, highest=float(densities.max()))
    shown, frames = widened(extent, x), []
    tidy(left, shown, titles[0])
    tidy(right, shown, "density")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # else it moves the panels a little with every drawing
    for title, now, p in zip(titles, x, densities, strict=True):
        left.title.set_text(title)
        points.set_offsets(now)
        image.set_data(p)
        canvas.draw()
        frames.append(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    return np.stack(frames)


def image_frames(x: ArrayLike, num_levels: int = 256, columns: int | None = None) -> np.ndarray:
    """Frames of images that come out of noise: a grid for each time.

    Args:
      x: floats, `[num_times, num, height, width, channel]`; [-1, 1] goes to the levels as
        `fmjax.data.pixels.quantize` takes it, floor(num_levels (x + 1) / 2), clipped.
      num_levels: pixel values.
      columns: images per row; None for about a square.

    Returns:
      Pictures, uint8 `[num_times, height, width, 3]`, as `grid` makes them.

    Raises:
      ValueError: for another shape, no floats, a NaN or an infinity, or as `grid` does.

    Example:
      >>> image_frames(np.zeros((3, 16, 8, 8, 1)), num_levels=17).shape
      (3, 276, 276, 3)
    """
    x = np.asarray(x)
    if x.ndim != 5 or not x.size or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(
            "x must be floating, [num_times, num, height, width, channel], not empty; got "
            f"{x.dtype} of shape {x.shape}. Images of a single time need x[None]."
        )
    if not np.isfinite(x).all():
        raise ValueError("x must be finite; got a NaN or an infinity. Find out where from.")
    levels = np.clip(np.floor((x.astype(np.float64) + 1) / 2 * num_levels), 0, num_levels - 1)
    return np.stack([grid(i, columns=columns, num_levels=num_levels) for i in levels.astype(int)])


def _with_one_palette(pictures: Sequence[np.ndarray]) -> list[Image.Image]:
    """Every pixel in the nearest of 256 colours: a median cut of about 16 of the frames."""
    chosen = np.unique(np.linspace(0, len(pictures) - 1, 16).round().astype(int))
    together = Image.fromarray(np.concatenate([pictures[i] for i in chosen]))
    cut = together.quantize(256, dither=Image.Dither.NONE).getpalette() or []
    palette = np.reshape(cut, (-1, 3))
    tree, frames = spatial.KDTree(palette), []
    for picture in pictures:
        # Pillow's own search goes through a coarse table, which makes white a little grey.
        red, green, blue = picture.reshape(-1, 3).T.astype(np.int32)
        packed, which = np.unique(red << 16 | green << 8 | blue, return_inverse=True)
        colours = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], axis=1)
        nearest = np.asarray(tree.query(colours)[1], np.uint8)
        frame = Image.fromarray(nearest[which].reshape(picture.shape[:2]))
        frame.putpalette(palette.ravel().tolist())
        frames.append(frame)
    return frames


def _titles(t: ArrayLike | None, num_times: int) -> list[str]:
    if t is None:
        return num_times * ["samples"]
    times = np.asarray(t)
    if times.shape != (num_times,):
        raise ValueError(f"t must be [{num_times}], as x has times; got shape {times.shape}.")
    return [f"samples, t = {time:.2f}" for time in times.tolist()]
