"""The record of a comparison, and the Markdown table made from it alone."""

import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
from typing import Any

import numpy as np

from experiments.benchmarks.compare import points, reference
from experiments.benchmarks.compare.rows import ROWS, Line

PACKAGES = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "numpy", "scipy")
PACKAGES += ("torch", "torchcfm", "torchdiffeq", "flow_matching", "POT")


def read(path: pathlib.Path | None) -> dict[str, Any]:
    """The record at `path`, or an empty one."""
    if path is not None and path.exists():
        return json.loads(path.read_text())
    return {"command": "python -m experiments.benchmarks.compare", "rows": {}}


def write(path: pathlib.Path | None, record: dict[str, Any]) -> None:
    """The record as JSON, and its table beside it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    path.with_suffix(".md").write_text(table(record))


def conditions(threads: int) -> dict[str, Any]:
    """When and on what a row was run."""
    installed = {d.name.lower().replace("-", "_") for d in importlib.metadata.distributions()}
    versions = {p: importlib.metadata.version(p) for p in PACKAGES if p.lower() in installed}
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{_processor()}, {threads} of {os.cpu_count()} cores, no GPU",
        "versions": {"python": platform.python_version()} | versions,
    }


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def accuracy(folder: pathlib.Path) -> dict[str, Any]:
    """Errors of the results that the sides have left, against a tight solve in float64."""

    @functools.cache
    def exact(kind: str, num: int) -> np.ndarray:
        layers = points.read_weights(folder)
        if kind == "sampling":
            return reference.sample(layers, points.normal(num))
        return reference.log_prob(layers, points.moons(num))

    found = {}
    for path in sorted(folder.glob("*_*.npy")):
        kind, num, side = path.stem.rsplit("_", 2)
        got = np.load(path, allow_pickle=False)
        found[f"{side}/{num} error"] = reference.errors(got, exact(kind, int(num)))
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: a line per comparison, then facts, hardware and versions.

    Args:
      record: as `write` writes it.

    Returns:
      Text that ends in a newline.
    """
    head = ["row", "fmjax", "peer", "against", "ratio", "min .. max", "reach"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in record["rows"].items():
        lines += [_line(line, row, ROWS[name].peer) for line in ROWS[name].lines]
    notes = [note for name, row in record["rows"].items() for note in _notes(name, row)]
    notes += _host_share(record["rows"])
    return "\n".join([*lines, "", *notes, "", *_conditions(record)]) + "\n"


def ratios(ours: list[float], peer: list[float]) -> list[float]:
    """How many times as fast ours is, repetition by repetition."""
    return [b / a for a, b in zip(ours, peer, strict=True)]


def best_peer(line: Line, seconds: dict[str, list[float]]) -> str | None:
    measured = [name for name in line.peers if name in seconds]
    return min(measured, key=lambda name: statistics.median(seconds[name]), default=None)


def _line(line: Line, row: dict[str, Any], peer: str) -> str:
    seconds, errors = row["seconds"], row["errors"]
    name = best_peer(line, seconds)
    ours = (
        _figure(seconds[line.ours], line.unit) if line.ours in seconds else _why(line.ours, errors)
    )
    theirs, ratio, spread = "", "", ""
    if name is not None:
        theirs = _figure(seconds[name], line.unit)
        peer = f"{peer} ({', '.join(_words(name))})" if len(line.peers) > 1 else peer
    elif line.peers:
        theirs = _why(line.peers[0], errors)
    if name is not None and line.ours in seconds:
        values = ratios(seconds[line.ours], seconds[name])
        ratio = f"{statistics.median(values):.2f}x"
        spread = f"{min(values):.2f} .. {max(values):.2f}"
    reach = "" if line.reach is None else f">= {line.reach:g}x"
    return "| " + " | ".join([line.label, ours, theirs, peer, ratio, spread, reach]) + " |"


def _words(name: str) -> list[str]:
    side, case = name.split("/")
    words = [] if case.isdigit() or case == "loop" else [case]
    return words + (["one core"] if side.endswith(" 1") else ["all cores"] if not words else [])


def _why(name: str, errors: dict[str, str]) -> str:
    return errors.get(name.split("/")[0], "not run").replace("|", "/").replace("\n", " ")


def _figure(seconds: list[float], unit: str) -> str:
    median = statistics.median(seconds)
    value = {"s": median, "ms": 1e3 * median}.get(unit, 1 / median)
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f} {unit}"


def _notes(name: str, row: dict[str, Any]) -> list[str]:
    return [f"- {name}, {case}: {_fact(facts)}" for case, facts in row["facts"].items()]


def _fact(facts: dict[str, Any]) -> str:
    def word(value: Any) -> str:
        return f"{value:.5g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {word(value)}" for key, value in facts.items())


def _host_share(rows: dict[str, Any]) -> list[str]:
    """The loop's own work for an image, over the U-Net's step for it: both rows' medians."""
    seconds = (
        rows.get("unet_training", {}).get("seconds", {}),
        rows.get("input", {}).get("seconds", {}),
    )
    if "fmjax/jit" not in seconds[0] or "fmjax/batch" not in seconds[1]:
        return []
    step, host = (
        statistics.median(s[n]) for s, n in zip(seconds, ("fmjax/jit", "fmjax/batch"), strict=True)
    )
    return [f"- input: the batches of the training loop take {host / step:.2g} of the U-Net's step"]


def _conditions(record: dict[str, Any]) -> list[str]:
    """One line for each set of conditions, with the rows that it holds for."""
    found: dict[str, list[str]] = {}
    for name, row in record["rows"].items():
        versions = ", ".join(f"{p} {v}" for p, v in row["versions"].items())
        count = len(next(iter(row["seconds"].values()), []))
        text = f"{row['date']}, {row['hardware']}, {count} repetitions. {versions}."
        found.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]
