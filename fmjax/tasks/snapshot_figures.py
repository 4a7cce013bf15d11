"""A picture of cells in the plane: the snapshots, and the ways that a flow takes between them."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

import fmjax as fm
from fmjax.plotting.pictures import GREY, render
from fmjax.tasks.snapshots import Snapshots

NUM_TIMES = 101
NUM_WAYS = 150
COLOURS = "viridis"


def draw_ways(snapshots: Snapshots, velocity: fm.Velocity) -> np.ndarray:
    """Every snapshot in a colour of its own beside cells of the first one, moved to the last time.

    Args:
      snapshots: of cells in two dimensions.
      velocity: the flow, at all times.

    Returns:
      A picture, uint8 `[370, 850, 3]`.
    """
    x0, ts = snapshots.cells[0], jnp.linspace(0.0, 1.0, NUM_TIMES)
    some = x0[np.random.default_rng(0).permutation(len(x0))]
    x = np.asarray(jax.jit(lambda x: fm.integrate(velocity, x, ts=ts).x)(jnp.asarray(some)))
    figure = Figure(figsize=(8.5, 3.7), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    colours = matplotlib.colormaps[COLOURS]
    for k, (cells, t) in enumerate(zip(snapshots.cells, snapshots.ts, strict=True)):
        name = f"time {k}, left out" if k == snapshots.left_out else f"time {k}"
        left.scatter(*cells.T, s=1.5, color=colours(0.9 * t), linewidths=0, label=name, alpha=0.6)
        moved = x[round(float(t) * (NUM_TIMES - 1))]
        right.scatter(*moved.T, s=1.5, color=colours(0.9 * t), linewidths=0, alpha=0.6)
    right.plot(x[:, :NUM_WAYS, 0], x[:, :NUM_WAYS, 1], color=GREY, lw=0.4, alpha=0.7, zorder=0)
    left.legend(loc="best", frameon=False, markerscale=4)
    left.set_title("cells as measured")
    right.set_title("cells of time 0, moved")
    for axes in (left, right):
        axes.set(aspect="equal", xticks=[], yticks=[])
    return render(figure)
