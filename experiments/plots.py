"""Pictures of a run: grids of images, loss curves, flows in the plane."""

import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

BLUE, ORANGE, GREY = "#3b6fb6", "#d9762b", "#9a9a9a"
GREEN, VIOLET = "#4f9a5b", "#7a5aa6"
SOLVER_COLOURS = {
    "Euler": GREY,
    "Heun": ORANGE,
    "Midpoint": GREEN,
    "Tsit5": BLUE,
    "Dopri5": VIOLET,
}


def save_grid(
    images: np.ndarray, path: pathlib.Path, *, num_levels: int = 256, columns: int | None = None
) -> None:
    """A PNG of a grid of images, small ones enlarged by a whole factor.

    Args:
      images: integers in 0..num_levels-1, `[num, height, width, channel]`. Other channels than 1
        or 3 are drawn side by side.
      path: where to.
      num_levels: pixel values.
      columns: images per row; None for about a square.
    """
    if images.shape[3] not in (1, 3):  # each channel grey, side by side
        images = np.concatenate(np.split(images, images.shape[3], axis=3), axis=2)
    num, height, width, channel = images.shape
    columns = columns or int(np.ceil(np.sqrt(num)))
    rows = -(-num // columns)
    scale = max(1, round(64 / height))
    pixels = np.round(images.astype(np.float32) * (255 / (num_levels - 1))).astype(np.uint8)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    gap = 4
    cell_height, cell_width = height * scale + gap, width * scale + gap
    sheet = np.full((rows * cell_height + gap, columns * cell_width + gap, channel), 255, np.uint8)
    for i, image in enumerate(pixels):
        y, x = gap + i // columns * cell_height, gap + i % columns * cell_width
        sheet[y : y + height * scale, x : x + width * scale] = image
    Image.fromarray(sheet[..., 0] if channel == 1 else sheet).save(path, optimize=True)


def save_picture(image: np.ndarray, path: pathlib.Path, *, num_levels: int = 256) -> None:
    """A PNG of one image, pixel by pixel.

    Args:
      image: integers in 0..num_levels-1, `[height, width, channel]`, 1 or 3 channels.
      path: where to.
      num_levels: pixel values.
    """
    if image.shape[2] not in (1, 3):
        raise ValueError(f"A picture has 1 or 3 channels; got {image.shape[2]}. Take an .npz file.")
    pixels = np.round(image.astype(np.float32) * (255 / (num_levels - 1))).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, optimize=True)


def by_class(images: np.ndarray, labels: np.ndarray, num_levels: int) -> tuple[np.ndarray, int]:
    """Images in rows of one class each, in the order in which the classes first come.

    Args:
      images: `[num, height, width, channel]`.
      labels: their classes, `[num]`.
      num_levels: the last is white, which fills the rows up.

    Returns:
      The images with white ones between, and how many make a row.
    """
    classes = list(dict.fromkeys(labels.tolist()))
    columns = int(max(np.count_nonzero(labels == label) for label in classes))
    sheet = np.full((len(classes), columns, *images.shape[1:]), num_levels - 1, images.dtype)
    for row, label in enumerate(classes):
        members = images[labels == label]
        sheet[row, : len(members)] = members
    return sheet.reshape(-1, *images.shape[1:]), columns


