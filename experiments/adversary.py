"""A flow map with an adversary on top: samples of one step that a discriminator can't tell.

    python -m experiments.flow_map --method flow_matching --workdir runs/flow
    python -m experiments.adversary --generator runs/flow

The network keeps MeanFlow's loss and gains a relativistic one on its single step from noise to
data, as `fmjax.tasks.adversaries` states it. What that buys, under an encoder that the
discriminator never saw, is a row of `experiments.few_steps`.
"""

import dataclasses

from experiments import flow_map
from fmjax import harness
from fmjax.tasks import adversaries


@dataclasses.dataclass(frozen=True)
class Config(flow_map.Config, adversaries.AdversaryConfig):
    """An average velocity of images with an adversary, on the 8x8 digits by default."""


def make_task(config: Config) -> harness.Task:
    return adversaries.make_task(config)


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
