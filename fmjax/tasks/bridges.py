"""What experiments on bridges between two data sets share: their flags, and what is measured.

A trained bridge is solved from held-out points of either end with `fm.sample_sde`. Of two normal
distributions the Schroedinger bridge is known, and so are its moments at all times; of points in
the plane the ends are compared with held-out points, and the ways are drawn.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import plotting
from fmjax.evaluation.errors import standard_error
from fmjax.harness.config import RunConfig
from fmjax.harness.pods import cluster
from fmjax.harness.start import say
from fmjax.harness.task import Trained
from fmjax.metrics import wasserstein2
from fmjax.tasks.points import MLPConfig

NUM_TIMES = 21  # at which moments are compared, the ends included
MOST_ASSIGNED = 2000  # points in a Wasserstein distance

DriftOf = Callable[[Any, bool], fm.Velocity]  # (params, backwards) -> drift
Moments = Callable[[float], tuple[np.ndarray, np.ndarray]]  # t -> mean [dim], covariance [dim, dim]


@dataclasses.dataclass(frozen=True)
class BridgeConfig(RunConfig):
    """The flags of an experiment on bridges."""

    model: MLPConfig = MLPConfig()
    """The network's size."""
    sigma: float = 1.0
    """The reference process is sigma times a Brownian motion."""
    num_train: int = 50_000
    """Training points of each end."""
    eval_examples: int = 50_000
    """Held-out points of each end that the trained bridge is solved from; 0 for none."""
    eval_steps: int = 100
    """Euler steps of these solves, a multiple of 20."""
    cpu_threads: int | None = 1
    """Threads of XLA on a CPU; one per core without it. Small networks are faster on one."""


class Ends(NamedTuple):
    """Both ends of a bridge.

    Attributes:
      x0, x1: to train on, `[num, dim]` each, in no common order.
      held_out: `[2, num_held_out, dim]`.
      covariance: Cov(x0_i, x1_i) of the Schroedinger bridge, the same for every coordinate; None
        where it is not known.
      moments: of the Schroedinger bridge at any time; None where they are not known.
    """

    x0: np.ndarray
    x1: np.ndarray
    held_out: np.ndarray
    covariance: float | None = None
    moments: Moments | None = None


def check(config: BridgeConfig) -> None:
    """Refuses flags that can't work."""
    if config.eval_steps % (NUM_TIMES - 1):
        raise ValueError(
            f"--eval-steps must be a multiple of {NUM_TIMES - 1}, between whose times moments are "
            f"compared; got {config.eval_steps}."
        )


def finish(
    ends: Ends, drift_of: DriftOf, trained: Trained, folder: pathlib.Path, key: jax.Array
) -> dict[str, Any]:
    """Solves from both ends; moments where they are known, distances and a picture in the plane."""
    config, figures = trained.config, {}
    if not config.eval_examples:
        return {}
    for backwards, name in ((False, "forwards"), (True, "backwards")):
        say(f"Solving {name} from {config.eval_examples} held-out points ...")
        x = solve(
            drift_of, config, trained.params, jax.random.fold_in(key, backwards),
            jnp.asarray(ends.held_out[int(backwards)]), backwards,
        )  # fmt: skip
        x = np.asarray(x, np.float64)
        x = x[::-1] if backwards else x
        figures[name] = measure(ends, x, arrives=0 if backwards else -1)
        if x.shape[-1] == 2 and not backwards and cluster.is_main():
            path = folder / "samples" / f"step_{trained.step:08d}.png"
            plotting.save(path, plotting.trajectories(x[:, :2000], num_lines=100))
            figures["samples"] = str(path.relative_to(folder))
    return figures | {"sampler": f"Euler, {config.eval_steps} steps; EMA parameters"}


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def solve(
    drift_of: DriftOf,
    config: BridgeConfig,
    params: Any,
    key: jax.Array,
    x: jax.Array,
    backwards: bool,
) -> jax.Array:
    """The states at `NUM_TIMES` times in the order of the solve, `[NUM_TIMES, num, dim]`."""
    drift, steps = drift_of(params, backwards), config.eval_steps // (NUM_TIMES - 1)
    ts = jnp.linspace(1.0, 0.0, NUM_TIMES) if backwards else jnp.linspace(0.0, 1.0, NUM_TIMES)

    def between(x: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        key, t0, t1 = given
        x = fm.sample_sde(key, drift, lambda t: config.sigma, x, t0=t0, t1=t1, num_steps=steps)
        return x, x

    keys = jax.random.split(key, NUM_TIMES - 1)
    _, states = jax.lax.scan(between, x, (keys, ts[:-1], ts[1:]))
    return jnp.concatenate([x[None], states])


def measure(ends: Ends, x: np.ndarray, *, arrives: int) -> dict[str, Any]:
    """What is compared of solved states.

    Args:
      ends: both ends.
      x: states from t = 0 to t = 1, `[NUM_TIMES, num, dim]`.
      arrives: the index of the state that the solve ended with, 0 or -1.
    """
    held_out, num, dim = ends.held_out[arrives], *x.shape[1:]
    figures: dict[str, Any] = {}
    if dim == 2:
        few = slice(min(num, MOST_ASSIGNED))
        figures["wasserstein2"] = wasserstein2(x[arrives][few], held_out[few])
        figures["cost"] = float(((x[-1] - x[0]) ** 2).sum(1).mean())
    centred = x - x.mean(1, keepdims=True)
    products = (centred[0] * centred[-1]).mean(1)
    figures["covariance"] = float(products.sum() / (num - 1))
    figures["covariance_standard_error"] = standard_error(products)
    figures["mean"] = float(x[arrives].mean())
    figures["variance"] = float(x[arrives].var(0, ddof=1).mean())
    if ends.covariance is not None:
        figures["covariance_exact"] = ends.covariance
    if ends.moments is not None:
        ts = np.linspace(0.0, 1.0, NUM_TIMES)
        found = [divergence(y, *ends.moments(t)) for t, y in zip(ts, x, strict=True)]
        figures["kl"], figures["kl_floor"] = float(np.mean(found)), dim * (dim + 3) / (4 * num)
    return figures


def divergence(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """KL(N(m, S) || N(mean, cov)) in nats, m and S of the points `[num, dim]`.

    Of points of the very distribution it is d (d + 3) / (4 num) in the mean, its floor.
    """
    apart, own = x.mean(0) - mean, np.cov(x.T, ddof=0).reshape(cov.shape)
    ratio = np.linalg.solve(cov, own)
    square = apart @ np.linalg.solve(cov, apart)
    return 0.5 * float(np.trace(ratio) - len(mean) + square - np.linalg.slogdet(ratio)[1])
