"""What `experiments.few_steps` shows: a table, a picture, and a record that gains seeds."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fmjax import plotting
from fmjax.plotting.pictures import render


def line(row: dict[str, Any]) -> str:
    """One row of the figures."""
    quality = f"{_cell(row, 'fd')}, accuracy {_cell(row, 'accuracy')}"
    return f"{row['training']} | {row['way']} | {np.mean(row['evaluations']):.3g} | {quality}"


def table(record: dict[str, Any]) -> str:
    """FD, accuracy and what solvers miss, as Markdown."""
    return "\n".join(made(record) for made in (distances, accuracies, solvers))


def distances(record: dict[str, Any]) -> str:
    """FD of every training and solver by evaluations, as Markdown; "real" is of real images.

    With the standard deviation over seeds, or of one seed the standard error. A step's cost is
    against flow matching's.
    """
    return _by_evaluations(record, "FD", "fd")


def accuracies(record: dict[str, Any]) -> str:
    """Class accuracy, as `distances`."""
    return _by_evaluations(record, "accuracy", "accuracy")


def _by_evaluations(record: dict[str, Any], title: str, name: str) -> str:
    times = record["step_seconds"]
    rows = _rows((row["training"], row["way"], row) for row in record["samples"])
    lines = [f"| {title} | a step | {' | '.join(HEADS)} |", "|---" * (2 + len(HEADS)) + "|"]
    for (training, solver), cells in rows.items():
        found = [f"{training}, {solver}" if solver else training]
        found.append(f"{times[training] / times['flow']:.2f}")
        for column, usual in enumerate(HEADS):
            count, row = cells.get(column, (usual, None))
            if count == "adaptive":
                count = f"{np.mean(row['evaluations']):.3g}"
            before = "" if count == usual else f"{count}: "
            found.append("" if row is None else before + _cell(row, name))
        lines.append(f"| {' | '.join(found)} |")
    lines.append(f"| real | {' | ' * len(HEADS)}{_cell(record['real'], name)} |")
    return "\n".join(lines) + "\n"


def solvers(record: dict[str, Any]) -> str:
    """Root mean square distances to the exact ends of the flow, the mean over seeds, as Markdown.

    The factor is that of the best other solver at as many evaluations; beside it that of Tsit5,
    which takes more.
    """
    heads = ("evaluations", "learned", *SOLVERS, "factor", "Tsit5's", "fitting")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for n in dict.fromkeys(row["evaluations"] for row in record["learned"]):
        rows = [row for row in record["learned"] if row["evaluations"] == n]
        rms: dict[str, Any] = {k: np.mean([r["rms"][k] for r in rows]) for k in rows[0]["rms"]}
        learnt = rms.pop(f"learnt, {n}")
        cells = [f"{n}", f"{learnt:.4f}"]
        for solver in SOLVERS:
            way = next((way for way in rms if way.startswith(f"{solver},")), None)
            at = "" if way is None or way.endswith(f" {n}") else way.split(", ")[1] + ": "
            cells.append("" if way is None else f"{at}{rms[way]:.4f}")
        more = [rms.pop(way) for way in list(rms) if way.startswith("Tsit5")]
        cells += [f"{min(found) / learnt:.2f}" for found in (rms.values(), more)]
        cells.append(f"{np.mean([row['fit_seconds'] for row in rows]):.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(shown: list[tuple[str, str, np.ndarray]], num_levels: int) -> np.ndarray:
    """Images of every training and way, a row for each training and solver, more evaluations right.

    Args:
      shown: (training, way, pixel values `[num, height, width, channel]`), from the same noise.
      num_levels: pixel values.

    Returns:
      A picture, uint8 `[height, width, 3]`.
    """
    rows = _rows(shown)
    figure = Figure(figsize=(3 * len(HEADS), 0.72 * len(rows)), dpi=120, layout="constrained")
    for axes, ((training, solver), cells) in zip(
        figure.subplots(len(rows), len(HEADS), squeeze=False), rows.items(), strict=True
    ):
        for column, panel in enumerate(axes):
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            if column in cells:
                count, images = cells[column]
                strip = plotting.grid(images, columns=len(images), num_levels=num_levels)
                panel.imshow(strip, interpolation="nearest")
                panel.set_title(count, fontsize=7, pad=2)
        name = f"{training}\n{solver}" if solver else training
        axes[0].set_ylabel(name, fontsize=7, rotation=0, ha="right", va="center")
    return render(figure)


SOLVERS = ("Euler", "Midpoint", "Heun", "Tsit5")
COUNTS = (1, 2, 4, 8)  # evaluations of a draw
HEADS = (*map(str, COUNTS), "more")  # columns


def _rows(found: Iterable[tuple[str, str, Any]]) -> dict[tuple[str, str], dict[int, Any]]:
    """(training, solver) -> column -> (evaluations, what was found), of (training, way, ...)."""
    rows: dict[tuple[str, str], dict[int, Any]] = {}
    for training, way, value in found:
        solver, _, count = way.rpartition(", ")
        column = np.searchsorted(COUNTS, int(count) if count.isdigit() else np.inf)
        first = next((row for row in rows if row[0] == training), (training, solver))
        if not solver and column not in rows.get(first, {}):
            solver = first[1]  # the adaptive solve beside the counted ones
        rows.setdefault((training, solver), {})[int(column)] = count, value
    return rows


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
    both = [_joined(before.get(k), rows.get(k)) for k in before | rows]
    config = new["config"] | {
        name: sorted({*old["config"][name], *new["config"][name]})
        for name in ("seeds", "methods", "steps")
    }
    fits = {(f["seed"], f["evaluations"]): f for f in old["learned"] + new["learned"]}
    return new | {
        "config": config,
        "samples": both,
        "step_seconds": old["step_seconds"] | new["step_seconds"],
        "learned": list(fits.values()),
        "real": _joined(old["real"], new["real"]),
    }


def _joined(old: dict[str, Any] | None, new: dict[str, Any] | None) -> dict[str, Any]:
    """One row of both, by seed; the newer figures of a seed count."""
    if old is None or new is None:
        return old or new or {}
    kept = [i for i, seed in enumerate(old["seeds"]) if seed not in new["seeds"]]
    lists = {k: [old[k][i] for i in kept] + v for k, v in new.items() if isinstance(v, list)}
    return new | lists


def _cell(row: dict[str, Any], name: str) -> str:
    """The mean over seeds with its standard deviation, or of one seed with its standard error."""
    values = row[name]
    if len(values) > 1:
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    error = row.get(f"{name}_standard_error")
    return f"{values[0]:.3f}" + (f" ± {error[0]:.3f}" if error else "")
