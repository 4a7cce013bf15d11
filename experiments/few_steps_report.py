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


def _quality(row: dict[str, Any]) -> str:
    """FD with the standard deviation over seeds, or of one seed with its standard error."""
    spread = np.std(row["fd"], ddof=1) if len(row["fd"]) > 1 else row["fd_standard_error"][0]
    return f"{np.mean(row['fd']):.3f} ± {spread:.3f}, accuracy {np.mean(row['accuracy']):.3f}"
