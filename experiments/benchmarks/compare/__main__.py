"""fmjax and its peers side by side: times of the same work, and their ratios.

    python -m experiments.benchmarks.compare
    python -m experiments.benchmarks.compare --rows mlp_training sampling --repetitions 9

Every row runs in processes of its own, one with JAX and one with torch (`workers`), warm, on the
same number of cores. They are asked for one repetition in turn, A B A B ..., so that a machine that
grows slower in the meantime does so for both. With the seconds a_i and b_i per unit of work, the
ratio is the median of b_i / a_i, above 1 where fmjax is faster. Where a peer has several ways, the
one with the best median is compared with. What is not installed is said in its place.
"""

import dataclasses
import os
import pathlib
import tempfile
from typing import Any

from experiments.benchmarks.compare import report
from experiments.benchmarks.compare.rows import ROWS, Row
from experiments.benchmarks.compare.workers import Failed, Options, Side


@dataclasses.dataclass(frozen=True)
class Config:
    """fmjax and its peers side by side."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Which rows to run."""
    repetitions: int = 7
    """Timed repetitions of every case, after one that is not counted."""
    threads: int = 0
    """Cores that every process may use; 0 is all."""
    record: pathlib.Path | None = None
    """A JSON file for the figures; rows that it holds already and that are not run are kept."""


def main(config: Config) -> dict[str, Any]:
    unknown = sorted(set(config.rows) - set(ROWS))
    if unknown or config.repetitions < 1 or config.threads < 0:
        raise ValueError(
            f"--rows are among {', '.join(ROWS)}, --repetitions at least 1 and --threads at least "
            f"0; got {config.rows}, {config.repetitions} and {config.threads}."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.threads or cores or 1
    record = report.read(config.record)
    for name in config.rows:
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            options = Options(threads, pathlib.Path(folder))
            record["rows"][name] = run_row(ROWS[name], options, config.repetitions)
        record["rows"][name] |= report.conditions(threads)
        record["rows"] = {name: record["rows"][name] for name in ROWS if name in record["rows"]}
        report.write(config.record, record)
    print(report.table(record))
    return record


def run_row(row: Row, options: Options, repetitions: int) -> dict[str, Any]:
    """Seconds per unit of work of every case, `{"side/case": [...]}`, facts and what failed."""
    sides, errors = {}, {}
    try:
        for name, target in row.sides.items():
            try:
                told = options._replace(threads=_threads(name, options), side=name)
                sides[name] = Side(target, told)
            except Failed as error:
                errors[name] = str(error)
        seconds = _interleave(row, sides, errors, repetitions)
        facts = _facts(row, sides, errors)
    finally:
        for side in sides.values():
            side.close()
    return {"seconds": seconds, "errors": errors, "facts": facts | report.accuracy(options.folder)}


def _threads(name: str, options: Options) -> int:
    return 1 if name.endswith(" 1") else options.threads


def _cases(row: Row) -> list[tuple[str, str]]:
    """The (side, case) pairs of a row's lines, each once, in the lines' order."""
    named = [name for line in row.lines for name in (line.ours, *line.peers)]
    return [tuple(name.split("/")) for name in dict.fromkeys(named)]  # pyright: ignore


def _interleave(
    row: Row, sides: dict[str, Side], errors: dict[str, str], repetitions: int
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for side, case in _cases(row):
            if side not in sides or side in errors:
                continue
            try:
                taken = sides[side].repeat(case) / sides[side].work[case]
            except Failed as error:
                errors[side] = str(error)
                continue
            seconds.setdefault(f"{side}/{case}", []).append(taken)
    return {name: values for name, values in seconds.items() if name.split("/")[0] not in errors}


def _facts(row: Row, sides: dict[str, Side], errors: dict[str, str]) -> dict[str, Any]:
    found = {}
    for side, case in _cases(row):
        if side not in sides or side in errors:
            continue
        try:
            if facts := sides[side].facts(case):
                found[f"{side}/{case}"] = facts
        except Failed as error:
            errors[side] = str(error)
    return found


if __name__ == "__main__":
    from fmjax.harness import command  # not at the top: workers import this file, and JAX later

    command.run(main, Config, name="experiments.benchmarks.compare", doc=__doc__)
