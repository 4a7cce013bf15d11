"""Populations of cells at several times: is the one that was left out predicted?

    python -m experiments.single_cell --data emt.csv --leave-out 1 --method ot-cfm

Any .npz of (pcs, sample_labels) will do. `fmjax.tasks.snapshot_methods` lists the methods,
`fmjax.tasks.intervals` says the protocol.

The summary holds the 1-Wasserstein distance between the predicted cells and those that are there:
of the flow, of the SDE for bridges, and with the cells weighted by what they grew to for unbalanced
pairs. `experiments.benchmarks.single_cell` trains all of them over seeds.
"""

import dataclasses
import pathlib
from typing import Any

import jax

from fmjax import harness, models, plotting
from fmjax.harness.config import mesh
from fmjax.harness.pods import cluster
from fmjax.harness.task import Trained
from fmjax.tasks import intervals, snapshot_figures, snapshot_methods, snapshots
from fmjax.training import sharding


@dataclasses.dataclass(frozen=True)
class Config(snapshot_methods.MethodConfig):
    """Flow matching between snapshots of a population."""

    num_steps: int = 5000
    batch_size: int = 128
    learning_rate: float = 1e-3
    ema_decay: float = 0.99
    checkpoint_every: int = 5000
    cpu_threads: int | None = 1


def make_task(config: Config) -> harness.Task:
    data = snapshots.open_snapshots(config)
    model = models.MLP(**dataclasses.asdict(config.model))
    method = snapshot_methods.make_method(config, data, model)
    x, grown = snapshot_methods.make_pairs(config, data)

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
        harness.optimizer(config),
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
