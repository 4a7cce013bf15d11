"""Evaluation of an image run: bits/dim, sample quality, and quality against cost."""

import pathlib
from typing import Any

import jax
import numpy as np

import fmjax as fm
from fmjax import data, plotting
from fmjax.data import dequantization
from fmjax.evaluation import curve, densities, drawing, judging, protocol, quality, report
from fmjax.evaluation.protocol import Config
from fmjax.harness import share
from fmjax.harness.pods import cluster
from fmjax.harness.store import Store, num_computed
from fmjax.harness.task import Trained
from fmjax.metrics import Estimate
from fmjax.training import digests


def evaluate(
    images: judging.RealImages, trained: Trained, folder: pathlib.Path, config: Config
) -> dict[str, Any]:
    """What `fmjax.evaluation.evaluate` writes of an image run.

    Args:
      images: what it was trained on.
      trained: the run.
      folder: the evaluation's folder.
      config: the flags of the evaluation.

    Returns:
      What stands in evaluation.json; in a pod process 0's is.
    """
    conditional = trained.condition(np.arange(1)) is not None
    held_out = protocol.first(images.load(images.eval_split), config.eval_examples)
    judge = judging.make_judge(config.judge, images, config.batch_size)
    judge.check_num_samples("--num-samples", config.num_samples)
    if config.curve_examples:
        judge.check_num_samples("--curve-examples", config.curve_examples)
    way = drawing.Way("Tsit5", tolerance=config.tolerance)
    base = protocol.identity(trained, config)

    how, sha256 = likelihood_of(config, held_out), digests.hash_array(held_out.images)
    store = Store(folder, "log_prob", base | how.settings | {"images": sha256})
    asked: Any = (how, trained, held_out, store, config.seeds[0])
    solves = densities.batches(*asked, conditional=conditional)
    if conditional:  # samples depend on it, likelihoods don't
        base |= {"guidance": config.guidance}
    samples = quality.batches(
        trained,
        judge,
        folder,
        base | {"way": list(way)},
        way=way,
        batch_size=config.batch_size,
        num_levels=held_out.num_levels,
        num_samples=config.num_samples,
        seeds=config.seeds,
    )
    share.solve([*solves.values(), *quality.unpacked(samples)], "batches")

    def figures() -> dict[str, Any]:
        likelihood = densities.measure(*asked, conditional=conditional)
        given = ", given their classes" if conditional else ""
        about = f"first {len(held_out.images)} of {images.dataset} {images.eval_split}{given}"
        likelihood |= {"images_sha256": sha256, "begun_on": store.begun_on, "images": about}
        measured, drawn = quality.measure(
            samples, trained, judge, way=way, num_samples=config.num_samples, seeds=config.seeds
        )
        _save_picture(folder / "samples.png", trained, held_out, drawn)
        result = {
            "protocol": protocol.record(config, trained)
            | {"levels": f"samples rounded to the nearest of {held_out.num_levels} levels"},
            "likelihood": likelihood,
            "quality": measured | judge.record,
            "curve": [],
            "batches_computed": num_computed(folder),
        }
        result["rows"] = report.rows_of_images(result)
        result["larger_budget"] = report.budget_of_images(result, config.curve_examples)
        report.write(folder, result)  # the curve is the long part: the figures are on disk before
        return result

    def frechet(x1: np.ndarray) -> Estimate:
        return judge.frechet(judge.features(x1, held_out.num_levels, config.batch_size))

    result = cluster.main_first(figures) or {}
    tight = min(config.curve_tolerances) / 10
    label = judge.record["distance"]
    rows = curve.draw(config, trained, folder, base, frechet, label, tight)
    return result | {"curve": rows, "batches_computed": num_computed(folder)}


def _save_picture(
    path: pathlib.Path, trained: Trained, held_out: data.ImageDataset, drawn: np.ndarray
) -> None:
    """Some of the samples in a grid, or of each class in a row."""
    labels, levels = trained.condition(np.arange(len(drawn))), held_out.num_levels
    kept = np.arange(len(drawn)) < (64 if labels is None else 8 * held_out.num_classes)
    plotting.save(
        path,
        plotting.grid(drawn[kept], num_levels=levels)
        if labels is None
        else plotting.by_class(drawn[kept], labels[kept], levels),
    )


def likelihood_of(config: Config, held_out: data.ImageDataset) -> densities.Likelihood:
    """The estimator that the flags describe."""
    dequantizers = {
        "uniform": dequantization.uniform_dequantizer(held_out.num_levels),
        "truncated-normal": dequantization.truncated_normal_dequantizer(held_out.num_levels),
    }
    names = {"uniform": "uniform", "truncated-normal": "truncated-normal (std 0.5 levels)"}
    probes = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}

    def hutchinson(key: jax.Array) -> fm.Divergence:
        return fm.hutchinson_estimates(key, config.num_probes, probe=probes[config.probe])

    exact = config.divergence == "exact"
    return densities.Likelihood(
        dequantizer=dequantizers[config.dequantization],
        divergence=(lambda key: fm.exact_divergence()) if exact else hutchinson,
        num_draws=config.num_draws,
        tolerance=config.tolerance,
        batch_size=min(config.batch_size, len(held_out.images)),
        settings={
            "dequantization": names[config.dequantization],
            "divergence": "exact" if exact else f"hutchinson, {config.num_probes} {config.probe}",
            "solver": "Tsit5",
            "tolerance": config.tolerance,
            "seed": config.seeds[0],
        },
    )
