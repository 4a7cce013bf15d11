"""Panels of the plane: points, trajectories and densities on axes that hold all of them."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike

from .pictures import BLUE, DARK, GREY, ORANGE

Extent = tuple[float, float, float, float]  # left, right, bottom, top
# From the page's white, so that no edge shows where the grid of a density ends.
DENSITY = LinearSegmentedColormap.from_list("density", ["#ffffff", "#a9c5e8", BLUE, "#182c5c"])
TIME = LinearSegmentedColormap.from_list("time", [ORANGE, "#a9a0a0", BLUE])


def limits(*points: ArrayLike, margin: float = 0.05) -> Extent:
    """The smallest square around points in the plane, with a margin on every side.

    Args:
      *points: `[..., 2]`, finite, in any number of arrays.
      margin: as a fraction of the square's side, 0 or more.

    Returns:
      (left, right, bottom, top), Matplotlib's extent: what the other functions take.

    Raises:
      ValueError: for no points, another last axis than 2, a NaN or an infinity, `margin < 0`.

    Example:
      >>> limits([[0.0, 0.0], [4.0, 2.0]], margin=0.25)
      (-1.0, 5.0, -2.0, 4.0)
    """
    if not margin >= 0:
        raise ValueError(f"margin must be 0 or more; got {margin}. 0.05 is a twentieth.")
    arrays = [as_points("points", array) for array in points]
    if not arrays:
        raise ValueError("limits needs at least one array of points [..., 2]; got none.")
    low = np.min([array.min(axis=0) for array in arrays], axis=0)
    high = np.max([array.max(axis=0) for array in arrays], axis=0)
    half = (0.5 + margin) * float((high - low).max()) or 1.0  # around a single point
    x, y = ((low + high) / 2).tolist()
    return x - half, x + half, y - half, y + half


def grid_points(extent: Extent, side: int = 400) -> np.ndarray:
    """Where to evaluate a density that is to be drawn: the centres of side x side cells.

    Args:
      extent: (left, right, bottom, top), `limits(...)` for example.
      side: cells on every side.

    Returns:
      float32 `[side^2, 2]`, row after row from the bottom: `density` takes the values at these
      points as `.reshape(side, side)`. A cell's area times their sum is the mass in the square.

    Raises:
      ValueError: if the extent is empty or not finite, or `side < 1`.

    Example:
      >>> grid_points((0.0, 4.0, 0.0, 2.0), side=2).tolist()
      [[1.0, 0.5], [3.0, 0.5], [1.0, 1.5], [3.0, 1.5]]
    """
    left, right, bottom, top = as_extent(extent)
    if side < 1:
        raise ValueError(f"side must be 1 or more; got {side}. 300 and more look smooth.")
    steps = (np.arange(side) + 0.5) / side
    x, y = left + (right - left) * steps, bottom + (top - bottom) * steps
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)


def as_points(what: str, x: ArrayLike) -> np.ndarray:
    """`x`, `[..., 2]` and finite, as float64 `[num, 2]`."""
    points = np.asarray(x)
    if points.ndim < 1 or points.shape[-1] != 2 or not points.size:
        raise ValueError(
            f"{what} must be points in the plane, [..., 2], at least one; got shape "
            f"{points.shape}. Of more dimensions choose two: x[..., :2]."
        )
    points = points.astype(np.float64).reshape(-1, 2)
    if bad := len(points) - int(np.isfinite(points).all(axis=1).sum()):
        raise ValueError(
            f"{what} must be finite; {bad} of {len(points)} hold a NaN or an infinity. Find out "
            "where they come from: left out, they would flatter the picture."
        )
    return points


def as_trajectories(what: str, x: ArrayLike) -> np.ndarray:
    """`x`, `[num_times, num, 2]` and finite, as float64."""
    x = np.asarray(x)
    if x.ndim != 3:
        raise ValueError(
            f"{what} must be [num_times, num, 2]; got shape {x.shape}. fm.integrate returns it "
            "when it is given the times: integrate(velocity, x0, ts=ts).x."
        )
    return as_points(what, x).reshape(x.shape)


def as_density(what: str, p: ArrayLike) -> np.ndarray:
    """`p`, `[rows, columns]`, finite and not negative, as float64."""
    p = np.asarray(p)
    if p.ndim != 2 or not p.size:
        raise ValueError(
            f"{what} must be [rows, columns], not empty; got shape {p.shape}. At "
            "grid_points(extent, side) it needs .reshape(side, side)."
        )
    p = p.astype(np.float64)
    if not (np.isfinite(p).all() and p.min() >= 0):
        raise ValueError(
            f"{what} must be finite and not negative; got {p.min()} to {p.max()}. A log-density "
            "needs numpy.exp."
        )
    return p


def as_extent(extent: Extent) -> Extent:
    """`extent` as four floats; refuses an empty square."""
    values = np.asarray(extent, np.float64)
    if (
        values.shape != (4,)
        or not np.isfinite(values).all()
        or not (values[::2] < values[1::2]).all()
    ):
        raise ValueError(
            f"extent must be (left, right, bottom, top), left < right and bottom < top; got "
            f"{extent}. limits(points) makes one."
        )
    left, right, bottom, top = values.tolist()
    return left, right, bottom, top


def widened(extent: Extent, *points: np.ndarray) -> Extent:
    """`extent`, or the square around it and the points if one is outside."""
    left, right, bottom, top = extent
    corners = np.array([[left, bottom], [right, top]])
    low, high = corners
    held = all((low <= array).all() and (array <= high).all() for array in points)
    return extent if held else limits(corners, *points)


def spaced() -> ConstrainedLayoutEngine:
    """A figure's layout, with some air at its edges and between its panels."""
    return ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.02)


