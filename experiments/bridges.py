"""Iterated bridges: the Schroedinger bridge between two data sets, by one network of two fields.

    python -m experiments.bridges
    python -m experiments.bridges --dim 20
    python -m experiments.bridges --pair moons-8gaussians --sigma 0.7 --num-steps 12000

On two cores of a shared server: 1.3 to 1.9 minutes of the first two, and a covariance between 0.614
and 0.626 where 0.618 is exact (`experiments.benchmarks.bridges_table`).

Iterative Markovian fitting (Shi et al. 2023, arXiv 2303.16852) alternates two projections: fit a
Markov process to Brownian bridges between the present pairs, then take the pairs that it makes.
Here both are done in every step, as De Bortoli et al. (2024, arXiv 2409.09347) do. A batch of x0
is solved forwards to new x1, and the bridges between them train the fields that are solved
backwards; a batch of x1 is solved backwards, and trains those that are solved forwards. So each
direction is fitted to pairs whose one end is data, and what it arrives at is right whatever the
other makes. The first steps pair independently, which alone is bridge matching.

The Gaussian benchmark of Shi et al.: N(-0.1, I) to N(0.1, I) in `--dim` dimensions, sigma = 1. The
Schroedinger bridge has Cov(x0_i, x1_i) = (sqrt(4 + sigma^4) - sigma^2) / 2 = 0.618034.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import toy_data
from fmjax import harness, training
from fmjax.tasks import bridges


@dataclasses.dataclass(frozen=True)
class Config(bridges.BridgeConfig):
    """Iterative Markovian fitting of a Schroedinger bridge."""

    pair: Literal["gaussians", "moons-8gaussians"] = "gaussians"
    """The two data sets."""
    dim: int = 5
    """Dimension of the Gaussians; the other pair is in the plane."""
    first_steps: int = 2000
    """Steps on independent pairs before the network's own."""
    bridge_steps: int = 20
    """Euler steps with which pairs are made."""
    num_steps: int = 6000
    learning_rate: float = 1e-3
    checkpoint_every: int = 1000
    log_every: int = 100
    steps_per_dispatch: int = 20


def plane(config: Config) -> bridges.Ends:
    """The pair of `experiments.toy_table`, smaller: a ring of radius 3, the moons within."""
    num, held_out = config.num_train, config.eval_examples
    train, held_out = toy_data.split(config.pair, config.seed, num, held_out)
    return bridges.Ends(train[0] / 8, train[1] / 4, held_out / np.array([[[8]], [[4]]], np.float32))


def make_task(config: Config) -> harness.Task:
    ends = bridges.gaussians(config, config.dim) if config.pair == "gaussians" else plane(config)
    network, path = bridges.make_network(config), fm.brownian_bridge(config.sigma)

    def solve(params: Any, key: jax.Array, x: jax.Array, backwards: bool) -> jax.Array:
        t0, t1 = (1.0, 0.0) if backwards else (0.0, 1.0)
        return fm.sample_sde(
            key, network.drift(params, backwards), lambda t: config.sigma, x,
            t0=t0, t1=t1, num_steps=config.bridge_steps,
        )  # fmt: skip

    def draw(state: training.TrainState, key: jax.Array, batch: Any) -> Any:
        """Bridges for both directions, on pairs of which one end is data."""
        key_pair, key_up, key_down, key_t, key_z = jax.random.split(key, 5)
        x0, x1 = jax.random.permutation(key_pair, batch[0]), batch[1]

        def own() -> tuple[jax.Array, jax.Array]:
            params = state.ema_params
            return solve(params, key_up, x0, False), solve(params, key_down, x1, True)

        y1, y0 = jax.lax.cond(state.step < config.first_steps, lambda: (x1, x0), own)
        starts, stops = jnp.concatenate([y0, x0]), jnp.concatenate([x1, y1])
        t = fm.uniform(key_t, starts.shape[:1])
        labels = jnp.repeat(jnp.arange(2), len(x0))  # 0: solved forwards; 1: backwards
        return fm.sample_bridge(key_z, path, starts, stops, t), labels

    def mean_loss(params: Any, key: jax.Array, drawn: Any) -> jax.Array:
        sample, labels = drawn
        return jnp.mean(fm.bridge_loss(functools.partial(network.fields, params, labels), sample))

    tx = harness.optimizer(config)
    train_step = training.make_train_step(mean_loss, tx, ema_decay=config.ema_decay)

    def init(key: jax.Array) -> training.TrainState:
        return training.init_train_state(network.init(key, ends.x0.shape[1]), tx)

    def step(state: training.TrainState, key: jax.Array, batch: Any) -> Any:
        key_draw, key_step = jax.random.split(key)
        drawn = draw(state, jax.random.fold_in(key_draw, state.step), batch)
        return train_step(state, key_step, drawn)

    return bridges.make_task(ends, network, init, step)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
