"""What an image run draws and measures at its end, and on the way: samples, bits/dim, previews."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import plotting
from fmjax.data import pixels
from fmjax.evaluation.errors import standard_error
from fmjax.harness.config import mesh
from fmjax.harness.pods import cluster
from fmjax.harness.start import say
from fmjax.harness.task import Trained, guided
from fmjax.tasks.image_data import Images, Pictures, rows_of
from fmjax.training import sharding

VelocityOf = Callable[[Any, Any], fm.Velocity]  # (params, labels) -> velocity
FRAMES = 25  # of the animation


def finish(
    pictures: Pictures,
    velocity_of: VelocityOf,
    trained: Trained,
    folder: pathlib.Path,
    key: jax.Array,
) -> dict[str, Any]:
    """Samples and bits/dim, each unless its flag is 0."""
    key_x0, key_eval = jax.random.split(key)
    figures, config = {}, trained.config
    if config.num_samples:
        figures |= save_samples(pictures, velocity_of, trained, folder, key_x0)
    if config.eval_examples:
        figures |= measure_bits_per_dim(pictures, velocity_of, trained, key_eval)
    return figures


def guidance_of(config: Any) -> float:
    """The scale that a run's samples are drawn with: as the flag says, or 2 where it was learnt."""
    if config.guidance is not None:
        return config.guidance
    return 2.0 if config.conditional and config.label_dropout else 1.0


def save_samples(
    pictures: Pictures,
    velocity_of: VelocityOf,
    trained: Trained,
    folder: pathlib.Path,
    key: jax.Array,
) -> dict[str, Any]:
    """Draws samples over all devices, and saves their picture and how they came about.

    Of a conditional network every class has a row of its own, real images beside the drawn ones.
    """
    config, num_classes = trained.config, pictures.num_classes
    task, scale = trained.task._replace(velocity=velocity_of), guidance_of(config)
    controller = diffrax.PIDController(rtol=config.sample_tolerance, atol=config.sample_tolerance)
    labels, num = None, config.num_samples
    if config.conditional:
        labels = np.repeat(np.arange(num_classes, dtype=np.int32), max(1, num // num_classes))
        num = len(labels)

    @jax.jit
    def solve(params: Any, x0: jax.Array, labels: Any) -> fm.Trajectory:
        velocity = guided(task, params, labels, scale)
        ts = jnp.linspace(0.0, 1.0, FRAMES)
        return fm.integrate(velocity, x0, ts=ts, stepsize_controller=controller)

    say(f"Drawing {num} samples ...")
    x0 = np.asarray(jax.random.normal(key, (num, *pictures.event_shape)))
    given = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), (x0, labels))
    trajectory = sharding.gathered(solve(trained.params, *given))
    path = folder / "samples" / f"step_{trained.step:08d}.png"
    if cluster.is_main():
        drawn = np.asarray(pixels.quantize(trajectory.x[-1], pictures.num_levels))
        plotting.save(path, _picture(drawn, labels, pictures))
        columns = None if labels is None else num // num_classes
        frames = plotting.image_frames(trajectory.x, pictures.num_levels, columns)
        plotting.animation(frames, path.with_suffix(".gif"))
    told = "" if labels is None else f", guidance {scale:g}"
    return {
        "num_evaluations": int(trajectory.num_evaluations),
        "sampler": f"Tsit5, tolerance {config.sample_tolerance:g}{told}, EMA parameters",
        "samples": str(path.relative_to(folder)),
    }


def _picture(drawn: np.ndarray, labels: np.ndarray | None, pictures: Pictures) -> np.ndarray:
    """A grid; of classes one row for each, as many real images on the left of those drawn."""
    levels, classes = pictures.num_levels, range(pictures.num_classes)
    if labels is None:
        return plotting.grid(drawn, num_levels=levels)
    each, real = len(drawn) // len(classes), pictures.train
    rows = np.concatenate([np.flatnonzero(real.labels == label)[:each] for label in classes])
    return plotting.beside(
        plotting.by_class(real.images[rows], real.labels[rows], levels, classes=classes),
        plotting.by_class(drawn, labels, levels, classes=classes),
    )


def preview(
    pictures: Pictures, velocity_of: VelocityOf, trained: Trained, key: jax.Array
) -> np.ndarray:
    """A few samples in ten steps of Heun's: two of each class, or sixteen, from one noise."""
    config, num_classes = trained.config, pictures.num_classes
    labels = None
    if config.conditional:
        labels = np.tile(np.arange(min(num_classes, 10), dtype=np.int32), 2)
    num = 16 if labels is None else len(labels)
    x0 = np.asarray(jax.random.normal(key, (num, *pictures.event_shape)))
    given = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), (x0, labels))
    x1 = sharding.gathered(_previewed(velocity_of, trained.params, *given))
    images = np.asarray(pixels.quantize(x1, pictures.num_levels))
    return plotting.grid(images, columns=num // 2, num_levels=pictures.num_levels)


@functools.partial(jax.jit, static_argnums=0)
def _previewed(velocity_of: VelocityOf, params: Any, x0: jax.Array, labels: Any) -> jax.Array:
    return fm.sample(velocity_of(params, labels), x0, solver=diffrax.Heun(), num_steps=10)


def measure_bits_per_dim(
    pictures: Pictures, velocity_of: VelocityOf, trained: Trained, key: jax.Array
) -> dict[str, Any]:
    """Bits/dim of the first held-out images, with the standard error over them and the method."""
    config, dataset = trained.config, pictures.held_out
    num = min(config.eval_examples, len(dataset.images))
    size = min(config.eval_batch_size, num)
    controller = diffrax.PIDController(rtol=config.eval_tolerance, atol=config.eval_tolerance)

    @jax.jit
    def bits(params: Any, key: jax.Array, batch: Images) -> jax.Array:
        key_u, key_probe = jax.random.split(key)
        log_p = fm.log_prob(
            velocity_of(params, batch.labels),
            pixels.dequantize(key_u, batch.images, dataset.num_levels),
            divergence=fm.hutchinson_divergence(key_probe, config.eval_probes),
            stepsize_controller=controller,
        )
        return fm.bits_per_dim(log_p, batch.images.shape[1:], num_levels=dataset.num_levels)

    say("Bits/dim of held-out images ...")
    began, values = time.perf_counter(), []
    for start in range(0, num, size):
        rows = np.arange(start, start + size) % num  # a short last batch is filled up
        batch = rows_of(dataset, rows, config.conditional)
        batch = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), batch)
        key_batch = jax.random.fold_in(key, start)
        values.append(sharding.gathered(bits(trained.params, key_batch, batch)))
    values = np.concatenate(values)[:num]
    given = ", given their classes" if config.conditional else ""
    return {
        "bits_per_dim": float(values.mean()),
        "bits_per_dim_standard_error": standard_error(values),
        "bits_per_dim_method": (
            f"first {num} images of {config.dataset} {config.eval_split}{given}; uniform "
            f"dequantisation of {dataset.num_levels} levels, one draw; Hutchinson with "
            f"{config.eval_probes} probe(s); Tsit5, tolerance {config.eval_tolerance:g}; EMA "
            "parameters"
        ),
        "bits_per_dim_seconds": round(time.perf_counter() - began, 1),
    }
