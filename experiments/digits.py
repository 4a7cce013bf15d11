"""Handwritten digits of 8x8 pixels (scikit-learn's, nothing to download) with a small U-Net.

    python -m experiments.digits

On two cores of a shared server: 1.6 minutes of training, 2.03 bits/dim (17 levels, held out,
standard error 0.01).
"""

import dataclasses
import pathlib

from experiments.images import ImageConfig, UNetConfig, run_experiment
from fmjax.harness import command


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Flow matching on scikit-learn's 8x8 digits."""

    workdir: pathlib.Path = pathlib.Path("runs/digits")
    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.99
    checkpoint_every: int = 400
    model: UNetConfig = UNetConfig(
        channels=32, channel_multipliers=(1, 2), attention_resolutions=(4,), head_channels=32
    )
    eval_examples: int = 297
    eval_batch_size: int = 99


def main(config: Config) -> None:
    run_experiment("digits", config)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.digits", doc=__doc__)
