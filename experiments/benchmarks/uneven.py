"""Own step sizes against the shared step, on batches whose examples need unequal work.

    python -m experiments.benchmarks.uneven

Every example's first two coordinates are turned at the rate r exp(-k (x_1^2 + x_2^2)), on top of a
network's velocity, so that the examples near the origin need several times as many steps as those
far out. A 2-D MLP and a small U-Net on 8x8x1 images, both with random parameters; Tsit5, tolerance
1e-5. Three ways to solve the batch:

    shared step   `fm.integrate`: one step for all, the error measured over the whole batch
    vmap          `jax.vmap` of `fm.integrate` at batch 1: own steps, in lock-step
    lanes         `fmjax.solve.integrate_each`: own steps, an eighth of the batch in parallel

"needed" is the sum over the examples of what each one, solved by itself, evaluates; "made" is what
the batch evaluated, idle examples included; waste = 1 - needed / made. Seconds are medians of
interleaved repetitions, after compilation. The error is the largest and the median, over the
examples, of the distance to a float64 solve at tolerance 1e-8.

On two cores of a shared server: about three minutes.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import in_turn
from fmjax import models
from fmjax.harness import command
from fmjax.harness.records import environment, write_json
from fmjax.solve import each


@dataclasses.dataclass(frozen=True)
class Config:
    """Own step sizes against the shared step."""

    num_points: int = 1024
    """2-D points in the first batch."""
    num_images: int = 32
    """8x8x1 images in the second."""
    rate: float = 30.0
    """Rate r of the turn at the origin, in radians."""
    fall: float = 1.0
    """How fast that rate falls with the distance: k."""
    repetitions: int = 5
    """Timed solves of each kind; the median counts."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/uneven.json."""


def with_turn(network: Any, params: Any, config: Config) -> fm.Velocity:
    """The network's velocity, and the first two coordinates turned at the rate of their radius."""

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        u = network.apply(params, t, x).reshape(len(x), -1)
        pair = x.reshape(len(x), -1)[:, :2]
        square = jnp.sum(pair**2, axis=1, keepdims=True)
        rate = config.rate * jnp.exp(-config.fall * square)
        turn = rate * jnp.stack([-pair[:, 1], pair[:, 0]], axis=1)
        return u.at[:, :2].add(turn).reshape(x.shape)

    return velocity


def problems(config: Config) -> dict[str, tuple[fm.Velocity, jax.Array]]:
    """A velocity and a batch each."""
    key_params, key_noise, key_x0 = jax.random.split(jax.random.key(0), 3)
    points = (config.num_points, 2)
    images = (config.num_images, 8, 8, 1)
    mlp = models.MLP(features=(64, 64, 64))
    # A small time_scale: at random parameters the embedding would be what is stiff.
    unet = models.UNet(
        channels=16,
        channel_multipliers=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        time_scale=10.0,
    )
    made = {}
    for name, network, shape in (
        (f"MLP, {points[0]} points", mlp, points),
        (f"U-Net, {images[0]} images 8x8x1", unet, images),
    ):
        params = network.init(key_params, jnp.zeros(()), jnp.zeros((1, *shape[1:])))
        leaves, tree = jax.tree.flatten(params)
        # An untrained U-Net is zero.
        keys = jax.random.split(key_noise, len(leaves))
        leaves = [
            leaf + 0.02 * jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        params = jax.tree.unflatten(tree, leaves)
        x0 = jax.random.normal(key_x0, shape)
        made[name] = (with_turn(network, params, config), x0)
    return made


def exact(velocity: fm.Velocity, x0: jax.Array) -> np.ndarray:
    """The end points to 1e-8, in float64."""
    with jax.enable_x64(True):
        tight = diffrax.PIDController(rtol=1e-8, atol=1e-8)
        solve = jax.jit(lambda x: each.sample_each(velocity, x, stepsize_controller=tight))
        return np.asarray(solve(jnp.asarray(np.asarray(x0), jnp.float64)))


def solves(velocity: fm.Velocity) -> dict[str, Callable[[jax.Array], Any]]:
    """Each returns (x1, evaluations of every example or of all, calls or None)."""

    def shared(x0: jax.Array) -> tuple[jax.Array, jax.Array]:
        solved = fm.integrate(velocity, x0)
        return solved.x[-1], solved.num_evaluations

    def alone(x0: jax.Array) -> tuple[jax.Array, jax.Array]:
        x1, num_evaluations = shared(x0[None])
        return x1[0], num_evaluations

    return {
        "shared step": jax.jit(shared),
        "vmap": jax.jit(jax.vmap(alone)),
        "lanes": jax.jit(functools.partial(each.integrate_each, velocity)),
    }


def measure(velocity: fm.Velocity, x0: jax.Array, config: Config) -> list[dict[str, Any]]:
    """A row for each way to solve the batch."""
    ways = solves(velocity)
    results = {name: jax.block_until_ready(solve(x0)) for name, solve in ways.items()}
    calls = {name: functools.partial(solve, x0) for name, solve in ways.items()}
    times = in_turn.medians(calls, config.repetitions)
    num_lanes, batch = max(1, len(x0) // 8), len(x0)
    needed = int(results["vmap"][1].sum())
    made = {
        "shared step": batch * int(results["shared step"][1]),
        "vmap": batch * int(results["vmap"][1].max()),
        "lanes": num_lanes * int(results["lanes"].num_calls),
    }
    own = {"vmap": needed, "lanes": int(results["lanes"].num_evaluations.sum())}
    end, rows = exact(velocity, x0), []
    for name, result in results.items():
        off = np.linalg.norm((np.asarray(result[0], np.float64) - end).reshape(batch, -1), axis=1)
        errors = {"worst": float(off.max()), "median": float(np.median(off))}
        row = {
            "way": name,
            "needed": own.get(name),
            "made": made[name],
            "seconds": times[name] / 1e3,
        }
        rows.append(row | {"error": errors})
    return rows


def table(record: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    lines = [
        "| batch | steps | evaluations needed | made | waste | seconds "
        "| µs per evaluation made | worst error | median error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in record["problems"].items():
        for row in rows:
            needed, made, error = row["needed"], row["made"], row["error"]
            waste = "-" if needed is None else f"{1 - needed / made:.0%}"
            cells = [name, row["way"], "-" if needed is None else f"{needed:,}", f"{made:,}", waste]
            cells += [f"{row['seconds']:.3f}", f"{1e6 * row['seconds'] / made:.2f}"]
            cells += [f"{error['worst']:.1e}", f"{error['median']:.1e}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config: Config) -> dict[str, Any]:
    record: dict[str, Any] = environment() | {"cpu_count": os.cpu_count()}
    record["config"] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    record["problems"] = {
        name: measure(velocity, x0, config) for name, (velocity, x0) in problems(config).items()
    }
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.uneven", doc=__doc__)
