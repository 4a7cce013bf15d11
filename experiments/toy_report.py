"""What `experiments.toy_table` shows: the Markdown table, what differs, a picture per cell."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fmjax.plotting.pictures import BLUE, GREY, ORANGE

COLUMNS = (
    "pair",
    "method",
    "W2 fmjax",
    "W2 torchcfm (recorded)",
    "NPE fmjax",
    "NPE torchcfm (recorded)",
)


def path_energy_excess(path_energy: Sequence[float], squared_distance: float) -> np.ndarray:
    """NPE = |E int |v|^2 dt - W2^2| / W2^2 of every seed, `[seeds]`."""
    return np.abs(np.asarray(path_energy) / squared_distance - 1.0)


def mean_and_deviation(values: Sequence[float] | np.ndarray) -> str:
    """The mean ± the deviation of single seeds; a dash where there is nothing."""
    if len(values) == 0:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def standard_errors_apart(a: Sequence[float], b: Sequence[float]) -> float:
    """The difference of two means over its standard error, sqrt(s_a^2 / n_a + s_b^2 / n_b)."""
    error = math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return float((np.mean(a) - np.mean(b)) / error)


def markdown(
    pairs: list[dict[str, Any]], cells: list[dict[str, Any]], recorded: list[dict[str, Any]]
) -> str:
    """The table of fmjax's cells beside torchcfm's recorded runs, and the cells that differ."""
    cells, recorded = _by_sampler(cells), _by_sampler(recorded)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    differing = []
    for pair in pairs:
        for cell in (cell for cell in cells if cell["pair"] == pair["pair"]):
            key = (cell["pair"], cell["method"])
            runs = [run for run in recorded if (run["pair"], run["method"]) == key]
            lines.append(_row(cell, runs, pair["squared_distance"]))
            differing += _differences(cell, runs, pair["squared_distance"])
        floor = mean_and_deviation(pair["data_to_data_wasserstein2"])
        lines.append(f"| {pair['pair']} | data to data | {floor} | - | - | - |")
    lines += ["", "W2^2(q0, q1): " + ", ".join(_distance(pair) for pair in pairs) + "."]
    if recorded:
        lines += [
            "",
            "More than two standard errors of the difference apart, fmjax against torchcfm:",
        ]
        lines += [""]
        lines += differing or ["None."]
    return "\n".join(lines) + "\n"


def _by_sampler(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SF2M's as two: of its flow, and of its equation, which has no path energy."""
    rows = []
    for result in results:
        if "sde_wasserstein2" in result:
            name, sde = result["method"], result["sde_wasserstein2"]
            rows.append(result | {"method": f"{name}, flow"})
            rows.append(
                result | {"method": f"{name}, SDE", "wasserstein2": sde, "path_energy": None}
            )
        else:
            rows.append(result)
    return rows


def _excess(results: list[dict[str, Any]], squared_distance: float) -> np.ndarray:
    """NPE of every seed; empty where there is no path energy."""
    energies = [result["path_energy"] for result in results if result["path_energy"] is not None]
    return path_energy_excess(np.ravel(energies).tolist(), squared_distance)


def _row(cell: dict[str, Any], runs: list[dict[str, Any]], squared_distance: float) -> str:
    columns = [cell["pair"], cell["method"]]
    for values in (cell["wasserstein2"], [run["wasserstein2"] for run in runs]):
        columns.append(mean_and_deviation(values))
    for results in ([cell], runs):
        columns.append(mean_and_deviation(_excess(results, squared_distance)))
    return "| " + " | ".join(columns) + " |"


def _distance(pair: dict[str, Any]) -> str:
    value, error = pair["squared_distance"], pair["squared_distance_standard_error"]
    return f"{pair['pair']} {value:.3f} (standard error {error:.3f})"


def _differences(
    cell: dict[str, Any], runs: list[dict[str, Any]], squared_distance: float
) -> list[str]:
    """A line for each quantity that is more than two standard errors apart."""
    if len(runs) < 2:
        return []
    excess = [_excess(results, squared_distance) for results in ([cell], runs)]
    theirs = [run["wasserstein2"] for run in runs]
    both_of = {"W2": (cell["wasserstein2"], theirs), "NPE": (excess[0], excess[1])}
    lines = []
    for name, (ours, others) in both_of.items():
        if not len(ours):
            continue
        apart = standard_errors_apart(ours, others)
        if abs(apart) > 2.0:
            both = " against ".join(mean_and_deviation(values) for values in (ours, others))
            lines.append(
                f"- {cell['pair']}, {cell['method']}, {name}: {both}, {apart:+.1f} standard errors."
            )
    return lines


def save_flow(path: pathlib.Path, target: np.ndarray, trajectories: np.ndarray) -> None:
    """Test points beside 400 trajectories `[num_times, batch, 2]`."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.scatter(*target.T, s=3, color=GREY, linewidths=0)
    x = trajectories[:, :400]
    right.plot(x[..., 0], x[..., 1], color=GREY, lw=0.3, alpha=0.6)
    right.scatter(*x[0].T, s=3, color=ORANGE, linewidths=0, label="source, t = 0")
    right.scatter(*x[-1].T, s=3, color=BLUE, linewidths=0, label="samples, t = 1")
    right.legend(loc="upper right", frameon=False, markerscale=3)
    for axes, title in ((left, "test points"), (right, path.stem)):
        axes.set(aspect="equal", xticks=[], yticks=[], title=title)
    figure.savefig(path, dpi=110)
