"""Sample quality of an image run: Fréchet distance, KID and Inception score, seed by seed.

Samples are rounded to the pixel values that the data have before an encoder sees them. Errors are
those over splits of one seed's samples; over the seeds stand mean and standard deviation.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fmjax.data import pixels
from fmjax.evaluation import drawing
from fmjax.evaluation.curve import errors_over_seeds
from fmjax.evaluation.judging import Judge
from fmjax.harness import keys
from fmjax.harness.share import Batch
from fmjax.harness.store import Arrays, Store
from fmjax.harness.task import Trained


class Drawn(NamedTuple):
    """The batches of one seed's samples, and of their features.

    Attributes:
      samples: of images, uint8, under "x1".
      features: under "features".
    """

    samples: list[Batch]
    features: list[Batch]


def batches(
    trained: Trained,
    judge: Judge,
    folder: pathlib.Path,
    settings: dict[str, Any],
    *,
    way: drawing.Way,
    batch_size: int,
    num_levels: int,
    num_samples: int,
    seeds: tuple[int, ...],
) -> list[Drawn]:
    """The batches of `num_samples` images per seed, to be solved by the processes of a pod.

    Args:
      trained: the model.
      judge: the encoder, the real images' features and how errors are taken.
      folder: the evaluation's folder.
      settings: what the samples depend on besides.
      way: how they are drawn.
      batch_size: samples per solve.
      num_levels: pixel values.
      num_samples: per seed.
      seeds: of the noise.
    """
    solve = drawing.make_solve(trained)
    drawn = Store(folder, "samples", settings)
    encoder = {"encoder": judge.encoder.name, "encoder_sha256": judge.encoder.digest}
    encoded = Store(folder, "features", settings | encoder)

    def levels(x1: np.ndarray) -> np.ndarray:
        return np.asarray(pixels.quantize(jnp.asarray(x1), num_levels))

    found = []
    for seed in seeds:
        name = f"seed_{seed}"
        samples = drawing.batches(
            solve,
            way,
            drawn,
            name,
            keys.key(seed, "samples"),
            trained.source,
            batch_size,
            num_samples,
            trained.condition,
            levels,
        )
        features = encode_samples(judge, encoded, name, samples, batch_size, num_samples)
        found.append(Drawn(samples, features))
    return found


def unpacked(drawn: Sequence[Drawn]) -> list[Batch]:
    """All batches: samples first, which features are made of."""
    return [b for one in drawn for b in one.samples] + [b for one in drawn for b in one.features]


def measure(
    drawn: Sequence[Drawn],
    trained: Trained,
    judge: Judge,
    *,
    way: drawing.Way,
    num_samples: int,
    seeds: tuple[int, ...],
) -> tuple[dict[str, Any], np.ndarray]:
    """Measures the images of every seed.

    Args:
      drawn: from `batches`.
      trained, judge, way, num_samples, seeds: as given to it.

    Returns:
      What stands in evaluation.json under "quality", and the first batch of images, uint8.
    """
    runs = [drawing.joined(one.samples, num_samples) for one in drawn]
    labels = trained.condition(np.arange(num_samples))
    features = (np.concatenate([b.get()["features"] for b in one.features]) for one in drawn)
    figures = [judge.figures(of_seed, labels) for of_seed in features]
    return {
        "num_samples": num_samples,
        "seeds": list(seeds),
        **{name: errors_over_seeds([figure[name] for figure in figures]) for name in figures[0]},
        "sampler": str(way),
        "begun_on": drawn[0].samples[0].store.begun_on,
        "num_evaluations": float(np.mean([run.num_evaluations for run in runs])),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }, drawn[0].samples[0].get()["x1"][:num_samples]


def encode_samples(
    judge: Judge, store: Store, name: str, samples: Sequence[Batch], batch_size: int, num: int
) -> list[Batch]:
    """The batches of features of the first `num` samples; a short last one has its own name."""

    def encode(images: Callable[[], Arrays], part: int) -> Arrays:
        return {"features": judge.encode(images()["x1"][:part], batch_size)}

    found = []
    for i, batch in enumerate(samples):
        part = min(batch_size, num - i * batch_size)
        short = "" if part == batch_size else f"_first_{part}"
        compute = functools.partial(encode, batch.get, part)
        found.append(Batch(store, f"{name}_batch_{i:04d}{short}", compute, "features"))
    return found
