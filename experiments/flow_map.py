"""Samples in one to eight steps: an average velocity of images, from a flow or from nothing.

    python -m experiments.flow_map --method flow_matching --workdir runs/flow
    python -m experiments.flow_map --method mean_flow --init-from runs/flow

The first command trains a flow on the 8x8 digits with a network that has a horizon; the second goes
on from it. The network learns U(t, s, x), whose one step of length s - t is the flow's whole way
from t to s; at s = t it is the velocity, so that likelihoods and adaptive samples of the folder
are what they are for any run. `--method` names the loss; `fmjax.tasks.flow_map_methods` says what
each draws, and `experiments.few_steps` what each buys.
"""

import dataclasses

from fmjax import harness
from fmjax.tasks import flow_maps, images


@dataclasses.dataclass(frozen=True)
class Config(flow_maps.FlowMapConfig):
    """An average velocity on images, the 8x8 digits by default, told the class."""

    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema_decay: float = 0.99
    checkpoint_every: int = 400
    preview_every: int = 200
    conditional: bool = True
    guidance: float | None = 1.0
    num_samples: int = 80
    model: images.UNetConfig = images.UNetConfig(
        channels=32,
        channel_multipliers=(1, 2),
        attention_resolutions=(4,),
        head_channels=32,
        horizon=True,
        time_scale=16.0,
    )
    dit: images.DiTConfig = images.DiTConfig(horizon=True)
    eval_examples: int = 297
    eval_batch_size: int = 99


def make_task(config: Config) -> harness.Task:
    return flow_maps.make_task(config)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
