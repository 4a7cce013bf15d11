"""Populations of cells at several times: is the one that was left out predicted?

    python -m experiments.single_cell --data emt.csv --leave-out 1 --coupling minibatch_ot

Any .npz of (pcs, sample_labels) will do. I-CFM pairs the cells of neighbouring times independently,
OT-CFM by `minibatch_ot` within the batch; `fmjax.tasks.snapshots` says the protocol. The summary
holds the 1-Wasserstein distance between the predicted cells and those that are there.
"""

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp

import fmjax as fm
from fmjax import harness, models
from fmjax.harness.config import mesh
from fmjax.harness.task import Trained
from fmjax.tasks import snapshots
from fmjax.training import sharding

COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}


@dataclasses.dataclass(frozen=True)
class Config(snapshots.SnapshotConfig):
    """Flow matching between snapshots of a population."""

    coupling: Literal["independent", "minibatch_ot"] = "minibatch_ot"
    """How the cells of neighbouring times are paired within a batch."""
    num_steps: int = 5000
    batch_size: int = 256
    learning_rate: float = 1e-3
    ema_decay: float = 0.99
    checkpoint_every: int = 5000
    cpu_threads: int | None = 1


def make_task(config: Config) -> harness.Task:
    data = snapshots.open_snapshots(config)
    model = models.MLP(**dataclasses.asdict(config.model))
    x, ts = snapshots.in_step(data, config.seed), jnp.asarray(data.ts[data.trained_on], jnp.float32)

    def draw(key, x):
        """All that is random in a step, over the global batch."""
        x = jax.lax.with_sharding_constraint(x, sharding.replicated(mesh(config)))
        return snapshots.sample_intervals(key, x, ts, COUPLINGS[config.coupling], config.sigma)

    def loss(params, key, path_sample):
        return fm.cfm_loss(velocity(params), path_sample)

    def velocity(params, condition=None):
        return functools.partial(model.apply, params)

    def finish(trained: Trained, folder: pathlib.Path, key: jax.Array) -> dict[str, Any]:
        params = sharding.gathered(trained.params)
        return snapshots.left_out_figures(data, velocity(params))

    init, step = harness.from_loss(
        draw,
        loss,
        harness.adam(config),
        lambda key: model.init(key, jnp.zeros(()), jnp.zeros((1, x.shape[-1]))),
        ema_decay=config.ema_decay,
    )
    return harness.Task(
        num_examples=len(x),
        batch=lambda rows: x[rows],
        init=init,
        step=step,
        velocity=velocity,
        finish=finish,
        data=lambda: data.facts,
    )


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
