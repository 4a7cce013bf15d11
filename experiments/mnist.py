"""MNIST or Fashion-MNIST, 28x28, with a small U-Net.

    python -m experiments.mnist --dataset fashion_mnist

On two cores of a shared server: 23 minutes of training, 3.62 bits/dim (held out, standard error
0.05).
"""

import dataclasses
import functools

import jax

import fmjax as fm
from fmjax import harness
from fmjax.data import pixels
from fmjax.tasks import choices, images


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig, choices.Choices):
    """Flow matching on MNIST, or with --dataset fashion_mnist on garments."""

    dataset: str = "mnist"
    num_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.995
    preview_every: int = 500
    model: images.UNetConfig = images.UNetConfig(
        channels=16, channel_multipliers=(1, 2, 4), attention_resolutions=(7,), head_channels=32
    )
    dit: images.DiTConfig = images.DiTConfig(patch_size=4)


def make_task(config: Config) -> harness.Task:
    pictures = images.open_images(config)
    model, num_classes = images.make_network(config, pictures.num_classes), pictures.num_classes
    path, coupling, times = choices.choose(config)

    def draw(key, batch):
        """All that is random in a step, over the global batch."""
        key_flip, key_u, key_x0, key_pair, key_t, key_label = jax.random.split(key, 6)
        shown = pixels.random_flip(key_flip, batch.images) if config.flip else batch.images
        x1 = pixels.dequantize(key_u, shown, pictures.num_levels)
        x0 = coupling(key_pair, jax.random.normal(key_x0, x1.shape), x1)
        t = times(key_t, x1.shape[:1])
        labels = images.drop_labels(config, key_label, batch.labels, num_classes)
        return fm.sample_path(path, x0, x1, t), labels

    def loss(params, key, drawn):
        path_sample, labels = drawn
        velocity = images.training_velocity(config, model, params, key, labels)
        return fm.cfm_loss(velocity, path_sample)

    init_params = functools.partial(images.init_params, model, pictures.event_shape)
    init, step = harness.from_loss(
        draw, loss, harness.optimizer(config), init_params, ema_decay=config.ema_decay
    )
    return images.make_task(config, pictures, model, init, step)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
