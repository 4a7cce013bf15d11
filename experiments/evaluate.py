"""From a run folder to a table: likelihood, sample quality and true cost, each with its error.

    python -m experiments.evaluate runs/digits

Writes evaluation.json, evaluation.md and pictures into RUN_FOLDER/evaluation. Started again, it
resumes where it was: batches of samples and log-densities that are on disk are not computed again.
The protocol, which figures are comparable and what each error means are in experiments/README.md.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import fmjax as fm
from experiments import (
    curve,
    densities,
    drawing,
    images,
    judging,
    plane,
    plots,
    protocol,
    quality,
    report,
    trained,
    two_moons,
)
from experiments.protocol import Config
from fmjax import data
from fmjax.data import dequantization
from fmjax.harness import command
from fmjax.harness.config import RunConfig
from fmjax.harness.records import lock, write_json, write_text, writing
from fmjax.harness.store import Store, num_computed
from fmjax.metrics import Estimate
from fmjax.training import digests


def main(config: Config) -> dict[str, Any]:
    protocol.check(config)
    name, run_config = trained.read_config(config.run)
    folder = config.run / "evaluation"
    with writing(folder, lambda: "what is computed stays"):
        result = evaluate(config, name, run_config, folder)
    print(f"\n{report.table(result)}\nEvaluation folder  {folder}")
    return result


def evaluate(
    config: Config, name: str, run_config: RunConfig, folder: pathlib.Path
) -> dict[str, Any]:
    """The figures of a run, written to its evaluation folder."""
    folder.mkdir(exist_ok=True)
    with lock(folder):
        if isinstance(run_config, images.ImageConfig):
            result, draw_curve = evaluate_images(config, run_config, folder)
        else:
            assert isinstance(run_config, two_moons.Config), name
            result, draw_curve = evaluate_plane(config, run_config, folder)
        # The curve is the long part: the figures are on disk before it begins.
        for curve_rows in (lambda: [], draw_curve):
            result["curve"] = curve_rows()
            result["batches_computed"] = num_computed(folder)
            write_json(folder / "evaluation.json", result)
            write_text(folder / "evaluation.md", report.table(result))
    return result


def evaluate_images(
    config: Config, run_config: images.ImageConfig, folder: pathlib.Path
) -> tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]:
    """Bits/dim and sample quality of an image run, and what measures its curve."""
    trained.check_own_data(config.run, run_config)
    held_out = protocol.first(images.load(run_config, run_config.eval_split), config.eval_examples)
    event_shape = held_out.images.shape[1:]
    model = trained.load(
        config.run,
        event_shape,
        average=config.average,
        num_classes=held_out.num_classes,
        guidance=config.guidance,
    )
    judge = judging.make_judge(config.judge, run_config, config.batch_size)
    judge.check_num_samples("--num-samples", config.num_samples)
    if config.curve_examples:
        judge.check_num_samples("--curve-examples", config.curve_examples)
    way = drawing.Way("Tsit5", tolerance=config.tolerance)
    shape = (config.batch_size, *event_shape)
    base = protocol.identity(model, config)

    how = likelihood_of(config, held_out)
    settings = base | how.settings | {"images": digests.hash_array(held_out.images)}
    store = Store(folder, "log_prob", settings)
    likelihood = densities.measure(how, model, held_out, store, config.seeds[0])
    likelihood["images_sha256"] = settings["images"]
    likelihood["begun_on"] = store.begun_on
    given = "" if model.num_classes is None else ", given their classes"
    likelihood["images"] = (
        f"first {len(held_out.images)} of {run_config.dataset} {run_config.eval_split}{given}"
    )
    if model.num_classes is not None:  # samples depend on it, likelihoods don't
        base |= {"guidance": config.guidance}

    measured, drawn = quality.measure(
        model,
        judge,
        folder,
        base | {"way": list(way)},
        way=way,
        shape=shape,
        num_levels=held_out.num_levels,
        num_samples=config.num_samples,
        seeds=config.seeds,
    )
    columns, labels = None, model.labels(np.arange(len(drawn)))
    if labels is None:
        drawn = drawn[:64]
    else:  # a row for each class, of at most eight
        kept = np.arange(len(drawn)) < 8 * held_out.num_classes
        drawn, columns = plots.by_class(drawn[kept], labels[kept], held_out.num_levels)
    picture = folder / "samples.png"
    plots.save_grid(drawn, picture, num_levels=held_out.num_levels, columns=columns)

    def frechet(x1: np.ndarray) -> Estimate:
        return judge.frechet(judge.features(x1, held_out.num_levels, config.batch_size))

    tight = min(config.curve_tolerances) / 10
    label = judge.record["distance"]
    result = {
        "protocol": protocol.record(config, model)
        | {"levels": f"samples rounded to the nearest of {held_out.num_levels} levels"},
        "likelihood": likelihood,
        "quality": measured | judge.record,
    }
    return result, lambda: measure_curve(
        config, model, folder, base, event_shape, frechet, label, tight
    )


def evaluate_plane(
    config: Config, run_config: two_moons.Config, folder: pathlib.Path
) -> tuple[dict[str, Any], Callable[[], list[dict[str, Any]]]]:
    """Log-likelihood, distances and density of a 2-D run, and what measures its curve."""
    protocol.refuse_image_flags(config)
    num, tolerance = protocol.NUM_POINTS, 1e-5
    held_out, another = (
        two_moons.moons(num, run_config.noise, 2**31 + 2 * run_config.seed + k) for k in range(2)
    )
    model = trained.load(config.run, (2,), average=config.average)
    base = protocol.identity(model, config) | {
        "tolerance": tolerance,
        "data": digests.hash_array(held_out),
    }
    way = drawing.Way("Tsit5", tolerance=tolerance)
    at_once = num - num % jax.device_count()
    store = Store(folder, "log_prob", base)
    likelihood = plane.likelihood(model, store, held_out, tolerance)
    density, mass = plane.density(model, store, tolerance)
    measured, drawn = plane.quality(
        model,
        Store(folder, "samples", base | {"batch_size": at_once}),
        plane.Points(held_out, another),
        way=way,
        batch_size=at_once,
        seeds=config.seeds,
    )
    plots.save_density(folder / "density.png", held_out, drawn, density, extent=plane.EXTENT)

    def wasserstein2(x1: np.ndarray) -> Estimate:
        return plane.wasserstein2_estimate(x1, held_out)

    label = "2-Wasserstein distance"
    result = {
        "protocol": protocol.record(config, model, leave_out=protocol.IMAGE_FLAGS),
        "likelihood": likelihood | {"density_integral": mass},
        "quality": measured,
    }
    return result, lambda: measure_curve(
        config, model, folder, base, (2,), wasserstein2, label, tight=1e-6
    )


def measure_curve(
    config: Config,
    model: trained.Trained,
    folder: pathlib.Path,
    base: dict[str, Any],
    event_shape: tuple[int, ...],
    measure: Callable[[np.ndarray], Estimate],
    label: str,
    tight: float,
) -> list[dict[str, Any]]:
    """The curve's rows and its picture, or none where the flags ask for none."""
    if not config.curve_examples:
        return []
    store = Store(folder, "curve", base)
    points = drawing.ways(config.curve_evaluations, config.curve_tolerances)
    rows = curve.measure(
        model,
        store,
        (config.batch_size, *event_shape),
        config.curve_examples,
        points,
        measure,
        seed=config.seeds[0],
        tight=tight,
    )
    plots.save_curve(rows, folder / "curve.png", label=label)
    return rows


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
        batch_size=config.batch_size,
        settings={
            "dequantization": names[config.dequantization],
            "divergence": "exact" if exact else f"hutchinson, {config.num_probes} {config.probe}",
            "solver": "Tsit5",
            "tolerance": config.tolerance,
            "seed": config.seeds[0],
        },
    )


if __name__ == "__main__":
    command.run(main, Config, name="experiments.evaluate", doc=__doc__)
