"""CIFAR-10 with the 35.7M-parameter U-Net and recipe of torchcfm's experiment.

    python -m experiments.cifar10

Made for a GPU or a TPU; what the defaults reach after their 400,000 steps is not known. 4,000 steps
took 2.3 minutes on one H200, a small network's 600 steps 12 minutes on two cores; flags and figures
are in experiments/benchmarks/results.
"""

import dataclasses
import functools

import jax

import fmjax as fm
from fmjax import harness
from fmjax.data import pixels
from fmjax.tasks import images


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig):
    """Flow matching on CIFAR-10."""

    dataset: str = "cifar10"
    flip: bool = True
    num_steps: int = 400_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    clip_norm: float | None = 1.0
    ema_decay: float = 0.9999
    checkpoint_every: int = 5000
    preview_every: int = 5000
    log_every: int = 100
    model: images.UNetConfig = images.UNetConfig(
        channels=128,
        channel_multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
        dropout=0.1,
    )
    dit: images.DiTConfig = images.DiTConfig(width=384, depth=12, num_heads=6, dropout=0.1)


def make_task(config: Config) -> harness.Task:
    pictures = images.open_images(config)
    model = images.make_network(config, pictures.num_classes)

    def draw(key, batch):
        """All that is random in a step, over the global batch."""
        key_flip, key_u, key_x0, key_t, key_label = jax.random.split(key, 5)
        shown = pixels.random_flip(key_flip, batch.images) if config.flip else batch.images
        x1 = pixels.dequantize(key_u, shown, pictures.num_levels)
        x0 = jax.random.normal(key_x0, x1.shape)
        t = fm.uniform(key_t, x1.shape[:1])
        labels = images.drop_labels(config, key_label, batch.labels, pictures.num_classes)
        return fm.sample_path(fm.cond_ot(), x0, x1, t), labels

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
