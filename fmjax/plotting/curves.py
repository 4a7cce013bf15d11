"""Curves of a run: its losses against the step, and quality against the cost of a solve."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from .pictures import BLUE, DARK, GREEN, GREY, ORANGE, VIOLET, render

SOLVER_COLOURS = {
    "Euler": GREY,
    "Heun": ORANGE,
    "Midpoint": GREEN,
    "Tsit5": BLUE,
    "Dopri5": VIOLET,
}


def loss_curve(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The training loss against the step, with its running mean over ten rows, and held-out losses.

    The axis ends a little above the 98th percentile of the training losses, or above the largest
    held-out loss if that is higher: the first steps would flatten all others.

    Args:
      rows: those of metrics.jsonl. Each has a "step", and a "loss", a "held_out_loss" or both; a
        loss that is None, not finite or not there is left out.

    Returns:
      A picture, uint8 `[432, 768, 3]`; empty axes if no loss is finite.

    Raises:
      ValueError: if a row has no step.

    Example:
      >>> rows = [{"step": n, "loss": 1 / n} for n in range(1, 50)] + [{"step": 49, "loss": None}]
      >>> loss_curve([*rows, {"step": 50, "held_out_loss": 0.1}]).shape
      (432, 768, 3)
    """
    if any("step" not in row for row in rows):
        raise ValueError(
            "Every row must have a step; got one without. They are the lines of metrics.jsonl, "
            "read by json.loads."
        )
    (steps, losses), held_out = (_finite(rows, name) for name in ("loss", "held_out_loss"))
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    if len(losses):
        axes.plot(steps, losses, color=GREY, linewidth=0.8, label="training")
    if len(losses) >= 20:
        mean = np.convolve(losses, np.ones(10) / 10, mode="valid")
        axes.plot(steps[9:], mean, color=BLUE, linewidth=1.6, label="training, mean of 10 rows")
    if len(held_out[0]):
        look: dict[str, Any] = {"color": ORANGE, "linewidth": 1.6, "marker": "o", "markersize": 4}
        axes.plot(*held_out, label="held out", **look)
    if len(axes.lines):
        axes.set_ylim(*_range(losses, held_out[1]))
        axes.legend(frameon=False)
    axes.set(xlabel="step", ylabel="flow-matching loss")
    axes.spines[["top", "right"]].set_visible(False)
    return render(figure)


def cost_curve(rows: Sequence[Mapping[str, Any]], *, label: str) -> np.ndarray:
    """Quality, and distance from the exact flow, against evaluations; a line per solver.

    Args:
      rows: one for each way to solve, and a last one for the exact flow. Each has "solver",
        "num_steps" (None if adaptive), "num_evaluations", "quality" (the lower the better),
        "standard_error" and "error_rms".
      label: what the quality is.

    Returns:
      A picture, uint8 `[540, 1440, 3]`.

    Raises:
      ValueError: without two rows, or if one lacks a column.

    Example:
      >>> euler = {"solver": "Euler", "num_steps": 10, "num_evaluations": 10, "quality": 0.3}
      >>> euler |= {"standard_error": 0.1, "error_rms": 0.2}
      >>> exact = euler | {"solver": "Tsit5", "num_steps": None, "num_evaluations": 90}
      >>> cost_curve([euler, exact], label="2-Wasserstein distance").shape
      (540, 1440, 3)
    """
    _check_ways(rows)
    figure = Figure(figsize=(9.6, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    *points, exact = rows
    _draw_solvers(left, right, points)
    low, high = (exact["quality"] + sign * exact["standard_error"] for sign in (-1, 1))
    left.axhspan(low, high, color=GREY, alpha=0.2, linewidth=0)
    left.axhline(exact["quality"], color=GREY, linewidth=0.8)
    left.set_ylabel(textwrap.fill(label, 36))
    left.set_title("exact flow: line, with its standard error", fontsize=9, color="#666666")
    right.set_ylabel("distance from the exact flow (rms)")
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="evaluations of the network")
        axes.xaxis.set_major_locator(FixedLocator([1, 2, 4, 8, 16, 32, 64, 128, 256]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.6)
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    return render(figure)


def _finite(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows in which `name` is a finite number."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    return np.array([step for step, _ in found]), np.array([value for _, value in found])


def _range(losses: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """From below every loss to above 98 in 100 training losses and every held-out one."""
    tops = [float(np.quantile(losses, 0.98))] if len(losses) else []
    high = max([*tops, *held_out.tolist()])
    low = float(np.min(np.concatenate([losses, held_out])))
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _check_ways(rows: Sequence[Mapping[str, Any]]) -> None:
    if len(rows) < 2:
        raise ValueError(
            f"rows must hold one or more ways to solve and, last, the exact flow; got {len(rows)}."
        )
    wanted = {"solver", "num_steps", "num_evaluations", "quality", "standard_error", "error_rms"}
    if missing := wanted - set.intersection(*({*row} for row in rows)):
        raise ValueError(f"Every row must have {sorted(wanted)}; some lack {sorted(missing)}.")


def _draw_solvers(left: Axes, right: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """A line for each solver and kind of steps; a solver without a colour of its own is dark."""
    for solver in dict.fromkeys([*SOLVER_COLOURS, *(row["solver"] for row in points)]):
        colour = SOLVER_COLOURS.get(solver, DARK)
        for adaptive in (False, True):
            found = [r for r in points if r["solver"] == solver]
            found = [r for r in found if (r["num_steps"] is None) == adaptive]
            if not found:
                continue
            found.sort(key=lambda row: row["num_evaluations"])
            cost = [row["num_evaluations"] for row in found]
            look: dict[str, Any] = {"color": colour, "markersize": 4, "linewidth": 1.2}
            look |= {"marker": "o", "linestyle": "--" if adaptive else "-"}
            look |= {"markerfacecolor": "white" if adaptive else colour}
            label = f"{solver}, {'adaptive' if adaptive else 'equal steps'}"
            label = solver if solver == "jumps" else label
            left.plot(cost, [row["quality"] for row in found], **look)
            right.plot(cost, [row["error_rms"] for row in found], label=label, **look)
