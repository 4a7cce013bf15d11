"""The Gaussian benchmark of iterated bridges over seeds: the covariance that must be 0.618034.

    python -m experiments.benchmarks.bridges_table

Trains `experiments.bridges` in 5 and 20 dimensions for every seed, a run folder each; those that
are finished stay as they are. Of each direction it prints the mean and standard deviation over the
seeds of Cov(x0_i, x1_i), averaged over the coordinates, the seed that is furthest off, and the mean
over 21 times of KL(N(sample mean, covariance) || exact), beside its floor d (d + 3) / (4 n).

On two cores of a shared server: about two minutes for each of the ten runs.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from etils import epath

from experiments import bridges
from fmjax.harness import command, train
from fmjax.harness.records import environment, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """Iterated bridges between normal distributions, over seeds."""

    workdir: pathlib.Path = pathlib.Path("runs/bridges_table")
    """A folder of run folders."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training each; at least two."""
    dims: tuple[int, ...] = (5, 20)
    """Dimensions."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/bridges.json."""


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each dimension and direction."""
    lines = [
        "| d | direction | covariance | exact | furthest seed | KL | floor | minutes a run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for dim in dict.fromkeys(run["dim"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["dim"] == dim]
        minutes = np.mean([run["wall_seconds"] for run in runs]) / 60
        for direction in ("forwards", "backwards"):
            of = [run[direction] for run in runs]
            found, exact = np.array([f["covariance"] for f in of]), of[0]["covariance_exact"]
            kl, floor = np.mean([f["kl"] for f in of]), of[0]["kl_floor"]
            lines.append(
                f"| {dim} | {direction} | {found.mean():.4f} ± {found.std(ddof=1):.4f} | "
                f"{exact:.4f} | {abs(found - exact).max():.4f} off | {kl:.5f} | {floor:.5f} | "
                f"{minutes:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    if len(set(config.seeds)) < 2:
        raise ValueError(f"--seeds must be two or more, for a spread; got {config.seeds}.")
    runs = []
    for dim in config.dims:
        for seed in config.seeds:
            folder = config.workdir / f"d{dim}_s{seed}"
            if not (folder / "summary.json").exists():
                train(
                    bridges.Config(workdir=epath.Path(folder), dim=dim, seed=seed),
                    bridges.make_task,
                )
            summary = json.loads((folder / "summary.json").read_text())
            kept = ("forwards", "backwards", "sampler", "wall_seconds")
            runs.append({"dim": dim, "seed": seed} | {name: summary[name] for name in kept})
    record = {"runs": runs, "versions": environment()["versions"]}
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.bridges_table", doc=__doc__)
