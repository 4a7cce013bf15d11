"""Evaluation of runs on points: log-likelihood, Wasserstein distance, and quality against cost.

In the plane the density is drawn on a grid too, where it must sum to one.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import metrics, plotting
from fmjax.evaluation import curve, drawing, protocol, report
from fmjax.evaluation.curve import errors_over_seeds, over_seeds
from fmjax.evaluation.errors import standard_error
from fmjax.evaluation.protocol import Config
from fmjax.harness import keys, share
from fmjax.harness.pods import cluster
from fmjax.harness.share import Batch
from fmjax.harness.store import Store, num_computed
from fmjax.harness.task import Trained
from fmjax.training import digests, sharding

SIDE = 300  # of the density's grid
TOLERANCE = 1e-5
_WAY = drawing.Way("Tsit5", tolerance=TOLERANCE)
LEAST = 20  # points, for errors over ten groups


class Points(NamedTuple):
    """Data, none of it trained on.

    Attributes:
      held_out: for the log-likelihood and as what samples are compared with, `[num, D]`.
      fresh: `k -> [num, D]`, independent sets of the same size, one for each seed: their distance
        is what a perfect model has. None from where there is no other.
      conditions: of the held-out points, `[num, ...]`, which samples are drawn under too, so that
        the k-th sample has the k-th point's; None for a model without.
      given: what the likelihood is given, in words; empty for nothing.
      units: what distances are measured in, in words; empty for the points' own.
      log_scale: what log-densities are lowered by to be those of other units, the sum of the
        logarithms of the standard deviations that the points were divided by.
    """

    held_out: np.ndarray
    fresh: Callable[[int], np.ndarray | None]
    conditions: Any = None
    given: str = ""
    units: str = ""
    log_scale: float = 0.0


def evaluate(
    points: Points, trained: Trained, folder: pathlib.Path, config: Config
) -> dict[str, Any]:
    """What `fmjax.evaluation.evaluate` writes of a run on points.

    Args:
      points: data that were not trained on.
      trained: the run.
      folder: the evaluation's folder.
      config: the flags of the evaluation.

    Returns:
      What stands in evaluation.json; in a pod process 0's is.
    """
    num, dim = points.held_out.shape
    if num < LEAST:
        raise ValueError(
            f"An evaluation needs {LEAST} held-out points, of a table twice as many rows; got "
            f"{num}. Give the file more rows, or arrays `train` and `test`."
        )
    protocol.refuse_image_flags(config, num)
    base = protocol.identity(trained, config) | {
        "tolerance": TOLERANCE,
        "data": digests.hash_array(points.held_out),
    }
    if points.conditions is not None:
        base |= {"guidance": config.guidance, "conditions": digests.hash_tree(points.conditions)}
    store = Store(folder, "log_prob", base)
    solves = likelihoods(trained, store, points)
    samples = Store(folder, "samples", base | {"batch_size": num})
    drawn = draw(trained, samples, points, config.seeds)
    grid = []
    if dim == 2 and points.conditions is None:
        extent = plotting.limits(points.held_out, margin=0.3)
        grid = [(density(trained, store, extent), extent)]
    batches = [*solves, *(batch for batch, _ in grid), *(batch for run in drawn for batch in run)]
    share.solve(batches, "batches")

    def figures() -> dict[str, Any]:
        found = likelihood(solves, points.log_scale) | {"given": points.given}
        measured, x1 = quality(drawn, points, config.seeds)
        for batch, extent in grid:
            p, found["density_integral"] = on_grid(batch, extent)
            picture = plotting.samples_and_density(points.held_out, x1, p, extent)
            plotting.save(folder / "density.png", picture)
        measured |= {"units": points.units, "guidance": config.guidance}
        result = {
            "protocol": protocol.record(config, trained, leave_out=protocol.IMAGE_FLAGS),
            "likelihood": found,
            "quality": measured,
            "curve": [],
            "batches_computed": num_computed(folder),
        }
        result["rows"] = report.rows_of_points(result)
        report.write(folder, result)  # the curve is the long part: the figures are on disk before
        return result

    result = cluster.main_first(figures) or {}

    def wasserstein2(x1: np.ndarray) -> metrics.Estimate:
        both = np.concatenate([x1, points.held_out[: len(x1)]], axis=1)
        return metrics.jackknife(lambda z: metrics.wasserstein2(z[:, :dim], z[:, dim:]), both)

    label = "2-Wasserstein distance"
    rows = curve.draw(config, trained, folder, base, wasserstein2, label, tight=1e-6)
    return result | {"curve": rows, "batches_computed": num_computed(folder)}


def likelihoods(trained: Trained, store: Store, points: Points) -> list[Batch]:
    """The log-densities of the held-out points, at the tolerance and at a tenth of it."""
    solve = _log_prob_fn(trained)

    def compute(tolerance: float) -> dict[str, np.ndarray]:
        solved = solve(points.held_out, points.conditions, tolerance)
        return {
            "log_prob": np.asarray(solved.log_prob),
            "num_evaluations": np.asarray(solved.num_evaluations),
        }

    return [
        Batch(store, f"held_out_tolerance_{tol:.3g}", functools.partial(compute, tol), f"{tol}")
        for tol in (TOLERANCE, TOLERANCE / 10)
    ]


def likelihood(batches: Sequence[Batch], log_scale: float) -> dict[str, Any]:
    """Exact log-likelihood in nats per point, at the tolerance and at a tenth of it."""
    done = [batch.get() for batch in batches]
    log_p, tight = (batch["log_prob"].astype(np.float64) - log_scale for batch in done)
    return {
        "num_points": len(log_p),
        "nats_per_point": float(log_p.mean()),
        "standard_error": standard_error(log_p),
        "solver_error": {
            "tolerance": TOLERANCE,
            "difference": float((log_p - tight).mean()),
            "largest_difference": float(np.abs(log_p - tight).max()),
            "num_evaluations_at_a_tenth": int(done[1]["num_evaluations"]),
        },
        "num_evaluations": int(done[0]["num_evaluations"]),
        "seconds": round(float(sum(batch["seconds"] for batch in done)), 2),
        "estimator": {"divergence": "exact", "solver": "Tsit5", "tolerance": TOLERANCE},
    }


def density(trained: Trained, store: Store, extent: Any) -> Batch:
    """log p on a square grid of cell centres."""
    solve, grid = _log_prob_fn(trained), plotting.grid_points(extent, SIDE)

    def compute() -> dict[str, np.ndarray]:
        return {"log_prob": np.asarray(solve(grid, None, TOLERANCE).log_prob)}

    return Batch(store, f"density_{SIDE}", compute, "density")


def on_grid(batch: Batch, extent: Any) -> tuple[np.ndarray, float]:
    """exp(log p) on the grid of `density`, `[SIDE, SIDE]`, and its sum over the square."""
    left, right, bottom, top = extent
    p = np.exp(batch.get()["log_prob"].astype(np.float64)).reshape(SIDE, SIDE)
    return p, float(p.mean() * (right - left) * (top - bottom))


def draw(
    trained: Trained, store: Store, points: Points, seeds: tuple[int, ...]
) -> list[list[Batch]]:
    """As many samples as there are held-out points, one batch for each seed."""
    solve, num = drawing.make_solve(trained), len(points.held_out)

    def condition(rows: np.ndarray) -> Any:
        return jax.tree.map(lambda x: x[rows % num], points.conditions)

    found = []
    for seed in seeds:
        key, source, name = keys.key(seed, "samples"), trained.source, f"seed_{seed}"
        found.append(drawing.batches(solve, _WAY, store, name, key, source, num, num, condition))
    return found


def quality(
    drawn: Sequence[Sequence[Batch]], points: Points, seeds: tuple[int, ...]
) -> tuple[dict[str, Any], np.ndarray]:
    """2-Wasserstein distance and MMD of as many samples as there are held-out points, by seed."""
    num, kernel = len(points.held_out), metrics.gaussian_kernel(0.5)
    runs = [drawing.joined(batches, num) for batches in drawn]
    w2 = [metrics.wasserstein2(run.x1, points.held_out) for run in runs]
    mmd = [metrics.kernel_distance(run.x1, points.held_out, kernel=kernel) for run in runs]
    sets = [points.fresh(k) for k in range(len(seeds))]
    fresh = [metrics.wasserstein2(x, points.held_out) for x in sets if x is not None]
    return {
        "num_samples": num,
        "seeds": list(seeds),
        "wasserstein2": over_seeds(w2),
        "wasserstein2_of_fresh_data": over_seeds(fresh),
        "squared_mmd": errors_over_seeds(mmd) | {"kernel": "Gaussian, bandwidth 0.5"},
        "sampler": str(_WAY),
        "begun_on": drawn[0][0].store.begun_on,
        "num_evaluations": float(np.mean([run.num_evaluations for run in runs])),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }, runs[0].x1


def _log_prob_fn(trained: Trained) -> Any:
    """`(x, condition, tolerance) -> LogProb`, replicated over this process's devices."""

    @jax.jit
    def solve(params: Any, x: jax.Array, condition: Any, tolerance: jax.Array) -> fm.LogProb:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)  # pyright: ignore
        return fm.integrate_log_prob(
            trained.velocity(params, condition), x, stepsize_controller=controller
        )

    def call(x: np.ndarray, condition: Any, tolerance: float) -> fm.LogProb:
        replicated = sharding.replicated(sharding.make_mesh(jax.local_devices()))
        given = jax.device_put(jax.tree.map(jnp.asarray, (x, condition)), replicated)
        return solve(trained.params, *given, tolerance)

    return call