def draw_points(
    axes: Axes, points: np.ndarray, *, colour: str = BLUE, smaller: float = 1.0
) -> PathCollection:
    """Points `[num, 2]`, the smaller the more there are."""
    size = float(np.clip(6000 / len(points), 1.5, 12.0)) / smaller
    return axes.scatter(*points.T, s=size, color=colour, linewidths=0, zorder=3)


def draw_trajectories(axes: Axes, x: np.ndarray, num_lines: int) -> None:
    """The ways of the first points, where these began, and where all points ended."""
    lines = x[:, :num_lines]
    axes.plot(lines[..., 0], lines[..., 1], color=GREY, linewidth=0.5, alpha=0.6, zorder=1)
    draw_points(axes, lines[0], colour=ORANGE, smaller=2.0).set_label("noise, t = 0")
    draw_points(axes, x[-1]).set_label("samples, t = 1")


def draw_ways(axes: Axes, x: np.ndarray, num_lines: int) -> None:
    """The ways of the first points, from orange to blue in time, between where all are."""
    lines = x[:, :num_lines]
    parts = np.stack([lines[:-1], lines[1:]], axis=2).reshape(-1, 2, 2)  # time, then line
    times = np.repeat(np.linspace(0.0, 1.0, len(lines) - 1), lines.shape[1])
    axes.add_collection(
        LineCollection(
            list(parts), array=times, cmap=TIME, linewidths=0.8, alpha=0.75, zorder=2,
            capstyle="round",
        )
    )  # fmt: skip
    for points, colour in ((x[0], ORANGE), (x[-1], BLUE)):
        draw_points(axes, points, colour=colour).set_alpha(0.35)


def draw_density(axes: Axes, p: np.ndarray, extent: Extent, *, highest: float) -> AxesImage:
    """A density, white at zero and darkest at `highest`."""
    return axes.imshow(
        p, origin="lower", extent=extent, cmap=DENSITY, vmin=0.0, vmax=highest or 1.0, zorder=0
    )


def tidy(axes: Axes, shown: Extent, title: str = "") -> None:
    """One scale on both axes, no ticks, a thin frame."""
    axes.set(xlim=shown[:2], ylim=shown[2:], aspect="equal", xticks=[], yticks=[])
    axes.set_title(title, fontsize=11, color=DARK)
    axes.spines[:].set(color="#cccccc", linewidth=0.8)
