"""What `experiments.few_steps` shows."""

from typing import Any

import numpy as np


def line(row: dict[str, Any]) -> str:
    """One row of the figures."""
    count = np.mean(row["evaluations"])
    return f"{row['training']} | {row['way']} | {count:.3g} | {_quality(row)}"


def table(record: dict[str, Any]) -> str:
    """Every training and way as Markdown; a step's cost is against flow matching's."""
    base = record["step_seconds"]["flow"]
    lines = [
        "| training | a step | way | evaluations | FD | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["samples"]:
        cost = f"{record['step_seconds'][row['training']] / base:.2f}"
        fd, accuracy = _quality(row).split(", accuracy ")
        lines.append(
            f"| {row['training']} | {cost} | {row['way']} | {np.mean(row['evaluations']):.3g} "
            f"| {fd} | {accuracy} |"
        )
    fd, accuracy = _quality(record["real"]).split(", accuracy ")
    lines.append(f"| real images | | | | {fd} | {accuracy} |")
    return "\n".join(lines) + "\n"


ASKED = ("dataset", "minutes", "num_samples", "num_pairs")  # what makes a record of one kind


def check_kind(record: dict[str, Any], config: Any) -> None:
    """Refuses flags whose figures a record can't take.

    Raises:
      ValueError: naming what the record is of, and the flags.
    """
    known = {name: record["config"][name] for name in ASKED}
    got = {name: getattr(config, name) for name in ASKED}
    if known != got:
        raise ValueError(
            f"A record takes more seeds of its own kind, {known}; got {got}. Name another file by "
            "--record."
        )


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A record with the seeds of an older one of its kind that it has not.

    Raises:
      ValueError: for figures under another encoder.
    """
    encoders = old["judge"]["encoder"], new["judge"]["encoder"]
    if encoders[0] != encoders[1]:
        raise ValueError(
            f"A record is under one encoder, {encoders[0]}; got {encoders[1]}. Name another file "
            "by --record."
        )
    rows = {(row["training"], row["way"]): row for row in new["samples"]}
    before = {(row["training"], row["way"]): row for row in old["samples"]}
    both = [_joined(before.get(k), rows.get(k)) for k in dict.fromkeys([*rows, *before])]
    times = old["step_seconds"] | new["step_seconds"]
    return new | {"samples": both, "step_seconds": times, "real": _joined(old["real"], new["real"])}


def _joined(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any]:
    """One row of both, by seed; the newer figures of a seed count."""
    if old is None or new is None:
        return old or new or {}
    kept = [i for i, seed in enumerate(old["seeds"]) if seed not in new["seeds"]]
    lists = {k: [old[k][i] for i in kept] + v for k, v in new.items() if isinstance(v, list)}
    return new | lists


def _quality(row: dict[str, Any]) -> str:
    """FD with the standard deviation over seeds, or of one seed with its standard error."""
    spread = np.std(row["fd"], ddof=1) if len(row["fd"]) > 1 else row["fd_standard_error"][0]
    return f"{np.mean(row['fd']):.3f} ± {spread:.3f}, accuracy {np.mean(row['accuracy']):.3f}"
