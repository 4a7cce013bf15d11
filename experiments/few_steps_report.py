"""What `experiments.few_steps` shows."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fmjax import plotting
from fmjax.plotting.pictures import render

COLUMNS = 5  # of the picture: about 1, 2, 4 and 8 evaluations, and more


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


def picture(shown: list[tuple[str, str, np.ndarray]], num_levels: int) -> np.ndarray:
    """Images of every training and way, a row for each training and solver, more evaluations right.

    Args:
      shown: (training, way, pixel values `[num, height, width, channel]`), from the same noise.
      num_levels: pixel values.

    Returns:
      A picture, uint8 `[height, width, 3]`.
    """
    rows: dict[tuple[str, str], dict[int, tuple[str, np.ndarray]]] = {}
    for training, way, images in shown:
        solver, _, count = way.rpartition(", ")
        column = _column(count)
        first = next((row for row in rows if row[0] == training), (training, solver))
        if not solver and column not in rows.get(first, {}):
            solver = first[1]  # the adaptive solve beside the counted ones
        strip = plotting.grid(images, columns=len(images), num_levels=num_levels)
        rows.setdefault((training, solver), {})[column] = count, strip
    figure = Figure(figsize=(3 * COLUMNS, 0.72 * len(rows)), dpi=120, layout="constrained")
    for axes, ((training, solver), cells) in zip(
        figure.subplots(len(rows), COLUMNS, squeeze=False), rows.items(), strict=True
    ):
        for column, panel in enumerate(axes):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if column in cells:
                count, strip = cells[column]
                panel.imshow(strip, interpolation="nearest")
                panel.set_title(count, fontsize=7, pad=2)
        name = f"{training}\n{solver}" if solver else training
        axes[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return render(figure)


def _column(count: str) -> int:
    """0 to 3 for the numbers up to 1, 2, 4 and 8; 4 for more of them, and for "adaptive"."""
    if not count.isdigit():
        return COLUMNS - 1
    return int(np.searchsorted((1, 2, 4, 8), int(count)))


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
