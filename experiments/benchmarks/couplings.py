"""What a coupling costs and what it buys, in the plane; and speeds beside POT's.

    python -m experiments.benchmarks.couplings

A standard normal is paired with eight Gaussians on a circle of radius 5 (`toy_data`), in pools of n
points that are cut into batches of 256 for training; from all pools together 8,192 pairs.

    cost       mean |x0 - x1|^2 of the pairs
    curvature  mean over the flow's paths of int_0^1 |v|^2 dt - |x(1) - x(0)|^2, which is zero for
               straight ones; of a 3 x 64 MLP after 2,000 steps
    entropy    renormalised, of the plan of a pool: 0 for a permutation, 1 for independent pairs
    ms         to pair one pool, on the CPU; for semidiscrete pairs n fresh x0, g being solved once

The second table times `fmjax.minibatch_ot` against POT's `emd` (with its costs), and
`fmjax.sinkhorn` against POT's `sinkhorn`, which returns the plan and draws nothing, both stopped
where the marginals are wrong by 1e-3 in sum, or less. Medians of interleaved repetitions, after
compilation; both on all cores.

On two cores of a shared server that did other work: six minutes.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import in_turn, toy_data, toy_flows
from fmjax import couplings, training
from fmjax.harness import command
from fmjax.harness.records import environment, write_json

TARGET = toy_data.ring(5.0, 1.0)
NUM_PAIRS, BATCH = 8192, 256
LARGE = 2048  # at pools above, epsilons below 0.5 are left out: minutes each


@dataclasses.dataclass(frozen=True)
class Config:
    """Couplings: cost, curvature, entropy and milliseconds, and POT beside them."""

    pools: tuple[int, ...] = (128, 1024, 4096)
    """Points that are paired in one go."""
    epsilons: tuple[float, ...] = (2.0, 0.5, 0.1)
    """Of Sinkhorn's in the first table, in units of |x0 - x1|^2."""
    num_steps: int = 2000
    """Training steps for the curvature."""
    dims: tuple[int, ...] = (2, 3072)
    """Dimensions of the normal points that the exact pairings are timed on."""
    sweep: tuple[float, ...] = (8.0, 2.0, 0.5, 0.2, 0.1)
    """Epsilons of the second table, at n = 1024 in the plane."""
    repetitions: int = 3
    """Timed pairings of each kind; the median counts."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/couplings.json."""


def ways_to_pair(epsilons: Sequence[float]) -> dict[str, fm.Coupling]:
    made = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
    return made | {f"sinkhorn({epsilon:g})": fm.sinkhorn(epsilon) for epsilon in epsilons}


def pools(num: int) -> tuple[jax.Array, jax.Array]:
    """x0 and x1, `[num_pools, num, 2]`, the same points whatever their number."""
    rng = np.random.default_rng(0)
    x0, x1 = toy_data.gaussian(rng, NUM_PAIRS), TARGET(rng, NUM_PAIRS)
    x0, x1 = (jnp.asarray(x.reshape(-1, num, 2), jnp.float32) for x in (x0, x1))
    return x0, x1


