"""Snapshots of a population: cells measured at several times, and one time left out.

The K snapshots of a file are at t_k = k / (K - 1). Between neighbours that are trained on, cells
x_k and x_l of a batch are paired by a coupling, and at t = t_k + s (t_l - t_k)

    x_t = (1 - s) x_k + s x_l + sigma z,   u_t = (x_l - x_k) / (t_l - t_k),

s uniform, every interval as often as any other. With a time k left out the interval from k - 1 to
k + 1 is twice as long. What was left out is predicted from the true cells at k - 1: they are moved
to t_k by 100 Euler steps, and compared with all cells at t_k by the 1-Wasserstein distance.

Published figures whiten the coordinates by the mean and the deviation of all cells, those of the
left-out time included; `whiten` says which are used here, and so does the run's record.

Source: Tong et al. 2020, arXiv 2002.04461 (the protocol); Tong et al. 2023, arXiv 2302.00482.
"""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import fmjax as fm
from fmjax import metrics
from fmjax.harness.config import RunConfig
from fmjax.tasks.points import MLPConfig
from fmjax.training import digests

EULER_STEPS = 100


@dataclasses.dataclass(frozen=True)
class SnapshotConfig(RunConfig):
    """The flags of an experiment on snapshots."""

    data: pathlib.Path = tyro.MISSING
    """The cells: an .npz of `pcs` [num, D] and `sample_labels` [num], or a .csv whose column
    `samples` is the time and whose others are coordinates."""
    leave_out: int = 1
    """The time that is not trained on, from 1 to the number of times less 2."""
    num_dims: int | None = None
    """Coordinates to use, the first ones; all without it."""
    whiten: Literal["all", "train", "none"] = "all"
    """Whose mean and deviation the coordinates are divided by: all cells', as published, those of
    the times that are trained on, or nobody's."""
    sigma: float = 0.1
    """Noise on the path, in the unit of the whitened coordinates."""
    model: MLPConfig = MLPConfig(features=(64, 64, 64))
    """The network's size."""

    def data_name(self) -> str:
        return f"{self.data.stem}-without-{self.leave_out}"


class Snapshots(NamedTuple):
    """Cells by time.

    Attributes:
      cells: `[num_k, D]` of each time, float32, in order.
      ts: their times in [0, 1], `[K]`.
      left_out: the index of the time that is not trained on.
      facts: what a run folder keeps of them, as JSON can hold it.
    """

    cells: tuple[np.ndarray, ...]
    ts: np.ndarray
    left_out: int
    facts: dict[str, Any]

    @property
    def trained_on(self) -> list[int]:
        """The indices of the others."""
        return [k for k in range(len(self.cells)) if k != self.left_out]


