"""Quality against cost: the same noise sent through several solvers, 4 to 200 evaluations.

Each point is one way to solve: a solver with so many equal steps, or an adaptive one at a
tolerance. Its cost is the true number of evaluations of the network; its quality is measured on the
samples, and so is their distance from the exact flow, the root mean square over all coordinates,
which is the solver's own error. What counts as exact is Tsit5 at a tenth of the smallest tolerance
asked for (1e-6 in the plane): distances that have become level with its own error fall no further.

A flow map also draws by its own jumps, from one evaluation on, whose distance is from the flow of
its velocity. Of the consistency method, whose network is no velocity and whose jumps take fresh
noise on the way, it says nothing.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fmjax import plotting
from fmjax.evaluation import drawing
from fmjax.evaluation.protocol import Config
from fmjax.harness import keys, share
from fmjax.harness.pods import cluster
from fmjax.harness.store import Store
from fmjax.harness.task import Trained
from fmjax.metrics import Estimate


def measure(
    trained: Trained,
    store: Store,
    batch_size: int,
    num: int,
    points: Sequence[drawing.Way],
    quality: Callable[[np.ndarray], Estimate],
    *,
    seed: int,
    tight: float,
) -> list[dict[str, Any]]:
    """The curve's points, solved by all processes of a pod and measured by process 0.

    Args:
      trained: the model.
      store: where the samples of each point are kept.
      batch_size: samples per solve.
      num: samples per point.
      points: the ways to solve.
      quality: samples `[num, *event]` -> figure with its error, the lower the better.
      seed: of the noise, the same for all points.
      tight: tolerance of the solve that counts as exact.

    Returns:
      One row per point and a last one for the exact flow, what stands in evaluation.json under
      "curve". All points share their noise: their differences are far better known than the
      standard errors say, which are those of the samples. In a pod's
      other processes there are none.
    """
    solve, source = drawing.make_solve(trained), trained.source
    key = keys.key(seed, "curve")

    def samples(way: drawing.Way) -> list[share.Batch]:
        how = f"{way.num_steps}_steps" if way.num_steps else f"tolerance_{way.tolerance!r}"
        name = f"seed_{seed}_{way.solver}_{how}"
        return drawing.batches(
            solve, way, store, name, key, source, batch_size, num, trained.condition,
            key_jumps=keys.key(seed, "jumps"),
        )  # fmt: skip

    exact = drawing.Way("Tsit5", tolerance=tight)
    found = {way: samples(way) for way in (exact, *points)}
    share.solve([batch for batches in found.values() for batch in batches], "solvers")
    return cluster.main_first(lambda: _rows([*points, exact], found, num, quality)) or []


def _rows(
    ways: Sequence[drawing.Way],
    found: Mapping[drawing.Way, Sequence[share.Batch]],
    num: int,
    quality: Callable[[np.ndarray], Estimate],
) -> list[dict[str, Any]]:
    """One row per way; the last is the exact one."""
    x1, rows = drawing.joined(found[ways[-1]], num).x1, []
    for way in ways:
        drawn = drawing.joined(found[way], num)
        figure = quality(drawn.x1)
        row = {
            "num_evaluations": drawn.num_evaluations,
            "quality": figure.value,
            "standard_error": figure.standard_error,
            "error_rms": float(np.sqrt(np.mean(np.square(drawn.x1 - x1)))),
        }
        rows.append(way._asdict() | row)
    return rows


def ways(config: Config, trained: Trained) -> list[drawing.Way]:
    """Solvers at the evaluations and tolerances that the flags name, and a run's own way."""
    found = drawing.ways(config.curve_evaluations, config.curve_tolerances)
    if drawing.can_jump(trained):
        found += [drawing.Way(drawing.JUMPS, num_steps=n) for n in sorted({*config.curve_jumps})]
    return found


def draw(
    config: Config,
    trained: Trained,
    folder: pathlib.Path,
    base: dict[str, Any],
    quality: Callable[[np.ndarray], Estimate],
    label: str,
    tight: float,
) -> list[dict[str, Any]]:
    """The curve's rows and its picture, or none where the flags ask for none."""
    if not config.curve_examples:
        return []
    rows = measure(
        trained,
        Store(folder, "curve", base),
        config.batch_size,
        config.curve_examples,
        ways(config, trained),
        quality,
        seed=config.seeds[0],
        tight=tight,
    )
    if cluster.is_main():
        plotting.save(folder / "curve.png", plotting.cost_curve(rows, label=label))
    return rows


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and spread of one figure over the seeds."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "mean": float(np.mean(values)),
        "standard_deviation_over_seeds": spread,
        "per_seed": [float(value) for value in values],
    }


def errors_over_seeds(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """`over_seeds` with the error that the splits of one seed's samples show, root mean square."""
    error = np.sqrt(np.mean(np.square([estimate.standard_error for estimate in estimates])))
    values = [estimate.value for estimate in estimates]
    return over_seeds(values) | {"standard_error_of_one_seed": float(error)}
