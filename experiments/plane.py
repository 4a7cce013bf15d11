"""Evaluation of a 2-D run: log-likelihood, Wasserstein distance, and a density that sums to one."""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import drawing
from experiments.curve import errors_over_seeds, over_seeds
from experiments.errors import standard_error
from experiments.trained import Trained
from fmjax import metrics
from fmjax.harness.store import Store, progress
from fmjax.training import sharding

EXTENT, SIDE = 3.5, 200  # of the density's grid


class Points(NamedTuple):
    """Data in the plane, none of it trained on.

    Attributes:
      held_out: for the log-likelihood and as what samples are compared with, `[num, 2]`.
      another: an independent set of the same size: its distance is what a perfect model has.
    """

    held_out: np.ndarray
    another: np.ndarray


def likelihood(
    trained: Trained, store: Store, held_out: np.ndarray, tolerance: float
) -> dict[str, Any]:
    """Exact log-likelihood in nats per point, at the tolerance and at a tenth of it."""
    solve = _log_prob_fn(trained)

    def compute(tolerance: float) -> dict[str, np.ndarray]:
        solved = solve(trained.params, jnp.asarray(held_out), tolerance)
        return {
            "log_prob": np.asarray(solved.log_prob),
            "num_evaluations": np.asarray(solved.num_evaluations),
        }

    done = [
        store.get(f"held_out_tolerance_{tol:.3g}", lambda tol=tol: compute(tol))
        for tol in (tolerance, tolerance / 10)
    ]
    log_p, tight = (batch["log_prob"].astype(np.float64) for batch in done)
    return {
        "num_points": len(log_p),
        "nats_per_point": float(log_p.mean()),
        "standard_error": standard_error(log_p),
        "solver_error": {
            "tolerance": tolerance,
            "difference": float((log_p - tight).mean()),
            "largest_difference": float(np.abs(log_p - tight).max()),
            "num_evaluations_at_a_tenth": int(done[1]["num_evaluations"]),
        },
        "num_evaluations": int(done[0]["num_evaluations"]),
        "seconds": round(float(sum(batch["seconds"] for batch in done)), 2),
        "estimator": {"divergence": "exact", "solver": "Tsit5", "tolerance": tolerance},
    }


def density(trained: Trained, store: Store, tolerance: float) -> tuple[np.ndarray, float]:
    """exp(log p) on a square grid of cell centres, `[SIDE, SIDE]`, and its sum over the square."""
    axis = (np.arange(SIDE, dtype=np.float32) + 0.5) * (2 * EXTENT / SIDE) - EXTENT
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    solve = _log_prob_fn(trained)

    def compute() -> dict[str, np.ndarray]:
        return {
            "log_prob": np.asarray(solve(trained.params, jnp.asarray(grid), tolerance).log_prob)
        }

    p = np.exp(store.get("density", compute)["log_prob"].astype(np.float64)).reshape(SIDE, SIDE)
    return p, float(p.sum() * (2 * EXTENT / SIDE) ** 2)


def quality(
    trained: Trained,
    store: Store,
    points: Points,
    *,
    way: drawing.Way,
    batch_size: int,
    seeds: tuple[int, ...],
) -> tuple[dict[str, Any], np.ndarray]:
    """2-Wasserstein distance and MMD of as many samples as there are held-out points, by seed."""
    solve, num = drawing.make_solve(trained), len(points.held_out)
    kernel = metrics.gaussian_kernel(0.5)
    runs, w2, mmd = [], [], []
    for seed in progress(seeds, "seeds"):
        key = jax.random.fold_in(jax.random.key(seed), 1)
        name, shape = f"seed_{seed}", (batch_size, 2)
        run = drawing.draw(solve, way, store, name, key, shape, num, trained.labels)
        w2.append(metrics.wasserstein2(run.x1, points.held_out))
        mmd.append(metrics.kernel_distance(run.x1, points.held_out, kernel=kernel))
        runs.append(run)
    return {
        "num_samples": num,
        "seeds": list(seeds),
        "wasserstein2": over_seeds(w2),
        "wasserstein2_of_fresh_data": metrics.wasserstein2(points.another, points.held_out),
        "squared_mmd": errors_over_seeds(mmd) | {"kernel": "Gaussian, bandwidth 0.5"},
        "sampler": str(way),
        "begun_on": store.begun_on,
        "num_evaluations": float(np.mean([run.num_evaluations for run in runs])),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }, runs[0].x1


def wasserstein2_estimate(x1: np.ndarray, data: np.ndarray) -> metrics.Estimate:
    """The 2-Wasserstein distance of as many points of either, with its jackknife error."""
    both = np.concatenate([x1, data[: len(x1)]], axis=1)
    return metrics.jackknife(lambda z: metrics.wasserstein2(z[:, :2], z[:, 2:]), both)


def _log_prob_fn(trained: Trained) -> Any:
    @jax.jit
    def solve(params: Any, x: jax.Array, tolerance: jax.Array) -> fm.LogProb:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)  # pyright: ignore
        return fm.integrate_log_prob(
            trained.velocity(params, None), x, stepsize_controller=controller
        )

    return lambda params, x, tolerance: solve(
        params, jax.device_put(x, sharding.replicated(sharding.make_mesh())), tolerance
    )
