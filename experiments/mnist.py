"""MNIST or Fashion-MNIST, 28x28, with a small U-Net.

    python -m experiments.mnist --dataset fashion_mnist

On two cores of a shared server: 23 minutes of training, 3.62 bits/dim (held out, standard error
0.05).
"""

import dataclasses
import pathlib

from experiments.images import ImageConfig, UNetConfig, run_experiment
from fmjax.harness import command


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Flow matching on MNIST, or with --dataset fashion_mnist on garments."""

    workdir: pathlib.Path = pathlib.Path("runs/mnist")
    dataset: str = "mnist"
    num_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    ema_decay: float = 0.995
    model: UNetConfig = UNetConfig(
        channels=16, channel_multipliers=(1, 2, 4), attention_resolutions=(7,), head_channels=32
    )


def main(config: Config) -> None:
    run_experiment("mnist", config)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.mnist", doc=__doc__)
