"""An adversary on top of an average velocity: samples in one step that a discriminator can't tell.

The generator is one step of the flow map, G(z) = z + U(0, 1, z). Its network keeps the loss of its
method, which ties it to the flow at all other times, and gains w times the relativistic loss and a
transport cost; the discriminator D has the other side's loss and the gradient penalty. Each side
takes the other as it is:

    L(U, D) = method(U) + w (softplus(-(D'(G) - D'(x))) + c |G - z|^2 / D)
            + softplus(-(D(x) - D(G'))) + gamma / 2 (|grad D(x)|^2 + |grad D(G')|^2)

with a prime for `stop_gradient`: one gradient of L moves both networks, by an Adam of each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from fmjax import flow_maps, harness, models
from fmjax.harness import places
from fmjax.harness.read import restore_params
from fmjax.harness.task import Task
from fmjax.tasks import images
from fmjax.tasks.flow_map_methods import METHODS, Drawn
from fmjax.tasks.flow_maps import (
    FlowMapConfig,
    check_horizon,
    draw,
    draw_in_few_steps,
    with_few_steps,
)
from fmjax.tasks.image_networks import check_beginning, has_begun


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator. Image sides must be divisible by 2^(levels - 1)."""

    channels: int = 32
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level, as multiples; the image is halved between levels."""
    num_res_blocks: int = 1
    """Residual blocks per level."""


@dataclasses.dataclass(frozen=True)
class AdversaryConfig(FlowMapConfig):
    """The flags of an average velocity with an adversary."""

    generator: epath.Path | None = None
    """Run folder of the average velocity that this run begins with."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The discriminator's size."""
    adversarial_weight: float = 0.1
    """Of the adversarial part of the generator's loss."""
    transport_weight: float = 0.0
    """Of the transport cost, within the adversarial part."""
    penalty: float = 1.0
    """The gradient penalty's gamma."""
    discriminator_rate: float = 5e-4
    """Adam's learning rate of the discriminator, constant."""


def _check(config: AdversaryConfig) -> None:
    check_horizon(config)
    for name in ("adversarial_weight", "transport_weight", "penalty"):
        value = getattr(config, name)
        if not 0 <= value < float("inf"):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} must be finite and not negative; got {value}.")
    if config.init_from is not None:
        raise ValueError(
            "A run with an adversary begins with an average velocity, a part of its networks; got "
            f"--init-from {config.init_from}. Give --generator {config.init_from}."
        )
    if METHODS[config.method].anneals:
        raise ValueError(
            f"An adversary needs a method whose loss is the same at every step; got "
            f"--method {config.method}. mean_flow is one."
        )


def make_task(config: AdversaryConfig) -> Task:
    """The task of an average velocity with an adversary.

    Raises:
      ValueError: for flags that can't work together; by what is read.
    """
    _check(config)
    if config.generator is not None:
        check_beginning(config, places.as_path(config.generator), "--generator")
    pictures = images.open_images(config)
    model = images.make_network(config, pictures.num_classes)
    known = pictures.num_classes if config.conditional else None
    judge = models.Discriminator(**dataclasses.asdict(config.discriminator), num_classes=known)
    method, start = METHODS[config.method], jnp.zeros(())

    init_generator = functools.partial(images.init_params, model, pictures.event_shape)
    begun = None
    if config.generator is not None and not has_begun(config):
        example = jax.eval_shape(init_generator, jax.random.key(0))
        begun = restore_params(places.as_path(config.generator), example)[0]

    def init_params(key: jax.Array) -> dict[str, Any]:
        key_u, key_d = jax.random.split(key)
        generator = init_generator(key_u) if begun is None else begun
        empty = jnp.zeros((1, *pictures.event_shape))
        discriminator = judge.init(key_d, empty)
        return {"generator": jax.tree.map(jnp.asarray, generator), "discriminator": discriminator}

    def drawn(key: jax.Array, batch: images.Images) -> Drawn:
        return draw(config, pictures, key, batch, start)

    def loss(params: Any, key: jax.Array, drawn: Drawn) -> jax.Array:
        velocity: Any = images.training_velocity(
            config, model, params["generator"], key, drawn.labels
        )

        def average(t: jax.Array, s: jax.Array, x: jax.Array) -> jax.Array:
            return velocity(t, x, horizon=s - t)

        def told(params: Any, x: jax.Array) -> jax.Array:
            return judge.apply(params, x, drawn.labels)  # pyright: ignore[reportReturnType]

        fake = flow_maps.flow_map(average)(start, jnp.ones(()), drawn.x0)
        flow = method.loss(average, drawn, start)
        return flow + _adversarial(config, told, params["discriminator"], drawn, fake)

    tx = optax.partition(
        {
            "generator": harness.optimizer(dataclasses.replace(config, max_skipped_steps=0)),
            "discriminator": optax.adam(config.discriminator_rate, b1=0.0, b2=0.99),
        },
        {"generator": "generator", "discriminator": "discriminator"},
    )
    tx = harness.skip_not_finite(tx, config.max_skipped_steps)
    init, step = harness.from_loss(drawn, loss, tx, init_params, ema_decay=config.ema_decay)
    task = images.make_task(config, pictures, model, init, step, velocity_of=velocity_of)
    few = functools.partial(draw_in_few_steps, METHODS["mean_flow"], model)
    return with_few_steps(task, pictures, lambda params, *given: few(params["generator"], *given))


def _adversarial(
    config: AdversaryConfig, told: Any, params: Any, drawn: Drawn, fake: jax.Array
) -> jax.Array:
    """Both sides' losses, `[batch]`, each with the other side stopped."""
    stop, real = jax.lax.stop_gradient, drawn.x1
    lead = flow_maps.relativistic_losses(told(stop(params), real), told(stop(params), fake))
    cost = flow_maps.transport_cost(drawn.x0, fake)
    fake = stop(fake)
    both = flow_maps.relativistic_losses(told(params, real), told(params, fake))
    judge = functools.partial(told, params)
    penalty = flow_maps.gradient_penalty(judge, real) + flow_maps.gradient_penalty(judge, fake)
    generator = config.adversarial_weight * (lead.generator + config.transport_weight * cost)
    return generator + both.discriminator + 0.5 * config.penalty * penalty


def velocity_of(model: models.UNet | models.DiT, params: Any, labels: Any = None) -> Any:
    """The velocity of the generator's network."""
    return images.velocity_of(model, params["generator"], labels)
