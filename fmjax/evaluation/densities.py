"""Bits/dim of held-out images: bounds that are named, each with its error.

The error of a mean over images is their standard deviation over the root of their number; the noise
of the draws and of the probes is in it, since every image has its own. The error of one image is
the spread over its probes.

With K importance-weighted draws and an estimated divergence, what the probes' noise differs by from
draw to draw lowers the figure, by up to half its variance in nats: it is then no bound but an
estimate. So the probes of an image are the same for all its draws, their values are averaged before
the draws are weighted, and the variance that remains is reported, from two probes on.
"""

import functools
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

import fmjax as fm
from fmjax import data
from fmjax.data import dequantization
from fmjax.harness import keys
from fmjax.harness.share import Batch, put
from fmjax.harness.store import Store
from fmjax.harness.task import Trained
from fmjax.metrics import Estimate


class Likelihood(NamedTuple):
    """How log-densities of images are measured.

    Attributes:
      dequantizer: from `fmjax.data.dequantization`.
      divergence: `key -> Divergence`; with a leading axis of estimates their spread is reported.
      num_draws: K, of the importance-weighted bound.
      tolerance: relative and absolute, of Tsit5.
      batch_size: images per solve.
      settings: all of this as JSON can hold it.
    """

    dequantizer: dequantization.Dequantizer
    divergence: Any
    num_draws: int
    tolerance: float
    batch_size: int
    settings: dict[str, Any]


Solve = tuple[int, int, float]  # first image, draw, tolerance


def batches(
    how: Likelihood,
    trained: Trained,
    dataset: data.ImageDataset,
    store: Store,
    seed: int,
    *,
    conditional: bool,
) -> dict[Solve, Batch]:
    """The batches that `measure` reads, to be solved by the processes of a pod.

    The last one is the first batch at a tenth of the tolerance: the solver's own error.

    Args:
      how: the estimator.
      trained: the model.
      dataset: the images, all of them are used.
      store: where the log-weights of each batch are kept.
      seed: of the draws and probes.
      conditional: whether the likelihood is given the images' labels.
    """
    log_weights, images = _log_weights_fn(how, trained), dataset.images
    labels = dataset.labels if conditional else None
    key = keys.key(seed, "likelihood")

    def batch(start: int, draw: int, tolerance: float) -> dict[str, np.ndarray]:
        rows = np.arange(start, start + how.batch_size) % len(images)  # a short one is filled up
        key_batch = jax.random.fold_in(key, start)
        weights, evaluations = log_weights(
            trained.params,
            jax.random.fold_in(key_batch, 1 + draw),
            jax.random.fold_in(key_batch, 0),
            *put((images[rows], None if labels is None else labels[rows])),
            tolerance,
        )
        return {"log_weights": np.asarray(weights), "num_evaluations": np.asarray(evaluations)}

    starts = range(0, len(images), how.batch_size)
    solves = [(start, draw, how.tolerance) for draw in range(how.num_draws) for start in starts]
    solves.append((0, 0, how.tolerance / 10))
    names = (f"batch_{i:06d}_draw_{draw:04d}_tolerance_{tol:.3g}" for i, draw, tol in solves)
    return {
        solve: Batch(store, name, functools.partial(batch, *solve), "log-densities")
        for solve, name in zip(solves, names, strict=True)
    }


def measure(
    how: Likelihood,
    trained: Trained,
    dataset: data.ImageDataset,
    store: Store,
    seed: int,
    *,
    conditional: bool,
) -> dict[str, Any]:
    """The bounds of `dataset.images`, the solver's own error and the cost.

    Args:
      how, trained, dataset, store, seed, conditional: as for `batches`, whose numbers it takes.

    Returns:
      What stands in evaluation.json under "likelihood".
    """
    solves = batches(how, trained, dataset, store, seed, conditional=conditional)
    done = {solve: batch.get() for solve, batch in solves.items()}
    images, starts = dataset.images, range(0, len(dataset.images), how.batch_size)
    weights = np.stack(
        [
            np.concatenate([done[start, draw, how.tolerance]["log_weights"] for start in starts], 1)
            for draw in range(how.num_draws)
        ]
    )[:, :, : len(images)]
    bounds = [_bound(weights, images.shape[1:], 1, how)]
    if how.num_draws > 1:
        bounds.append(_bound(weights, images.shape[1:], how.num_draws, how))
    return {
        "num_images": len(images),
        "bounds": bounds,
        "solver_error": _solver_error(done, how, images.shape),
        "num_evaluations": float(np.mean([done[t]["num_evaluations"] for t in [*done][:-1]])),
        "seconds": round(float(sum(d["seconds"] for d in done.values())), 1),
        "estimator": how.settings,
    }


