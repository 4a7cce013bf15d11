"""Populations of cells at several times: is the one that was left out predicted?

    python -m experiments.single_cell --data emt.csv --leave-out 1 --method ot-cfm

Any .npz of (pcs, sample_labels) will do; `fmjax.tasks.intervals` says the protocol. The methods:

    i-cfm           cells of neighbouring times paired independently; one velocity, on lines
    ot-cfm          paired within the batch by exact optimal transport
    unbalanced      pairs of a plan between whole snapshots, in which earlier cells may grow or die
    sf2m-exact      pairs as in ot-cfm; two fields, on Brownian bridges
    sf2m-entropic   pairs of the entropic plan between whole snapshots at epsilon = 2 sigma^2

The summary holds the 1-Wasserstein distance between the predicted cells and those that are there:
of the flow, of the SDE for bridges, and with the cells weighted by what they grew to for unbalanced
pairs. `experiments.benchmarks.single_cell` trains all of them over seeds.
"""

import dataclasses
import math
import pathlib
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np

import fmjax as fm
from fmjax import harness, models, plotting
from fmjax.harness.config import mesh
from fmjax.harness.pods import cluster
from fmjax.harness.task import Trained
from fmjax.tasks import intervals, snapshot_figures, snapshot_plans, snapshots
from fmjax.training import sharding

PLANNED = ("unbalanced", "sf2m-entropic")


@dataclasses.dataclass(frozen=True)
class Config(snapshots.SnapshotConfig):
    """Flow matching between snapshots of a population."""

    method: Literal["i-cfm", "ot-cfm", "unbalanced", "sf2m-exact", "sf2m-entropic"] = "ot-cfm"
    """How cells of neighbouring times are paired, and what is learned."""
    sigma: float | None = None
    """Noise, in the unit of the coordinates: on lines 0.1, of bridges 0.5 without it."""
    epsilon: float = 0.5
    """Entropy of the unbalanced plan, in units of |x0 - x1|^2."""
    tau: float = 5.0
    """What it costs there to change a cell's weight, likewise."""
    plan_cells: int = 1000
    """Cells of a time, at most, between which plans are solved."""
    num_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.99
    checkpoint_every: int = 5000
    cpu_threads: int | None = 1


def make_pairs(config: Config, data: snapshots.Snapshots) -> tuple[np.ndarray, Any]:
    """Pairs to draw batches from, and what the cells before the left-out time grew to, or None."""
    if config.method not in PLANNED:
        return snapshots.in_step(data, config.seed), None
    entropic = config.method == "sf2m-entropic"
    cost = (2 * noise(config) ** 2, math.inf) if entropic else (config.epsilon, config.tau)
    num, most = 32 * data.facts["num_examples"], config.plan_cells
    pairs, grown = snapshot_plans.planned(data, *cost, most=most, num=num, seed=config.seed)
    return pairs, None if entropic else grown


def make_method(config: Config, data: snapshots.Snapshots, model: nn.Module) -> intervals.Method:
    coupling = fm.minibatch_ot if config.method in ("ot-cfm", "sf2m-exact") else fm.independent
    coupling = fm.independent if config.method in PLANNED else intervals.shuffled(coupling)
    learn = intervals.on_bridges if config.method.startswith("sf2m") else intervals.on_lines
    return learn(data, model, coupling, noise(config))


def noise(config: Config) -> float:
    usual = 0.5 if config.method.startswith("sf2m") else 0.1
    return usual if config.sigma is None else config.sigma


def make_task(config: Config) -> harness.Task:
    data = snapshots.open_snapshots(config)
    method = make_method(config, data, models.MLP(**dataclasses.asdict(config.model)))
    x, grown = make_pairs(config, data)

    def draw(key, x):
        """All that is random in a step, over the global batch."""
        return method.draw(key, jax.lax.with_sharding_constraint(x, replicated))

    def finish(trained: Trained, folder: pathlib.Path, key: jax.Array) -> dict[str, Any]:
        params = sharding.gathered(trained.params)
        if x.shape[-1] == 2 and cluster.is_main():
            picture = snapshot_figures.draw_ways(data, method.velocity(params))
            plotting.save(folder / "samples" / f"step_{trained.step:08d}.png", picture)
        return intervals.left_out_figures(data, jax.jit(method.moved)(params, key), grown)

    replicated = sharding.replicated(mesh(config))
    init, step = harness.from_loss(
        draw,
        lambda params, key, sample: method.loss(params, sample),
        harness.adam(config),
        method.init,
        ema_decay=config.ema_decay,
    )
    return harness.Task(
        num_examples=len(x),
        batch=lambda rows: x[rows],
        init=init,
        step=step,
        velocity=lambda params, condition: method.velocity(params),
        finish=finish,
        data=lambda: data.facts,
    )


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
