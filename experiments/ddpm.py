"""DDPM on handwritten digits of 8x8 pixels: a network that predicts the noise along `vp`.

    python -m experiments.ddpm

Network, data, batch and steps are those of `experiments.digits`. Three things differ: the path, the
loss |eps(t, x_t) - x0|^2 / D at uniform times, and what the network is made into for solvers, a
velocity along `cond_ot`, finite at both ends. Samples, likelihoods and guidance are then those of
any run; DDIM, and DDPM's ancestral steps from the same folder, are in `experiments.benchmarks.ddpm`
beside flow matching.
"""

import dataclasses
import functools
from typing import Any

import jax

import fmjax as fm
from fmjax import harness
from fmjax.data import pixels
from fmjax.tasks import images

PATH, FLOOR = fm.vp(), 1e-3  # whose alpha is never below the floor


@dataclasses.dataclass(frozen=True)
class Config(images.ImageConfig):
    """Noise prediction on scikit-learn's 8x8 digits, told which digit; --no-conditional is not."""

    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.99
    checkpoint_every: int = 400
    preview_every: int = 200
    conditional: bool = True
    num_samples: int = 80
    model: images.UNetConfig = images.UNetConfig(
        channels=32, channel_multipliers=(1, 2), attention_resolutions=(4,), head_channels=32
    )
    eval_examples: int = 297
    eval_batch_size: int = 99


def velocity_of(model: images.Network, params: Any, labels: Any = None) -> fm.PredictedVelocity:
    """The velocity along `cond_ot` of a network that predicts the noise along `PATH`."""
    noise = images.velocity_of(model, params, labels)
    return fm.change_path(fm.from_x0(PATH, noise, floor=FLOOR), PATH, fm.cond_ot())


def make_task(config: Config) -> harness.Task:
    if config.flip:
        raise ValueError("--flip is not for digits: mirrored ones are none.")
    digits = images.open_images(config)
    model, num_classes = images.make_network(config, digits.num_classes), digits.num_classes

    def draw(key, batch):
        """All that is random in a step, over the global batch."""
        key_u, key_x0, key_t, key_label = jax.random.split(key, 4)
        x1 = pixels.dequantize(key_u, batch.images, digits.num_levels)
        x0 = jax.random.normal(key_x0, x1.shape)
        path_sample = fm.sample_path(PATH, x0, x1, fm.uniform(key_t, x1.shape[:1]))
        labels = images.drop_labels(config, key_label, batch.labels, num_classes)
        return path_sample._replace(u_t=x0), labels

    def loss(params, key, drawn):
        path_sample, labels = drawn
        noise = images.training_velocity(config, model, params, key, labels)
        return fm.cfm_loss(noise, path_sample)  # the mean square of noise - x0

    init_params = functools.partial(images.init_params, model, digits.event_shape)
    init, step = harness.from_loss(
        draw, loss, harness.optimizer(config), init_params, ema_decay=config.ema_decay
    )
    return images.make_task(config, digits, model, init, step, velocity_of=velocity_of)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