def load(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The cells `[num, D]` and the time of each, `[num]`, in float64.

    Raises:
      ValueError: for another suffix, names that the file lacks, text, or cells that aren't finite.
      FileNotFoundError: if there is no such file.
    """
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            if missing := {"pcs", "sample_labels"} - set(file.files):
                raise ValueError(
                    f"{path} must hold pcs [num, D] and sample_labels [num]; it lacks "
                    f"{', '.join(sorted(missing))}."
                )
            cells, times = file["pcs"], file["sample_labels"]
    elif path.suffix == ".csv":
        with path.open() as file:
            names = [name.strip().strip('"') for name in file.readline().split(",")]
            if "samples" not in names:
                raise ValueError(f"{path} must have a column `samples`; got {', '.join(names)}.")
            rows = np.loadtxt(file, delimiter=",", ndmin=2)
        column = names.index("samples")
        cells, times = np.delete(rows, column, axis=1), rows[:, column]
    else:
        raise ValueError(f"--data must be an .npz or a .csv; got {path}.")
    if cells.ndim != 2 or times.shape != cells.shape[:1] or times.dtype.kind not in "iuf":
        raise ValueError(
            f"{path} must hold cells [num, D] and a time, a number, for each; got {cells.shape} "
            f"and {times.dtype} {times.shape}."
        )
    cells = np.asarray(cells, np.float64)
    if not (np.isfinite(cells).all() and np.isfinite(np.asarray(times, np.float64)).all()):
        raise ValueError(f"{path} must be finite; it holds a NaN or an infinity.")
    return cells, np.asarray(times, np.float64)


def open_snapshots(config: SnapshotConfig) -> Snapshots:
    """The snapshots that the flags name, whitened.

    Raises:
      ValueError: if there are fewer than three times, the one to leave out is the first, the last
        or none, a coordinate is constant, or `sigma` is negative; as `load` does.
    """
    cells, times = load(config.data)
    labels = np.unique(times)
    if len(labels) < 3:
        raise ValueError(
            f"{config.data} must have three times or more, for one between others to be left out; "
            f"got {len(labels)}."
        )
    if not 0 < config.leave_out < len(labels) - 1:
        raise ValueError(
            f"--leave-out must be from 1 to {len(labels) - 2}, a time between others; got "
            f"{config.leave_out}."
        )
    if not 0 <= config.sigma < np.inf:
        raise ValueError(f"--sigma must be zero or more; got {config.sigma}.")
    cells = cells[:, : config.num_dims]
    fitted = {"all": times >= labels[0], "train": times != labels[config.leave_out]}
    of = fitted.get(config.whiten)
    mean, std = (0.0, 1.0) if of is None else (cells[of].mean(0), cells[of].std(0))
    if not np.all(std > 0):
        raise ValueError(f"{config.data}: no coordinate may be constant. Leave it out of the file.")
    cells = ((cells - mean) / std).astype(np.float32)
    by_time = tuple(cells[times == label] for label in labels)
    facts = {
        "num_examples": max(map(len, by_time)),
        "event_shape": [cells.shape[1]],
        "num_cells": list(map(len, by_time)),
        "whitened by": {"all": "all cells", "train": "the cells trained on"}.get(
            config.whiten, "nothing"
        ),
        "sha256": digests.hash_json([digests.hash_array(part) for part in by_time]),
    }
    return Snapshots(by_time, np.linspace(0, 1, len(labels)), config.leave_out, facts)


def in_step(snapshots: Snapshots, seed: int) -> np.ndarray:
    """The cells to train on, `[num_examples, times, D]`: each time's repeated in a random order."""
    rng, num = np.random.default_rng((seed, 0)), snapshots.facts["num_examples"]
    columns = []
    for k in snapshots.trained_on:
        cells = snapshots.cells[k]
        turns = [rng.permutation(len(cells)) for _ in range(-(-num // len(cells)))]
        columns.append(cells[np.concatenate(turns)[:num]])
    return np.stack(columns, axis=1)


def sample_intervals(
    key: jax.Array, x: jax.Array, ts: jax.Array, coupling: fm.Coupling, sigma: float
) -> fm.PathSample:
    """Points on the paths between neighbouring snapshots, all intervals one after the other.

    Args:
      key: random key.
      x: a batch of each snapshot, `[batch, times, D]`.
      ts: their times, `[times]`, increasing.
      coupling: `(key, x0, x1) -> x0`, applied to each interval's shuffled batch.
      sigma: the noise on the path.

    Returns:
      A `PathSample` of `(times - 1) * batch` points.
    """
    samples = []
    for k, key_interval in enumerate(jax.random.split(key, x.shape[1] - 1)):
        key_order, key_pair, key_s, key_noise = jax.random.split(key_interval, 4)
        x0, x1 = jax.random.permutation(key_order, x[:, k]), x[:, k + 1]
        s, width = fm.uniform(key_s, x1.shape[:1]), ts[k + 1] - ts[k]
        on = fm.sample_path(fm.cond_ot(), coupling(key_pair, x0, x1), x1, s)
        noise = sigma * jax.random.normal(key_noise, x1.shape)
        samples.append(fm.PathSample(ts[k] + s * width, on.x_t + noise, on.u_t / width))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *samples)


def left_out_figures(snapshots: Snapshots, velocity: fm.Velocity) -> dict[str, Any]:
    """W_1 between the cells that the flow predicts at the left-out time and those that are there.

    Returns:
      "w1"; "w1_still", of the cells of the time before as they are, which a flow must beat; and
      the protocol in words.
    """
    k, ts = snapshots.left_out, snapshots.ts

    @jax.jit
    def move(x: jax.Array) -> jax.Array:
        t0, t1 = float(ts[k - 1]), float(ts[k])
        return fm.sample(velocity, x, t0=t0, t1=t1, solver=diffrax.Euler(), num_steps=EULER_STEPS)

    before, there = snapshots.cells[k - 1], snapshots.cells[k]
    return {
        "w1": metrics.wasserstein1(move(jnp.asarray(before)), there),
        "w1_still": metrics.wasserstein1(before, there),
        "w1_method": (
            f"time {k} left out; {len(before)} true cells of time {k - 1} moved by {EULER_STEPS} "
            f"Euler steps, exact transport to all {len(there)} cells of time {k}; whitened by "
            f"{snapshots.facts['whitened by']}"
        ),
    }
