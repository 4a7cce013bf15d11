"""fmjax's side of the input pipeline: reading records, and the loop's own work for a batch."""

import jax
import numpy as np

from experiments.benchmarks.compare import points
from experiments.benchmarks.compare.workers import Case, Options, timed
from fmjax import data
from fmjax.training import sharding

BATCHES = 500


def reading(options: Options) -> dict[str, Case]:
    """The records go to the peer as PNG files in one array; without CIFAR-10 nothing is read."""
    if not points.has_cifar():
        raise FileNotFoundError("TFDS_DATA_DIR must hold cifar10 in this row.")
    images = data.load("cifar10", points.CHOSEN).images
    np.save(options.folder / "cifar.npy", images)
    mesh = sharding.make_mesh()

    def read() -> None:
        data.load("cifar10", points.CHOSEN)

    def batches() -> None:
        """As `fmjax.harness.loop`: indices, gather, on to the device."""
        indices = data.batches(len(images), points.BATCH, seed=0)
        for _ in range(BATCHES):
            jax.block_until_ready(sharding.shard_batch(images[next(indices)], mesh))

    return {
        "read": timed(read, len(images)),
        "batch": timed(batches, BATCHES * points.BATCH),
    }
