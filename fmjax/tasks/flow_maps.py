"""What experiments with average velocities share: their flags, the task, pictures of few steps."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import flow_maps, harness, models, plotting
from fmjax.data import pixels
from fmjax.harness.config import mesh
from fmjax.harness.pods import cluster
from fmjax.harness.start import say
from fmjax.harness.task import Task, Trained
from fmjax.models import kernels as xla
from fmjax.tasks import images
from fmjax.tasks.flow_map_methods import METHODS, Drawn, Method
from fmjax.training import sharding

FEW = (1, 2, 4, 8)  # steps that pictures show


@dataclasses.dataclass(frozen=True)
class FlowMapConfig(images.ImageConfig):
    """The flags of an experiment with an average velocity."""

    method: Literal[
        "flow_matching",
        "mean_flow",
        "improved_mean_flow",
        "alpha_flow",
        "shortcut",
        "terminal_velocity",
        "consistency",
    ] = "mean_flow"
    """How the average velocity is trained; flow_matching makes the network that others begin
    with."""
    anneal_steps: int = 400
    """Steps over which alpha_flow's alpha falls, and consistency's pairs of times draw nearer."""


def check_horizon(config: FlowMapConfig) -> None:
    """Refuses a network that has no horizon."""
    flags = "dit" if config.network == "dit" else "model"
    if not getattr(config, flags).horizon:
        raise ValueError(
            f"An average velocity needs a network with a horizon; got none. Give --{flags}.horizon."
        )


def average_velocity_of(
    model: models.UNet | models.DiT, params: Any, labels: Any = None
) -> flow_maps.AverageVelocity:
    """The average velocity under the labels `[batch]`; that of no class without them."""
    velocity: Any = images.velocity_of(model, params, labels)
    return lambda t, s, x: velocity(t, x, horizon=s - t)


def network_of(trained: Trained) -> models.UNet | models.DiT:
    """The network of a trained run, with XLA's kernels."""
    samples = trained.task.samples
    num_classes = 0 if samples is None else samples.num_classes or 0
    return images.make_network(trained.config, num_classes).clone(kernels=xla.KERNELS)


def draw(
    config: FlowMapConfig,
    pictures: images.Pictures,
    key: jax.Array,
    batch: images.Images,
    progress: jax.Array,
) -> Drawn:
    """All that is random in a step, over the global batch."""
    key_flip, key_u, key_x0, key_t, key_label = jax.random.split(key, 5)
    shown = pixels.random_flip(key_flip, batch.images) if config.flip else batch.images
    x1 = pixels.dequantize(key_u, shown, pictures.num_levels)
    x0 = jax.random.normal(key_x0, x1.shape)
    pair = METHODS[config.method].pairs(key_t, x1.shape[:1], progress)
    labels = images.drop_labels(config, key_label, batch.labels, pictures.num_classes)
    return Drawn(x0, x1, pair.t, pair.s, labels)


def make_task(config: FlowMapConfig) -> Task:
    """The task of training an average velocity by the method that the flags name.

    Raises:
      ValueError: for flags that can't work together; by what is read, as `data.load` does.
    """
    check_horizon(config)
    if METHODS[config.method].anneals and config.accumulate > 1:
        raise ValueError(
            f"--accumulate needs a loss that is the same at every step; got {config.accumulate} "
            f"with --method {config.method}. Take another method or a smaller --batch-size."
        )
    pictures = images.open_images(config)
    model = images.make_network(config, pictures.num_classes)
    method, tx = METHODS[config.method], harness.optimizer(config)
    init_params = functools.partial(images.init_params, model, pictures.event_shape)

    def at(progress: jax.Array) -> tuple[Any, Any]:
        """`init` and `step` where the method is so far."""

        def drawn(key: jax.Array, batch: images.Images) -> Drawn:
            return draw(config, pictures, key, batch, progress)

        def loss(params: Any, key: jax.Array, drawn: Drawn) -> jax.Array:
            velocity: Any = images.training_velocity(config, model, params, key, drawn.labels)
            return method.loss(lambda t, s, x: velocity(t, x, horizon=s - t), drawn, progress)

        return harness.from_loss(drawn, loss, tx, init_params, ema_decay=config.ema_decay)

    def annealed(state: Any, key: jax.Array, batch: images.Images) -> Any:
        progress = jnp.minimum(state.step / config.anneal_steps, 1.0)
        return at(progress)[1](state, key, batch)

    init, constant = at(jnp.zeros(()))
    step = annealed if method.anneals else constant
    task = images.make_task(config, pictures, model, init, step)
    if method.anneals:  # a held-out loss is taken as at step 0, which would be another loss
        task = task._replace(num_held_out=0, held_out=None)
    return with_few_steps(task, pictures, functools.partial(draw_in_few_steps, method, model))


def with_few_steps(task: Task, pictures: images.Pictures, few: Callable[..., jax.Array]) -> Task:
    """A task that also draws, at its end too, by `few(params, key, x0, labels, num_steps)`."""
    assert task.finish is not None and task.samples is not None  # of every image run
    finish = functools.partial(_finish, task.finish, pictures)
    return task._replace(finish=finish, samples=task.samples._replace(jump=few))


def draw_in_few_steps(
    method: Method,
    model: models.UNet | models.DiT,
    params: Any,
    key: jax.Array,
    x0: jax.Array,
    labels: Any,
    num_steps: int,
) -> jax.Array:
    """Samples `[num, *event]` by the method's own way, in `num_steps` evaluations."""
    return method.sample(key, average_velocity_of(model, params, labels), x0, num_steps)


def _finish(
    finish: Callable[..., dict[str, Any]],
    pictures: images.Pictures,
    trained: Trained,
    folder: pathlib.Path,
    key: jax.Array,
) -> dict[str, Any]:
    """What every image run does, and a picture of 1, 2, 4 and 8 steps from the same noise."""
    figures, config = finish(trained, folder, key), trained.config
    if not config.num_samples:
        return figures
    say(f"Drawing in {', '.join(map(str, FEW))} steps ...")
    num, (key_x0, key_way) = 10 if config.conditional else 16, jax.random.split(key)
    labels = np.arange(num, dtype=np.int32) % pictures.num_classes if config.conditional else None
    x0 = np.asarray(jax.random.normal(key_x0, (num, *pictures.event_shape)))
    given = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), (x0, labels))
    samples = trained.task.samples
    assert samples is not None and samples.jump is not None  # with_few_steps, or a student's own
    few = jax.jit(samples.jump, static_argnums=4)
    rows = [sharding.gathered(few(trained.params, key_way, *given, n)) for n in FEW]
    path = folder / "samples" / f"few_steps_{trained.step:08d}.png"
    if cluster.is_main():
        drawn = np.asarray(pixels.quantize(jnp.concatenate(rows), pictures.num_levels))
        plotting.save(path, plotting.grid(drawn, columns=num, num_levels=pictures.num_levels))
    return figures | {"few_steps": str(path.relative_to(folder))}
