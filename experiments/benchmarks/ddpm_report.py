"""What `experiments.benchmarks.ddpm` shows: both trainings, and every sampler on both networks."""

from typing import Any

import numpy as np

NAMES = ("flow matching", "DDPM")


def table(record: dict[str, Any]) -> str:
    """Both trainings as Markdown."""
    lines = [
        "| network | predicts | bits/dim | a training step | x1 near the noise |",
        "|---|---|---|---|---|",
    ]
    what = {"flow matching": "velocity, `cond_ot`", "DDPM": "noise, `vp`"}
    base = np.array(record["step_ms"]["flow matching"])
    for name, predicts in what.items():
        runs = [run for run in record["runs"] if run["network"] == name]
        bits = [run["bits_per_dim"] for run in runs]
        errors = [run["bits_per_dim_standard_error"] for run in runs]
        ms = np.array(record["step_ms"][name])
        speed = f"{np.median(ms):.0f} ms, {np.median(ms / base):.2f} times as long"
        early = f"{np.mean(record['early_error'][name]):.2f} off"
        lines.append(f"| {name} | {predicts} | {_spread(bits, errors, 3)} | {speed} | {early} |")
    return "\n".join(lines) + "\n"


def samples(record: dict[str, Any]) -> str:
    """Every sampler on both networks as Markdown."""
    head = [f"{name}: {figure}" for name in NAMES for figure in ("FD", "accuracy")]
    lines = [f"| sampler | evaluations | {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    rows = {(row["sampler"], row["network"]): row for row in record["samples"]}
    for way in dict.fromkeys(way for way, _ in rows):
        pair = [rows.get((way, name)) for name in NAMES]
        counts = dict.fromkeys(f"{np.mean(row['evaluations']):.0f}" for row in pair if row)
        cells = ["- | -" if row is None else _quality(row) for row in pair]
        lines.append(f"| {way} | {', '.join(counts)} | {' | '.join(cells)} |")
    lines.append(f"| real images | - | {_quality(record['real'])} | | |")
    return "\n".join(lines) + "\n"


def _quality(row: dict[str, Any]) -> str:
    spread = _spread(row["fd"], row["fd_standard_error"], 2)
    return f"{spread} | {np.mean(row['accuracy']):.3f}"


def _spread(values: list[float], errors: list[float], digits: int) -> str:
    """The mean with the standard deviation over seeds; of one seed with its standard error."""
    spread = np.std(values, ddof=1) if len(values) > 1 else errors[0]
    return f"{np.mean(values):.{digits}f} ± {spread:.{digits}f}"
