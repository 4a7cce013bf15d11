"""Tables of numbers: every column and every pair of columns, data and samples in one picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from .pictures import BLUE, ORANGE, render

MOST = 6  # columns that are drawn


def corner(data: ArrayLike, samples: ArrayLike, names: Sequence[str]) -> np.ndarray:
    """A corner plot: densities of single columns on the diagonal, pairs of columns below it.

    Args:
      data: `[num, D]`, finite.
      samples: `[num_samples, D]`, finite, in the same units.
      names: of the columns, D of them.

    Returns:
      A picture, uint8 `[height, width, 3]`, of the first six columns. The data are orange, the
      samples blue; all of the data's range is shown, samples beyond it are not.

    Raises:
      ValueError: for other shapes, or a NaN or an infinity.

    Example:
      >>> x = np.random.default_rng(0).standard_normal((2, 500, 3))
      >>> corner(x[0], x[1], ["mass", "charge", "spin"]).shape
      (600, 600, 3)
    """
    data, samples = _as_rows("data", data, names), _as_rows("samples", samples, names)
    num = min(data.shape[1], MOST)
    size = max(4.0, 5 * num / 3)
    figure = Figure(figsize=(size, size), dpi=120, layout="constrained")
    grid = figure.subplots(num, num, squeeze=False)
    ranges = [_range(data[:, k]) for k in range(num)]
    for row in range(num):
        for column in range(num):
            axes = grid[row, column]
            if column > row:
                axes.set_visible(False)
                continue
            axes.set_xlim(ranges[column])
            if column == row:
                _draw_column(axes, data[:, row], samples[:, row], ranges[row])
            else:
                # As many of either, the data on top.
                for x, colour in ((samples[: len(data)], BLUE), (data[: len(samples)], ORANGE)):
                    axes.scatter(x[:, column], x[:, row], s=4, color=colour, linewidths=0)
                axes.set_ylim(ranges[row])
            axes.set_xlabel(names[column] if row == num - 1 else "")
            axes.set_ylabel(names[row] if column == 0 and row else "")
            axes.tick_params(labelsize=7, labelbottom=row == num - 1, labelleft=0 == column < row)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].legend(frameon=False, fontsize=7)
    return render(figure)


def _draw_column(
    axes: Any, data: np.ndarray, samples: np.ndarray, shown: tuple[float, float]
) -> None:
    edges = np.linspace(shown[0], shown[1], 41)
    look: dict[str, Any] = {"bins": edges, "density": True}
    axes.hist(data, color=ORANGE, alpha=0.5, label="data", **look)
    axes.hist(samples, color=BLUE, histtype="step", linewidth=1.4, label="samples", **look)
    axes.set_yticks([])


def _range(x: np.ndarray) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _as_rows(what: str, x: ArrayLike, names: Sequence[str]) -> np.ndarray:
    rows = np.asarray(x, np.float64)
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != len(names):
        raise ValueError(
            f"{what} must be rows [num, {len(names)}], a column for each name; got shape "
            f"{rows.shape}."
        )
    if not np.isfinite(rows).all():
        raise ValueError(f"{what} must be finite; got a NaN or an infinity.")
    return rows