def save_loss_curve(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """The loss of metrics.jsonl against the step, each line and a running mean over ten."""
    rows = [row for row in rows if row["loss"] is not None]  # steps that were left out
    if not rows:
        return
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows])
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color=GREY, linewidth=0.8, label="one batch")
    if len(losses) >= 20:
        mean = np.convolve(losses, np.ones(10) / 10, mode="valid")
        axes.plot(steps[9:], mean, color=BLUE, linewidth=1.6, label="mean of 10 lines")
        axes.legend(frameon=False)
    low, high = np.quantile(losses, [0.0, 0.98])
    axes.set_ylim(0.95 * low, 1.1 * high)
    axes.set(xlabel="step", ylabel="flow-matching loss")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def save_plane(
    path: pathlib.Path,
    *,
    data: np.ndarray,
    trajectories: np.ndarray,
    density: np.ndarray,
    extent: float,
) -> None:
    """A flow in the plane: data, samples with the ways they came, and the model's density.

    Args:
      path: where to.
      data: `[num, 2]`.
      trajectories: `[num_times, num_samples, 2]`, from noise to sample.
      density: exp(log_prob) on a square grid over [-extent, extent]^2, `[n, n]`, row = second
        coordinate.
      extent: half the width of the pictures.
    """
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.scatter(*data.T, s=2, color=GREY, linewidths=0)
    left.set_title("data")
    middle.plot(trajectories[:, :400, 0], trajectories[:, :400, 1], color=GREY, lw=0.3, alpha=0.6)
    middle.scatter(*trajectories[0, :400].T, s=3, color=ORANGE, linewidths=0, label="noise, t = 0")
    middle.scatter(*trajectories[-1].T, s=3, color=BLUE, linewidths=0, label="samples, t = 1")
    middle.legend(loc="upper right", frameon=False, markerscale=3)
    middle.set_title("trajectories")
    right.imshow(
        density,
        origin="lower",
        extent=(-extent, extent, -extent, extent),
        cmap=matplotlib.colormaps["magma"],
    )
    right.set_title("density, by exact likelihood")
    for axes in (left, middle, right):
        axes.set(
            xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal", xticks=[], yticks=[]
        )
    figure.savefig(path, dpi=110)


def save_curve(rows: Sequence[dict[str, Any]], path: pathlib.Path, *, label: str) -> None:
    """Quality, and distance from the exact flow, against evaluations; a line per solver.

    Args:
      rows: of `experiments.curve.measure`.
      path: where to.
      label: what the quality is.
    """
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    *points, exact = rows
    for solver, colour in SOLVER_COLOURS.items():
        for adaptive in (False, True):
            kind = "adaptive" if adaptive else "equal steps"
            found = [
                r for r in points if r["solver"] == solver and (r["num_steps"] is None) == adaptive
            ]
            if not found:
                continue
            found.sort(key=lambda row: row["num_evaluations"])
            cost = [row["num_evaluations"] for row in found]
            look: dict[str, Any] = {"color": colour, "markersize": 4, "linewidth": 1.2}
            look |= {"marker": "o", "linestyle": "--" if adaptive else "-"}
            look |= {"markerfacecolor": "white" if adaptive else colour}
            left.plot(cost, [row["quality"] for row in found], **look)
            right.plot(cost, [row["error_rms"] for row in found], label=f"{solver}, {kind}", **look)
    low, high = (exact["quality"] + sign * exact["standard_error"] for sign in (-1, 1))
    left.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    left.axhline(exact["quality"], color=GREY, linewidth=0.8)
    left.set_ylabel(textwrap.fill(label, 36))
    left.set_title("exact flow: line, with its standard error", fontsize=9, color="#666666")
    right.set_ylabel("distance from the exact flow (rms)")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network")
        axes.xaxis.set_major_locator(FixedLocator([4, 8, 16, 32, 64, 128, 256]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.6)
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    figure.savefig(path, dpi=150)


def save_density(
    path: pathlib.Path,
    data: np.ndarray,
    samples: np.ndarray,
    density: np.ndarray,
    *,
    extent: float,
) -> None:
    """Held-out data, samples and the model's density on a square grid, side by side."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (title, points) in zip(
        figure.subplots(1, 3),
        (("data", data), ("samples", samples), ("density", None)),
        strict=True,
    ):
        if points is None:
            square = (-extent, extent, -extent, extent)
            picture = axes.imshow(density, origin="lower", extent=square, cmap="magma")
            figure.colorbar(picture, ax=axes, shrink=0.8)
        else:
            axes.scatter(*points.T, s=2, color=BLUE, linewidths=0)
        shown = (-0.75 * extent, 0.75 * extent)
        axes.set(xlim=shown, ylim=shown, aspect="equal", title=title, xticks=[], yticks=[])
    figure.savefig(path, dpi=120)