@functools.partial(jax.jit, static_argnums=2)
def curvature(x0: jax.Array, x1: jax.Array, num_steps: int) -> jax.Array:
    """Of the flow trained on these pairs, `[num, 2]` each: the mean excess of the path energy."""
    key_init, key_steps, key_eval = jax.random.split(jax.random.key(0), 3)

    def loss_fn(params: Any, key: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        path_sample = fm.sample_path(fm.cond_ot(), *batch, fm.uniform(key, batch[0].shape[:1]))
        velocity = functools.partial(toy_flows.MODEL.apply, params)
        return jnp.mean(fm.cfm_loss(velocity, path_sample))

    train_step = training.make_train_step(loss_fn, toy_flows.TX, ema_decay=0.995)

    def step(state: training.TrainState, k: jax.Array) -> tuple[training.TrainState, None]:
        rows = jax.random.randint(jax.random.fold_in(key_steps, k), (BATCH,), 0, len(x0))
        return train_step(state, key_steps, (x0[rows], x1[rows]))[0], None

    state, _ = jax.lax.scan(step, toy_flows.init(key_init), jnp.arange(num_steps))
    start = jax.random.normal(key_eval, (2048, 2))
    solved = toy_flows.solve(functools.partial(toy_flows.MODEL.apply, state.ema_params), start)
    end = solved[-1]
    return jnp.mean(end[:, 2] - jnp.sum(jnp.square(end[:, :2] - start), axis=1))


def plane(config: Config, num: int) -> list[dict[str, Any]]:
    """A row for each coupling, in pools of `num`."""
    x0, x1 = pools(num)
    epsilons = [e for e in config.epsilons if num <= LARGE or e >= 0.5]
    key, ways = jax.random.key(1), {}
    pairs: dict[str, tuple[jax.Array, jax.Array]] = {}
    entropies = {"independent": 1.0, "minibatch_ot": 0.0, "semidiscrete": None}
    for name, coupling in ways_to_pair(epsilons).items():
        pair = jax.jit(coupling)
        paired = [
            pair(jax.random.fold_in(key, k), *pool)
            for k, pool in enumerate(zip(x0, x1, strict=True))
        ]
        pairs[name] = jnp.concatenate(paired), x1.reshape(-1, 2)
        ways[name] = functools.partial(pair, key, x0[0], x1[0])
    for epsilon in epsilons:
        plan = jax.jit(functools.partial(couplings.entropic_plan, epsilon=epsilon))(x0[0], x1[0])
        entropies[f"sinkhorn({epsilon:g})"] = float(couplings.coupling_entropy(plan))
    source = fm.standard_normal((2,))
    solve = jax.jit(lambda y: couplings.semidiscrete_potential(key, y, source, num_steps=4000))
    assignment = jax.jit(couplings.semidiscrete(solve(x1[0]), x1[0]))
    flat = x0.reshape(-1, 2)
    pairs["semidiscrete"] = flat, x1[0][assignment(key, flat)]
    ways["semidiscrete"] = functools.partial(assignment, key, x0[0])
    milliseconds = in_turn.medians(ways, config.repetitions)
    rows = []
    for name, (start, end) in pairs.items():
        row = {"coupling": name, "n": num, "cost": float(jnp.mean(jnp.sum((start - end) ** 2, 1)))}
        row["curvature"] = float(curvature(start, end, config.num_steps))
        rows.append(row | {"entropy": entropies[name], "ms": milliseconds[name]})
    return rows


def exact_speeds(config: Config, num: int, dim: int) -> dict[str, Any]:
    """`minibatch_ot` and POT's exact transport on normal points, and what both plans cost."""
    import ot

    rng = np.random.default_rng(num)
    x0, x1 = rng.standard_normal((2, num, dim), np.float32)
    pair = jax.jit(functools.partial(fm.minibatch_ot, jax.random.key(0)))
    args = jnp.asarray(x0), jnp.asarray(x1)

    def emd() -> np.ndarray:
        return np.asarray(ot.emd([], [], ot.dist(x0, x1), numItermax=10**9))

    found = in_turn.medians({"fmjax": lambda: pair(*args), "pot": emd}, config.repetitions)
    cost = np.square(np.asarray(pair(*args), np.float64) - x1).sum(1).mean()
    rows, columns = np.nonzero(emd())
    theirs = np.square(x0[rows].astype(np.float64) - x1[columns]).sum(1).mean()
    what = f"exact, n = {num}, {dim}-D"
    return {"what": what, **found, "cost": float(cost), "cost_pot": float(theirs)}


def entropic_speeds(config: Config, num: int = 1024) -> list[dict[str, Any]]:
    """`sinkhorn` and POT's at every epsilon, and the exact pairing of the same points."""
    import ot

    x0, x1 = (x[0] for x in pools(num))
    a = np.full(num, 1 / num)
    rows, key = [], jax.random.key(0)
    exact = jax.jit(functools.partial(fm.minibatch_ot, key))
    for epsilon in config.sweep:
        pair = jax.jit(functools.partial(fm.sinkhorn(epsilon, max_iterations=20_000), key))

        def pot(epsilon: float = epsilon) -> np.ndarray:
            # It stops at the Euclidean norm of the error, which is this much smaller.
            limit = 1e-3 / np.sqrt(num)
            cost = ot.dist(np.asarray(x0, np.float64), np.asarray(x1, np.float64))
            plan = ot.sinkhorn(a, a, cost, epsilon, stopThr=limit, numItermax=20_000)
            return np.asarray(plan)

        ways = {
            "fmjax": functools.partial(pair, x0, x1),
            "pot": pot,
            "exact": lambda: exact(x0, x1),
        }
        found = in_turn.medians(ways, config.repetitions)
        rows.append({"what": f"Sinkhorn, epsilon {epsilon:g}, n = {num}, 2-D", **found})
    return rows


def table(record: dict[str, Any]) -> str:
    """The first table as Markdown."""
    lines = ["| coupling | n | cost | curvature | entropy | ms |", "|---|---|---|---|---|---|"]
    for row in record["plane"]:
        entropy = "-" if row["entropy"] is None else f"{row['entropy']:.2f}"
        cells = [row["coupling"], f"{row['n']:,}", f"{row['cost']:.2f}", f"{row['curvature']:.3f}"]
        lines.append("| " + " | ".join([*cells, entropy, f"{row['ms']:.3g}"]) + " |")
    return "\n".join(lines)


def speeds(record: dict[str, Any]) -> str:
    """The second table as Markdown."""
    lines = ["| pairing | fmjax, ms | POT, ms | ratio | exact, ms |", "|---|---|---|---|---|"]
    for row in record["speeds"]:
        ratio, exact = f"{row['pot'] / row['fmjax']:.2f}x", row.get("exact")
        cells = [row["what"], f"{row['fmjax']:,.4g}", f"{row['pot']:,.4g}", ratio]
        lines.append("| " + " | ".join([*cells, "-" if exact is None else f"{exact:,.4g}"]) + " |")
    return "\n".join(lines)


def main(config: Config) -> dict[str, Any]:
    record: dict[str, Any] = environment() | {"cpu_count": os.cpu_count()}
    record["config"] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    record["plane"] = [row for num in config.pools for row in plane(config, num)]
    print(table(record))
    sizes = [(num, dim) for dim in config.dims for num in config.pools]
    record["speeds"] = [exact_speeds(config, *size) for size in sizes]
    record["speeds"] += entropic_speeds(config)
    print(speeds(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.couplings", doc=__doc__)
