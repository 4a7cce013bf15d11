"""Snapshots of a population: cells measured at several times, of which one is left out.

The K snapshots of a file are at t_k = k / (K - 1). A file is anybody's .npz or .csv; coordinates
are whitened, and what whitened them is a fact of the run's record. Published figures whiten by the
mean and the deviation of all cells, those of the left-out time included.

Source: Tong et al. 2020, arXiv 2002.04461 (the protocol).
"""

import dataclasses
import pathlib
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro

from fmjax.harness.config import RunConfig
from fmjax.tasks.points import MLPConfig
from fmjax.training import digests


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
        or none, or a coordinate is constant; as `load` does.
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
    """Pairs to train on, `[num_examples, intervals, 2, D]`: an interval's start and its stop.

    Each time's cells are repeated in a random order, all of them about as often.
    """
    rng, num = np.random.default_rng((seed, 0)), snapshots.facts["num_examples"]
    columns = []
    for k in snapshots.trained_on:
        cells = snapshots.cells[k]
        turns = [rng.permutation(len(cells)) for _ in range(-(-num // len(cells)))]
        columns.append(cells[np.concatenate(turns)[:num]])
    x = np.stack(columns, axis=1)
    return np.stack([x[:, :-1], x[:, 1:]], axis=2)
