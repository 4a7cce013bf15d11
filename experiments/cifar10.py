"""CIFAR-10 with the 35.7M-parameter U-Net and recipe of torchcfm's experiment.

    python -m experiments.cifar10

Made for a GPU or a TPU; what the defaults reach after their 400,000 steps is not known. 4,000 steps
took 2.3 minutes on one H200, a small network's 600 steps 12 minutes on two cores; flags and figures
are in experiments/benchmarks/results.
"""

import dataclasses
import pathlib

from experiments.images import ImageConfig, UNetConfig, run_experiment
from fmjax.harness import command


@dataclasses.dataclass(frozen=True)
class Config(ImageConfig):
    """Flow matching on CIFAR-10."""

    workdir: pathlib.Path = pathlib.Path("runs/cifar10")
    dataset: str = "cifar10"
    flip: bool = True
    num_steps: int = 400_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    warmup_steps: int = 5000
    clip_norm: float | None = 1.0
    ema_decay: float = 0.9999
    checkpoint_every: int = 5000
    log_every: int = 100
    model: UNetConfig = UNetConfig(
        channels=128,
        channel_multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
        dropout=0.1,
    )


def main(config: Config) -> None:
    run_experiment("cifar10", config)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.cifar10", doc=__doc__)
