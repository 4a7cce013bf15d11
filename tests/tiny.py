"""The smallest task that has everything: a linear velocity with three classes, in milliseconds.

`python -m tiny` trains it. What a test wants to happen at a step it does by the flags, or by a
callable in `BEFORE`, which gets the number of the batches that were read before.
"""

import dataclasses
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import data, harness
from fmjax.harness.task import Samples, Task

NUM, HELD_OUT, CLASSES = 60, 40, 3
BEFORE = []  # called in turn before a batch is read


@dataclasses.dataclass(frozen=True)
class Config(harness.RunConfig):
    """A linear velocity."""

    num_steps: int = 25
    batch_size: int = 16
    checkpoint_every: int = 10
    log_every: int = 10
    learning_rate: float = 1e-2
    ema_decay: float = 0.9
    dim: int = 2
    """Columns."""
    source: pathlib.Path | None = None
    """x.npy to be mapped, or a folder of ArrayRecord files; the points in memory without it."""
    rounds: int | None = None
    """Of a loop that keeps the device busy; 2^31 - 1 take minutes."""
    unrolled: int | None = None
    """Operations that keep the compiler busy."""


class Batch(NamedTuple):
    x1: np.ndarray
    labels: np.ndarray


def points(dim=2, num=NUM, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, dim)) + np.arange(dim)).astype(np.float32)


def of_bytes(record):
    return np.frombuffer(record, np.float32)


def read(config):
    """`rows -> x1`, from where the flags say."""
    if config.source is None:
        return lambda rows: points(config.dim)[rows]
    if config.source.suffix == ".npy":
        return data.from_source(np.load(config.source, mmap_mode="r"))
    from array_record.python import array_record_data_source

    files = sorted(map(str, config.source.glob("*.array_record")))
    return data.from_source(array_record_data_source.ArrayRecordDataSource(files), of_bytes)


def velocity(params, labels=None):
    """x W + b_t t + c, with the row of c that is the class's; the last is none's."""

    def u(t, x):
        t = jnp.broadcast_to(t, x.shape[:1])[:, None]
        null = jnp.full(len(x), CLASSES) if labels is None else labels
        return x @ params["w"] + params["b"][None] * t + params["c"][null]

    return u


def draw(key, batch):
    key_x0, key_t, key_label = jax.random.split(key, 3)
    x0 = jax.random.normal(key_x0, batch.x1.shape)
    labels = fm.drop_labels(key_label, batch.labels, CLASSES, 0.3)
    return fm.sample_path(fm.cond_ot(), x0, batch.x1, fm.uniform(key_t, (len(x0),))), labels


def loss(params, key, drawn):
    """With a little noise on the parameters, so that the second key counts."""
    path_sample, labels = drawn
    noise = 0.1 * jax.random.normal(key, params["b"].shape)
    return fm.cfm_loss(velocity(params | {"b": params["b"] + noise}, labels), path_sample)


def init_params(dim, key):
    keys = jax.random.split(key, 3)
    shapes = {"w": (dim, dim), "b": (dim,), "c": (CLASSES + 1, dim)}
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def picture(params):
    """uint8 [6, 5, 3], of the parameters' digits."""
    flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])
    return np.resize(np.uint8(np.abs(np.asarray(flat)) * 100 % 256), (6, 5, 3))


def make_task(config):
    batch_of, held_out, count = read(config), points(config.dim, HELD_OUT, 1), itertools.count()

    def batch(rows):
        done = next(count)
        for act in BEFORE:
            act(done)
        return Batch(batch_of(rows), (rows % CLASSES).astype(np.int32))

    def slow_loss(params, key, drawn):
        losses = loss(params, key, drawn)
        for k in range(config.unrolled or 0):
            losses = losses + 1e-9 * jnp.sin(losses[:, None] * jnp.arange(8.0 + k % 50)).sum(1)
        body = lambda _, x: jnp.cos(x)  # noqa: E731
        return losses + 0.0 * jax.lax.fori_loop(
            0, config.rounds or 0, body, jax.lax.stop_gradient(losses)
        )

    init, step = harness.from_loss(
        draw,
        slow_loss if config.rounds or config.unrolled else loss,
        harness.optimizer(config),
        lambda key: init_params(config.dim, key),
        ema_decay=config.ema_decay,
    )
    return Task(
        num_examples=NUM,
        batch=batch,
        init=init,
        step=step,
        velocity=velocity,
        preview=lambda trained, key: picture(trained.params),
        samples=Samples(
            fm.standard_normal((config.dim,)),
            lambda x1: {"x": x1},
            condition=lambda rows: (rows % CLASSES).astype(np.int32),
            null=CLASSES,
            num_classes=CLASSES,
        ),
        num_held_out=HELD_OUT,
        held_out=lambda rows: Batch(held_out[rows], (rows % CLASSES).astype(np.int32)),
    )


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