def interval(bits: np.ndarray) -> tuple[Estimate, float | None, float | None]:
    """Mean and errors of bits/dim `[num_estimates, num_images]`.

    Returns:
      The mean over images with its standard error, NaN for one image; that part of the error which
      is the divergence estimator's; and the typical standard error of one image, None for both
      where there is one estimate.
    """
    num_estimates, num = bits.shape
    per_image = bits.mean(0)
    error = float(per_image.std(ddof=1) / np.sqrt(num)) if num > 1 else float("nan")
    mean = Estimate(float(per_image.mean()), error)
    if num_estimates == 1:
        return mean, None, None
    variance = bits.var(0, ddof=1) / num_estimates
    return mean, float(np.sqrt(variance.sum()) / num), float(np.sqrt(variance.mean()))


def _log_weights_fn(how: Likelihood, trained: Trained) -> Any:
    """`(params, key_draw, key_probe, images, labels, tolerance)` -> log-weights, evaluations."""

    @jax.jit
    def log_weights(params, key_draw, key_probe, images, labels, tolerance):
        x, log_q = how.dequantizer(key_draw, images)
        solved = fm.integrate_log_prob(
            trained.velocity(params, labels),
            x,
            divergence=how.divergence(key_probe),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )
        return jnp.atleast_2d(solved.log_prob) - log_q[None], solved.num_evaluations

    return log_weights


def _bound(
    weights: np.ndarray, event_shape: tuple[int, ...], num_draws: int, how: Likelihood
) -> dict[str, Any]:
    """One row of the table from log-weights `[K, num_estimates, num_images]`."""
    weights = weights.astype(np.float64)  # JAX's are float32
    scale = -np.prod(event_shape) * np.log(2)
    name, excess = f"{how.settings['dequantization']} dequantisation", None
    if num_draws == 1:
        bits = weights.mean(0) / scale
    else:
        name += ", importance-weighted"
        draws = weights.mean(1)
        bits = (special.logsumexp(draws, axis=0) - np.log(num_draws))[None] / scale
        excess = _noise_between_draws(weights)
    mean, probe_error, image_error = interval(bits)
    exact = how.settings["divergence"] == "exact"
    return {
        "bound": f"{name}, K = {num_draws}",
        "is_a_bound": num_draws == 1 or exact,
        "bits_per_dim": mean.value,
        "standard_error": None if np.isnan(mean.standard_error) else mean.standard_error,
        "standard_error_of_the_divergence": probe_error,
        "standard_error_of_one_image": image_error,
        "too_low_by_at_most": None if excess is None else excess / 2 / -scale,
    }


def _noise_between_draws(weights: np.ndarray) -> float | None:
    """Variance, in nats^2, of what the mean probe's noise differs by from draw to draw.

    Args:
      weights: log-weights `[K, num_estimates, num_images]`, K of at least 2.
    """
    num_estimates = weights.shape[1]
    if num_estimates == 1:
        return None
    residual = weights - weights.mean(0) - (weights - weights.mean(0)).mean(1, keepdims=True)
    free = (weights.shape[0] - 1) * (num_estimates - 1)
    variance = np.sum(residual**2, axis=(0, 1)) / free  # of one probe, image by image
    return float(variance.mean() / num_estimates)


def _solver_error(
    done: dict[Any, dict[str, np.ndarray]], how: Likelihood, shape: tuple[int, ...]
) -> dict[str, Any]:
    """The first batch at the tolerance and at a tenth of it, with the same draws and probes."""
    num = min(how.batch_size, shape[0])
    scale = -np.prod(shape[1:]) * np.log(2)
    tight = done[0, 0, how.tolerance / 10]
    loose = done[0, 0, how.tolerance]
    at, at_tenth = ((d["log_weights"].mean(0) / scale)[:num] for d in (loose, tight))
    difference = (at - at_tenth).astype(np.float64)
    return {
        "num_images": num,
        "tolerance": how.tolerance,
        "bits_per_dim": float(at.mean()),
        "bits_per_dim_at_a_tenth": float(at_tenth.mean()),
        "difference": float(difference.mean()),
        "num_evaluations_at_a_tenth": int(tight["num_evaluations"]),
    }
