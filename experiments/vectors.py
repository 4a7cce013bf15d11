"""A table of one's own: samples and densities of its rows, in their own units.

    python -m experiments.vectors --data measurements.csv --condition temperature

Columns are standardised; `--condition` names those that are given and not modelled. The run folder
holds a corner plot of held-out rows and samples.
"""

import dataclasses
import functools

import jax

import fmjax as fm
from fmjax import harness
from fmjax.tasks import choices, vectors


@dataclasses.dataclass(frozen=True)
class Config(vectors.VectorConfig, choices.Choices):
    """Flow matching on the rows of a table."""

    num_steps: int = 4000
    batch_size: int = 256
    learning_rate: float = 1e-3
    ema_decay: float = 0.995
    checkpoint_every: int = 2000
    preview_every: int = 1000


def make_task(config: Config) -> harness.Task:
    table = vectors.open_vectors(config)
    model, (path, coupling, times) = vectors.make_mlp(config), choices.choose(config)

    def draw(key, rows):
        """All that is random in a step, over the global batch."""
        key_x0, key_pair, key_t, key_condition = jax.random.split(key, 4)
        x0 = coupling(key_pair, jax.random.normal(key_x0, rows.x.shape), rows.x)
        t = times(key_t, rows.x.shape[:1])
        condition = vectors.drop_condition(config, key_condition, rows.condition)
        return fm.sample_path(path, x0, rows.x, t), condition

    def loss(params, key, drawn):
        path_sample, condition = drawn
        return fm.cfm_loss(vectors.velocity_of(model, params, condition), path_sample)

    init_params = functools.partial(vectors.init_params, model, table)
    init, step = harness.from_loss(
        draw, loss, harness.optimizer(config), init_params, ema_decay=config.ema_decay
    )
    return vectors.make_task(config, table, model, init, step)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
