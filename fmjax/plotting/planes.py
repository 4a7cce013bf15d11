"""Flows in the plane: trajectories, densities, and both beside the data.

Nothing is cropped: a panel's limits hold all of its points, and the whole extent of a density.
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

from .panels import (
    Extent,
    as_density,
    as_extent,
    as_points,
    as_trajectories,
    draw_density,
    draw_points,
    draw_trajectories,
    draw_ways,
    limits,
    spaced,
    tidy,
    widened,
)
from .pictures import GREY, render


def trajectories(x: ArrayLike, *, num_lines: int = 400) -> np.ndarray:
    """The ways from noise to samples.

    Args:
      x: from the noise to the samples, `[num_times, num, 2]`; `fm.integrate(..., ts=ts).x`.
      num_lines: the ways of the first `num_lines` points are drawn, and the ends of all.

    Returns:
      A picture, uint8 `[600, 600, 3]`.

    Raises:
      ValueError: for another shape, a NaN or an infinity, or `num_lines < 1`.

    Example:
      >>> x0 = np.random.default_rng(0).standard_normal((50, 2))
      >>> trajectories(np.stack([(1 - t) * x0 for t in (0.0, 0.5, 0.9)])).shape
      (600, 600, 3)
    """
    x = as_trajectories("x", x)
    _check_num_lines(num_lines)
    figure = Figure(figsize=(5, 5), dpi=120, layout=spaced())
    axes = figure.subplots()
    draw_trajectories(axes, x, num_lines)
    tidy(axes, limits(x))
    _explain(figure)
    return render(figure)


def ways(panels: Mapping[str, ArrayLike], *, num_lines: int = 60) -> np.ndarray:
    """The ways between two data sets, of a panel for each sampler, from orange to blue in time.

    Args:
      panels: title -> states from t = 0 to t = 1, `[num_times, num, 2]`.
      num_lines: the ways of the first `num_lines` points are drawn, and both ends of all.

    Returns:
      A picture, uint8 `[600, 576 * number of panels, 3]`, of panels with one scale.

    Raises:
      ValueError: for no panel, another shape, a NaN or an infinity, or `num_lines < 1`.

    Example:
      >>> x0 = np.random.default_rng(0).standard_normal((50, 2))
      >>> ways({"shrunk": [x0, x0 / 2], "moved": [x0, x0 + 3]}).shape
      (600, 1152, 3)
    """
    if not panels:
        raise ValueError("panels must hold one set of ways at least; got none.")
    _check_num_lines(num_lines)
    all_of = {title: as_trajectories(title, x) for title, x in panels.items()}
    figure = Figure(figsize=(4.8 * len(all_of), 5), dpi=120, layout=spaced())
    shown = limits(*all_of.values())
    for axes, (title, x) in zip(
        figure.subplots(1, len(all_of), squeeze=False).flat, all_of.items(), strict=True
    ):
        draw_ways(axes, x, num_lines)
        tidy(axes, shown, title)
    return render(figure)


def density(p: ArrayLike, extent: Extent, *, highest: float | None = None) -> np.ndarray:
    """A density in the plane, white at zero, the darker the higher.

    Args:
      p: its values at `grid_points(extent, side)` as `[side, side]`: row = second coordinate, from
        the bottom. 300 and more per side look smooth.
      extent: (left, right, bottom, top).
      highest: the density that is darkest; None for the largest of `p`.

    Returns:
      A picture, uint8 `[600, 720, 3]`, with a bar of the colours' densities.

    Raises:
      ValueError: for another shape, a value that is negative or not finite, a bad extent, or
        `highest <= 0`.

    Example:
      >>> from fmjax import plotting
      >>> extent = (-3.0, 3.0, -3.0, 3.0)
      >>> p = np.exp(-np.square(plotting.grid_points(extent, 300)).sum(axis=1) / 2) / (2 * np.pi)
      >>> density(p.reshape(300, 300), extent).shape
      (600, 720, 3)
    """
    p, extent = as_density("p", p), as_extent(extent)
    if highest is not None and not highest > 0:
        raise ValueError(f"highest must be positive; got {highest}. None takes the largest of p.")
    figure = Figure(figsize=(6, 5), dpi=120, layout=spaced())
    axes = figure.subplots()
    image = draw_density(axes, p, extent, highest=highest or float(p.max()))
    tidy(axes, extent)
    _bar(figure, image)
    return render(figure)


def plane(
    data: ArrayLike,
    trajectories: ArrayLike,
    density: ArrayLike,
    extent: Extent,
    *,
    num_lines: int = 400,
) -> np.ndarray:
    """A flow in the plane: the data, the ways of the samples, and the model's density.

    Args:
      data: `[num, 2]`.
      trajectories: from the noise to the samples, `[num_times, num_samples, 2]`.
      density: exp(log_prob) at `grid_points(extent, side)`, `[side, side]`.
      extent: of the density, (left, right, bottom, top), such as `limits(data, margin=0.1)`. Data
        and density have one scale; the noise reaches further, and its panel too.
      num_lines: the ways of the first `num_lines` samples are drawn, and the ends of all.

    Returns:
      A picture, uint8 `[492, 1440, 3]`, of three panels.

    Raises:
      ValueError: for another shape, a value that is not finite, a negative density, a bad extent,
        or `num_lines < 1`.

    Example:
      >>> from fmjax import plotting
      >>> x = np.random.default_rng(0).standard_normal((5, 100, 2))
      >>> extent = plotting.limits(x[-1])
      >>> p = np.exp(-np.square(plotting.grid_points(extent, 300)).sum(axis=1) / 2) / (2 * np.pi)
      >>> plane(x[-1], x, p.reshape(300, 300), extent).shape
      (492, 1440, 3)
    """
    data, x = as_points("data", data), as_trajectories("trajectories", trajectories)
    p, extent = as_density("density", density), as_extent(extent)
    _check_num_lines(num_lines)
    figure = Figure(figsize=(12, 4.1), dpi=120, layout=spaced())
    left, middle, right = figure.subplots(1, 3)
    draw_points(left, data, colour=GREY)
    draw_trajectories(middle, x, num_lines)
    draw_density(right, p, extent, highest=float(p.max()))
    shown = widened(extent, data)
    tidy(left, shown, "data")
    tidy(middle, limits(x), "from noise (orange) to samples (blue)")
    tidy(right, shown, "density, by exact likelihood")
    return render(figure)


def samples_and_density(
    data: ArrayLike, samples: ArrayLike, density: ArrayLike, extent: Extent
) -> np.ndarray:
    """Held-out data, samples, and the model's density with a bar of its values, side by side.

    Args:
      data: `[num, 2]`.
      samples: `[num_samples, 2]`.
      density: exp(log_prob) at `grid_points(extent, side)`, `[side, side]`.
      extent: (left, right, bottom, top).

    Returns:
      A picture, uint8 `[456, 1440, 3]`, of three panels.

    Raises:
      ValueError: for another shape, a value that is not finite, a negative density, a bad extent.

    Example:
      >>> from fmjax import plotting
      >>> x, extent = np.random.default_rng(0).standard_normal((2, 100, 2)), (-4.0, 4.0, -4.0, 4.0)
      >>> p = np.exp(-np.square(plotting.grid_points(extent, 300)).sum(axis=1) / 2) / (2 * np.pi)
      >>> samples_and_density(x[0], x[1], p.reshape(300, 300), extent).shape
      (456, 1440, 3)
    """
    data, samples = as_points("data", data), as_points("samples", samples)
    p, extent = as_density("density", density), as_extent(extent)
    figure = Figure(figsize=(12, 3.8), dpi=120, layout=spaced())
    left, middle, right = figure.subplots(1, 3)
    draw_points(left, data, colour=GREY)
    draw_points(middle, samples)
    image = draw_density(right, p, extent, highest=float(p.max()))
    shown = widened(extent, data, samples)
    for axes, title in ((left, "data"), (middle, "samples"), (right, "density")):
        tidy(axes, shown, title)
    _bar(figure, image)
    return render(figure)


def _explain(figure: Figure) -> None:
    """A legend above the panels, where it hides nothing."""
    legend = figure.legend(loc="outside upper center", ncols=2, frameon=False)
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([25.0])


def _bar(figure: Figure, image: AxesImage) -> None:
    bar = figure.colorbar(image, ax=image.axes, shrink=0.8)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _check_num_lines(num_lines: int) -> None:
    if num_lines < 1:
        raise ValueError(f"num_lines must be 1 or more; got {num_lines}. 400 can be told apart.")
