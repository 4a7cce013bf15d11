"""What experiments on bridges between two data sets share: their flags, and what is measured.

A trained bridge is solved from held-out points of either end with `fm.sample_sde`. Of two normal
distributions the Schroedinger bridge is known, and so are its moments at all times; of points in
the plane the ends are compared with held-out points, and the ways are drawn.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import models, plotting, training
from fmjax.evaluation.errors import standard_error
from fmjax.harness.config import RunConfig
from fmjax.harness.pods import cluster
from fmjax.harness.start import say
from fmjax.harness.task import Init, Task, Trained
from fmjax.metrics import wasserstein2
from fmjax.tasks.points import MLPConfig, describe

NUM_TIMES = 21  # at which moments are compared, the ends included
NUM_FRAMES = 51  # of the ways that are drawn
MOST_ASSIGNED = 2000  # points in a Wasserstein distance

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
    """Euler steps of these solves, a multiple of 100."""
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


class Network(NamedTuple):
    """One network of both fields, of either direction.

    Attributes:
      init: `(key, dim) -> params`.
      fields: `(params, backwards, t, x) -> (w, z_hat)`; `backwards` is 0 for the equation that is
        solved forwards and 1 for the other, `[]` or `[batch]`.
      drift: `(params, backwards) -> drift` of the equation in one direction.
      flow: `params -> velocity` of the flow of the fields that are solved forwards.
    """

    init: Callable[[jax.Array, int], Any]
    fields: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    drift: Callable[[Any, bool], fm.Velocity]
    flow: Callable[[Any], fm.Velocity]


def make_network(config: BridgeConfig) -> Network:
    """The MLP that the flags describe, with the direction as its class.

    Raises:
      ValueError: for flags that can't work.
    """
    if not 0 < config.sigma < math.inf:
        raise ValueError(f"--sigma must be positive and finite; got {config.sigma}.")
    if config.eval_steps % 100:
        raise ValueError(
            "--eval-steps must be a multiple of 100, for states at 20 and at 50 equal steps of "
            f"time; got {config.eval_steps}."
        )
    path, model = fm.brownian_bridge(config.sigma), models.MLP(config.model.features, num_classes=2)

    def init(key: jax.Array, dim: int) -> Any:
        return model.init(key, jnp.zeros(()), jnp.zeros((1, 2 * dim)))

    def fields(params: Any, backwards: jax.Array, t: jax.Array, x: jax.Array) -> Any:
        labels = jnp.broadcast_to(backwards, x.shape[:1])
        # The MLP gives as many channels as it gets, and two fields take twice those of x.
        both: Any = model.apply(params, t, jnp.tile(x, 2), labels)
        w, r = jnp.split(both, 2, axis=1)
        return w, path.gamma(t).reshape(-1, 1) * r  # z_hat is 0 at both ends, as gamma is

    def split(params: Any, backwards: bool) -> tuple[fm.Velocity, fm.Velocity]:
        both = functools.partial(fields, params, jnp.array(int(backwards)))
        return (lambda t, x: both(t, x)[0]), (lambda t, x: both(t, x)[1])

    def drift(params: Any, backwards: bool) -> fm.Velocity:
        w, z_hat = split(params, backwards)
        return fm.bridge_drift(path, w, z_hat, lambda t: config.sigma, reverse=backwards)

    def flow(params: Any) -> fm.Velocity:
        return fm.bridge_flow(path, *split(params, False))

    return Network(init, fields, drift, flow)


def gaussians(config: BridgeConfig, dim: int) -> Ends:
    """N(-0.1, I) and N(0.1, I), between which the Schroedinger bridge is known.

    Source: Shi et al. 2023, arXiv 2303.16852 (its Gaussian experiment).
    """
    if dim < 1:
        raise ValueError(f"dim must be 1 or more; got {dim}.")
    rng, shift, num = np.random.default_rng(config.seed), 0.1, config.num_train
    x = rng.standard_normal((2, num + config.eval_examples, dim)) + [[[-shift]], [[shift]]]
    both = math.sqrt(4 + config.sigma**4)

    def moments(t: float) -> tuple[np.ndarray, np.ndarray]:
        variance = (1 - t) ** 2 + t**2 + t * (1 - t) * both
        return np.full(dim, (2 * t - 1) * shift), variance * np.eye(dim)

    x, exact = x.astype(np.float32), (both - config.sigma**2) / 2
    return Ends(x[0, :num], x[1, :num], x[:, num:], exact, moments)


def make_task(ends: Ends, network: Network, init: Init, step: training.TrainStep) -> Task:
    """The task of an experiment on bridges; its batches are `(x0, x1)`, `[batch, dim]` each."""
    return Task(
        num_examples=len(ends.x0),
        batch=lambda rows: (ends.x0[rows], ends.x1[rows]),
        init=init,
        step=step,
        velocity=lambda params, condition: network.flow(params),
        finish=functools.partial(finish, ends, network),
        data=lambda: describe(np.concatenate([ends.x0, ends.x1])),
    )


def finish(
    ends: Ends, network: Network, trained: Trained, folder: pathlib.Path, key: jax.Array
) -> dict[str, Any]:
    """Solves from both ends; moments where they are known, distances and a picture in the plane."""
    config, figures = trained.config, {}
    if not config.eval_examples:
        return {}
    for backwards, name in ((False, "forwards"), (True, "backwards")):
        say(f"Solving {name} from {config.eval_examples} held-out points ...")
        begin = jnp.asarray(ends.held_out[int(backwards)])
        key_solve = jax.random.fold_in(key, backwards)
        x = solve(network, config, trained.params, key_solve, begin, backwards, NUM_TIMES)
        x = np.asarray(x, np.float64)
        x = x[::-1] if backwards else x
        figures[name] = measure(ends, x, arrives=0 if backwards else -1)
    if ends.x0.shape[1] == 2:
        begin = jnp.asarray(ends.held_out[0, :1000])
        noisy = solve(network, config, trained.params, key, begin, False, NUM_FRAMES)
        smooth = solve_flow(network, trained.params, begin)
        if cluster.is_main():
            path = folder / "samples" / f"step_{trained.step:08d}.png"
            plotting.save(path, plotting.ways({"SDE": noisy, "ODE": smooth}, num_lines=60))
            figures["samples"] = str(path.relative_to(folder))
    return figures | {"sampler": f"Euler, {config.eval_steps} steps; EMA parameters"}


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def solve(
    network: Network,
    config: BridgeConfig,
    params: Any,
    key: jax.Array,
    x: jax.Array,
    backwards: bool,
    num_times: int,
) -> jax.Array:
    """The states at equal times in the order of the solve, `[num_times, num, dim]`."""
    drift, steps = network.drift(params, backwards), config.eval_steps // (num_times - 1)
    ts = jnp.linspace(1.0, 0.0, num_times) if backwards else jnp.linspace(0.0, 1.0, num_times)

    def between(x: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        key, t0, t1 = given
        x = fm.sample_sde(key, drift, lambda t: config.sigma, x, t0=t0, t1=t1, num_steps=steps)
        return x, x

    keys = jax.random.split(key, num_times - 1)
    _, states = jax.lax.scan(between, x, (keys, ts[:-1], ts[1:]))
    return jnp.concatenate([x[None], states])


@functools.partial(jax.jit, static_argnums=0)
def solve_flow(network: Network, params: Any, x: jax.Array) -> jax.Array:
    """The states of the flow, from 0.001 to 0.999, since gamma' is infinite at the ends."""
    t0, t1 = 1e-3, 1 - 1e-3
    ts = jnp.clip(jnp.linspace(0.0, 1.0, NUM_FRAMES), t0, t1)
    return fm.integrate(network.flow(params), x, ts=ts, t0=t0, t1=t1).x


def measure(ends: Ends, x: np.ndarray, *, arrives: int) -> dict[str, Any]:
    """What is compared of solved states.

    Args:
      ends: both ends.
      x: states from t = 0 to t = 1, `[NUM_TIMES, num, dim]`.
      arrives: the index of the state that the solve ended with, 0 or -1.

    Returns:
      Figures as JSON holds them. The floor of the 2-Wasserstein distance to held-out points, in
      the plane, is that of as many other held-out points; `cost` is the mean of |x1 - x0|^2.
    """
    held_out, num, dim = ends.held_out[arrives], *x.shape[1:]
    figures: dict[str, Any] = {}
    if dim == 2:
        few = min(num // 2, MOST_ASSIGNED)
        figures["wasserstein2"] = wasserstein2(x[arrives][:few], held_out[:few])
        figures["wasserstein2_floor"] = wasserstein2(held_out[few : 2 * few], held_out[:few])
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
