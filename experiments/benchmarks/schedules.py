"""What a change of schedule and an SDE solve cost beside the same loops written by hand.

    python -m experiments.benchmarks.schedules

Points in the plane, 50 equal Euler steps of a batch of 4,096, compiled; medians of interleaved
repetitions, and of their paired ratios.

    change_path   the flow of an MLP as if trained along `cosine()`, solved along `cond_ot()`
                  by `change_path`, against the flow of the MLP itself. Both call it 50 times.
    sample_sde    Langevin samples (eta = 1) of the same network along `cond_ot()`, against a
                  `lax.scan` of the same steps with `jax.random.normal`.

The networks have random parameters: what they compute takes the same time. Width 0 is no network
but the closed form of a flow to a Gaussian: what is added shows there, in microseconds for each of
the 50 evaluations.

On two cores of a shared server: about a minute.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import models
from fmjax.harness import command
from fmjax.harness.records import environment, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """A change of schedule and an SDE solve against loops written by hand."""

    batch: int = 4096
    """2-D points."""
    num_steps: int = 50
    """Equal Euler steps."""
    widths: tuple[int, ...] = (0, 64, 256)
    """Of the three layers of the MLPs; 0 for a closed form."""
    repetitions: int = 21
    """Timed solves of each kind; the median counts."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/schedules.json."""


def network(width: int) -> fm.Velocity:
    if width == 0:
        return lambda t, x: (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * x
    model = models.MLP(features=(width,) * 3)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 2)))
    return functools.partial(model.apply, params)


def scanned_sde(
    key: jax.Array, velocity: fm.Velocity, x0: jax.Array, num_steps: int, eta: float = 1.0
) -> jax.Array:
    """Euler's steps of the Langevin SDE along cond_ot, as one would write them by hand."""
    h = 1 / num_steps

    def step(x: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        t = k * h
        u = velocity(t, x)
        noise = jax.random.normal(jax.random.fold_in(key, k), x.shape)
        x = x + h * (u + eta * (t * u - x)) + jnp.sqrt(2 * eta * (1 - t) * h) * noise
        return x, None

    return jax.lax.scan(step, x0, jnp.arange(num_steps))[0]


def cases(config: Config, width: int) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """The pairs of compiled functions `(key, x0)`: ours, and what it is held against."""
    velocity, n = network(width), config.num_steps
    straight, changed = fm.cond_ot(), fm.change_path(velocity, fm.cosine(), fm.cond_ot())
    drift = fm.langevin_drift(straight, velocity, 1.0)
    diffusion = fm.langevin_diffusion(straight, 1.0)

    def flow(velocity: fm.Velocity) -> Callable[..., Any]:
        solver = diffrax.Euler()
        return jax.jit(lambda key, x0: fm.integrate(velocity, x0, solver=solver, num_steps=n))

    def sde(key: jax.Array, x0: jax.Array) -> jax.Array:
        return fm.sample_sde(key, drift, diffusion, x0, num_steps=n)

    by_hand = jax.jit(lambda key, x0: scanned_sde(key, velocity, x0, n))
    return {"change_path": (flow(changed), flow(velocity)), "sample_sde": (jax.jit(sde), by_hand)}


def measure(config: Config, width: int) -> dict[str, dict[str, float]]:
    x0, key = jax.random.normal(jax.random.key(1), (config.batch, 2)), jax.random.key(2)
    rows = {}
    for name, pair in cases(config, width).items():
        evaluations = [getattr(f(key, x0), "num_evaluations", config.num_steps) for f in pair]
        if evaluations[0] != evaluations[1]:
            raise RuntimeError(f"{name} made {evaluations[0]} calls against {evaluations[1]}.")
        seconds: list[list[float]] = []
        for _ in range(config.repetitions):
            seconds.append([_timed(f, key, x0) for f in pair])
        ours, theirs = np.asarray(seconds).T
        rows[name] = {
            "ours_ms": 1e3 * float(np.median(ours)),
            "by_hand_ms": 1e3 * float(np.median(theirs)),
            "ratio": float(np.median(ours / theirs)),
            "added_us": 1e6 * float(np.median(ours - theirs)) / int(evaluations[0]),
            "evaluations": int(evaluations[0]),
        }
    return rows


def _timed(function: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def table(record: dict[str, Any]) -> str:
    lines = ["| row | network | fmjax | by hand | ratio | added per evaluation |"]
    lines += ["|---|---|---|---|---|---|"]
    for width, rows in record["rows"].items():
        for name, row in rows.items():
            lines.append(
                f"| `{name}` | {'closed form' if width == '0' else f'MLP, 3 x {width}'} | "
                f"{row['ours_ms']:.1f} ms | {row['by_hand_ms']:.1f} ms | {row['ratio']:.2f} | "
                f"{row['added_us']:.0f} µs |"
            )
    return "\n".join(lines) + "\n"


def main(config: Config) -> dict[str, Any]:
    rows = {str(width): measure(config, width) for width in config.widths}
    record = {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
    record |= {"rows": rows} | environment()
    print(table(record), end="")
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.schedules", doc=__doc__)
