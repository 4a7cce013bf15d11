"""Which time of a population is predicted, by I-CFM and by OT-CFM: a table over seeds.

    FMJAX_DATA_DIR=... python -m experiments.benchmarks.single_cell --workdir runs/single_cell

Every time between others of every file is left out in turn (`experiments.single_cell`). The table
holds the 1-Wasserstein distance between predicted and true cells, mean and standard deviation over
seeds, and that of the cells of the time before, left where they are. Runs that are finished in the
folder are not trained again.

On two cores of a shared server that did other work: about half a minute a run.
"""

import collections
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from experiments import single_cell
from fmjax.harness import command, train
from fmjax.harness.records import environment, write_json

METHODS = {"independent": "I-CFM", "minibatch_ot": "OT-CFM"}
FILES = {"emt": (1, 2), "mouse_hematopoiesis": (1,), "simulation_gene_data": (1, 2, 3)}


@dataclasses.dataclass(frozen=True)
class Config:
    """The left-out times of the cell populations, by seeds."""

    workdir: pathlib.Path = pathlib.Path("runs/single_cell")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters and pairs."""
    num_steps: int = 3000
    """Training steps of each."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/single_cell.json."""


def run(config: Config, file: str, leave_out: int, coupling: Any, seed: int) -> dict[str, Any]:
    """The summary of one run."""
    folder = pathlib.Path(os.environ["FMJAX_DATA_DIR"], "singlecell_time")
    flags = single_cell.Config(
        data=folder / f"{file}.csv",
        leave_out=leave_out,
        coupling=coupling,
        seed=seed,
        num_steps=config.num_steps,
        checkpoint_every=config.num_steps,
        workdir=config.workdir / f"{file}-{leave_out}-{coupling}-{seed}",  # pyright: ignore
    )
    return train(flags, single_cell.make_task)


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = [f"| cells | left out | {' | '.join(METHODS.values())} | left where they were |"]
    lines.append("|---|---|---|---|---|")
    cells: dict[Any, dict[str, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for row in record["runs"]:
        found = cells[row["file"], row["leave_out"]]
        found[row["coupling"]].append(row["w1"])
        found["still"].append(row["w1_still"])
    for (file, leave_out), found in cells.items():
        means = [f"{np.mean(found[c]):.3f} ± {np.std(found[c], ddof=1):.3f}" for c in METHODS]
        row = [file, str(leave_out), *means, f"{found['still'][0]:.3f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main(config: Config) -> dict[str, Any]:
    if "FMJAX_DATA_DIR" not in os.environ:
        raise ValueError("FMJAX_DATA_DIR must name the folder with singlecell_time; it is not set.")
    record: dict[str, Any] = environment()
    record["config"] = {"seeds": list(config.seeds), "num_steps": config.num_steps}
    record["runs"] = []
    for file, times in FILES.items():
        for leave_out in times:
            for coupling in METHODS:
                for seed in config.seeds:
                    row = {"file": file, "leave_out": leave_out, "coupling": coupling, "seed": seed}
                    summary = run(config, file, leave_out, coupling, seed)
                    row |= {name: summary[name] for name in ("w1", "w1_still", "w1_method")}
                    record["runs"].append(row)
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.single_cell", doc=__doc__)
