"""Sample quality of an image run: Fréchet distance, KID and Inception score, seed by seed.

Samples are rounded to the pixel values that the data have before an encoder sees them. Errors are
those over splits of one seed's samples; over the seeds stand mean and standard deviation.
"""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from fmjax.data import pixels
from fmjax.evaluation import drawing
from fmjax.evaluation.curve import errors_over_seeds
from fmjax.evaluation.judging import Judge
from fmjax.harness import keys
from fmjax.harness.store import Store, progress
from fmjax.harness.task import Trained


def measure(
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
) -> tuple[dict[str, Any], np.ndarray]:
    """Draws `num_samples` images per seed and measures them.

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

    Returns:
      What stands in evaluation.json under "quality", and the first batch of images, uint8.
    """
    solve = drawing.make_solve(trained)
    drawn = Store(folder, "samples", settings)
    encoder = {"encoder": judge.encoder.name, "encoder_sha256": judge.encoder.digest}
    encoded = Store(folder, "features", settings | encoder)

    def levels(x1: np.ndarray) -> np.ndarray:
        return np.asarray(pixels.quantize(jnp.asarray(x1), num_levels))

    runs, figures = [], []
    for seed in progress(seeds, "seeds"):
        key = keys.key(seed, "samples")
        name = f"seed_{seed}"
        run = drawing.draw(
            solve,
            way,
            drawn,
            name,
            key,
            trained.source,
            batch_size,
            num_samples,
            trained.condition,
            levels,
        )
        features = encode_samples(judge, encoded, name, run.x1, batch_size)
        figures.append(judge.figures(features, trained.condition(np.arange(num_samples))))
        runs.append(run)
    return {
        "num_samples": num_samples,
        "seeds": list(seeds),
        **{name: errors_over_seeds([figure[name] for figure in figures]) for name in figures[0]},
        "sampler": str(way),
        "begun_on": drawn.begun_on,
        "num_evaluations": float(np.mean([run.num_evaluations for run in runs])),
        "seconds": round(sum(run.seconds for run in runs), 1),
    }, runs[0].x1[:batch_size]


def encode_samples(
    judge: Judge, store: Store, name: str, images: np.ndarray, batch_size: int
) -> np.ndarray:
    """Features `[num, D]`, each batch computed once; a short last one has a name of its own."""

    def batch(i: int) -> np.ndarray:
        part = images[i * batch_size : (i + 1) * batch_size]
        short = "" if len(part) == batch_size else f"_first_{len(part)}"
        arrays = store.get(
            f"{name}_batch_{i:04d}{short}", lambda: {"features": judge.encode(part, batch_size)}
        )
        return arrays["features"]

    return np.concatenate([batch(i) for i in range(-(-len(images) // batch_size))])
