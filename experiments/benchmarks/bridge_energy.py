"""The path energy that the flow of SB-CFM and SF2M would have without a network.

    python -m experiments.benchmarks.bridge_energy

Between given pairs the bridge of `experiments.toy_bridges` is a mixture of as many Gaussians as
there are pairs, and its velocity u(t, x) a weighted mean over them. Here E|u(t, x_t)|^2 is a mean
over points x_t of other pairs than those of the mixture, and its integral over time the trapezoidal
rule's, between the times within which those flows are solved. Close to an end the mixture of few
pairs falls apart into points, where the energy comes out too large: the figure of a quarter of the
pairs is beside that of all of them, and shows by how much. No step, no network and no training are
in it; what the trained flows of the table miss of it they smooth away.

On two cores of a shared server: two minutes.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import toy_bridges, toy_data
from fmjax.harness import command
from fmjax.harness.records import environment, write_json

ENDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05)
TIMES = np.array([*ENDS, *np.arange(1, 10) / 10, *(1 - t for t in reversed(ENDS))])


@dataclasses.dataclass(frozen=True)
class Config:
    """Path energies of the bridges in the plane, from pairs alone."""

    seed: int = 0
    """Of the training points and the pairs."""
    batch_size: int = 128
    """Pairs per entropic plan, as in training."""
    num_batches: int = 400
    """Batches of pairs in the mixture."""
    num_points: int = 6
    """Batches of pairs whose points the mean is over."""
    num_train: int = 10_000
    """Training points of each distribution."""
    reference_draws: int = 64
    """Exact assignments of 500 points behind W2^2(q0, q1)."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/bridge_energy.json."""


def velocity(path: fm.BridgePath, x0: jax.Array, x1: jax.Array) -> fm.Velocity:
    """u(t, x) of the bridges between the pairs (x0, x1), `[num, 2]` each."""

    def at(t: jax.Array, x: jax.Array) -> jax.Array:
        gamma, slope = jax.jvp(path.gamma, (t,), (jnp.ones_like(t),))
        means = t * x1 + (1 - t) * x0
        weights = jax.nn.softmax(-jnp.sum((x[None] - means) ** 2, axis=1) / (2 * gamma**2))
        return weights @ (x1 - x0) + slope / gamma * (x - weights @ means)

    return lambda t, x: jax.lax.map(lambda point: at(t, point), x)


def energy(
    key: jax.Array, path: fm.BridgePath, u: fm.Velocity, x0: Any, x1: Any, times: np.ndarray = TIMES
) -> float:
    """int E|u(t, x_t)|^2 dt over the bridges between the pairs (x0, x1)."""

    @jax.jit
    def square(key: jax.Array, t: jax.Array) -> jax.Array:
        x_t = fm.sample_bridge(key, path, x0, x1, t).mean.x_t
        return jnp.mean(jnp.sum(u(t, x_t) ** 2, axis=1))

    keys = jax.random.split(key, len(times))
    squares = [float(square(k, jnp.float32(t))) for k, t in zip(keys, times, strict=True)]
    return float(np.trapezoid(squares, times))


def draw_pairs(config: Config, pair: str, seed: int, num_batches: int) -> tuple[Any, Any]:
    sigma = toy_data.DEVIATIONS[toy_data.PAIRS[pair].source]
    train, _ = toy_data.split(pair, config.seed, config.num_train, 1)
    chunks = toy_data.batches(
        pair, (seed,), [train], toy_data.independent,
        num_steps=num_batches, chunk_steps=num_batches, batch_size=config.batch_size,
    )  # fmt: skip
    x0, x1 = next(toy_bridges.entropic((seed,), chunks, sigma))
    return jnp.reshape(x0, (-1, 2)), jnp.reshape(x1, (-1, 2))


def measure(config: Config, pair: str) -> dict[str, Any]:
    path = fm.brownian_bridge(toy_data.DEVIATIONS[toy_data.PAIRS[pair].source])
    x0, x1 = draw_pairs(config, pair, config.seed, config.num_batches)
    points = draw_pairs(config, pair, config.seed + 1000, config.num_points)
    distance = toy_data.squared_distance(
        toy_data.PAIRS[pair], toy_data.generator(pair, 0, 2), num_draws=config.reference_draws
    ).value
    few, key = len(x0) // 4, jax.random.key(config.seed)
    energies = [
        energy(key, path, velocity(path, x0[:num], x1[:num]), *points) for num in (few, len(x0))
    ]
    return {"pair": pair, "energy_of_a_quarter": energies[0], "energy": energies[1]} | {
        "squared_distance": distance
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each pair."""
    lines = ["| pair | NPE of the bridge | from a quarter of the pairs |", "|---|---|---|"]
    for row in record["pairs"]:
        few, all_ = (
            row[k] / row["squared_distance"] - 1 for k in ("energy_of_a_quarter", "energy")
        )
        lines.append(f"| {row['pair']} | {all_:.2f} | {few:.2f} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    pairs = [measure(config, pair) for pair in toy_data.PAIRS]
    record = {"pairs": pairs, "versions": environment()["versions"]}
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.bridge_energy", doc=__doc__)
