"""Learned solvers beside the usual ones on finished runs: what `experiments.learned_solver` found.

    python -m experiments.learned_solver runs/digits --evaluations 8
    python -m experiments.benchmarks.learned_solvers runs/digits

Root mean square distances per coordinate to the exact end points on noise that no fit has seen. The
factor is that of the best usual solver at as many evaluations; beside it that of Tsit5, which takes
more.
"""

import dataclasses
import json
import pathlib
from typing import Annotated, Any

import tyro

from fmjax.harness import command
from fmjax.harness.records import write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """Reads the solvers that were fitted to runs."""

    runs: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional]
    """Run folders."""
    evaluations: int = 8
    """Of the solvers."""
    record: pathlib.Path | None = None
    """A JSON file for the figures."""


def main(config: Config) -> dict[str, Any]:
    if not config.runs:
        raise ValueError("Give one run folder or more; got none.")
    rows = []
    for run in config.runs:
        path = run / f"learned_solver_{config.evaluations}.json"
        if not path.is_file():
            raise ValueError(
                f"A run must have a solver; got no {path}. Fit it: python -m "
                f"experiments.learned_solver {run} --evaluations {config.evaluations}"
            )
        found = json.loads(path.read_text())
        names = ("unseen_rms", "fit_seconds", "flags", "environment")
        rows.append({"run": run.name} | {name: found[name] for name in names})
    record = {"evaluations": config.evaluations, "rows": rows}
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown."""
    heads = ["run", *record["rows"][0]["unseen_rms"], "factor", "Tsit5's", "pairs fitted"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in record["rows"]:
        learnt, *usual, tsit5 = row["unseen_rms"].values()
        cells = [row["run"], *(f"{rms:.4f}" for rms in (learnt, *usual, tsit5))]
        cells += [f"{min(usual) / learnt:.2f}", f"{tsit5 / learnt:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['flags']['num_pairs']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.learned_solvers", doc=__doc__)
