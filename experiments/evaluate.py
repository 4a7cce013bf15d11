"""From a run folder to a table: likelihood, sample quality and true cost, each with its error.

    python -m experiments.evaluate runs/digits

Writes evaluation.json, evaluation.md and pictures into RUN_FOLDER/evaluation. Started again, it
goes on where it was: batches of samples and log-densities that are on disk are not computed again.
The protocol, which figures are comparable and what each error means stand in the README.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

import fmjax as fm
from experiments import (
    curve,
    densities,
    drawing,
    images,
    judging,
    plane,
    plots,
    quality,
    report,
    trained,
    two_moons,
)
from experiments.run import environment, flags, lock, write_json
from experiments.store import Store, num_computed
from fmjax import data, dequantization, sharding
from fmjax.metrics import Estimate


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluates a finished run."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder of an image or 2-D experiment."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noise; the figures are means over them. The first also seeds the likelihood."""
    average: bool = True
    """Whether to evaluate the moving average of the parameters, or the last ones."""
    batch_size: int = 100
    """Examples per solve, over all devices."""
    tolerance: float = 1e-3
    """Of Tsit5, relative and absolute, in samples and likelihoods of images; 1e-5 in the plane."""
    num_samples: int = 1000
    """Samples per seed. Published figures want 50000. In the plane: as many as held-out points."""
    eval_examples: int = 256
    """Held-out images for bits/dim, the first of the run's --eval-split. In the plane 2048."""
    num_draws: int = 1
    """K, dequantisation draws per image; above 1 the importance-weighted bound is reported too."""
    dequantization: Literal["uniform", "truncated-normal"] = "uniform"
    """How levels become real numbers."""
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    """Hutchinson's estimate, or the exact trace, which costs a product per pixel."""
    num_probes: int = 2
    """Hutchinson probes per image, fixed during a solve; two or more show their own error."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """What the probes are drawn from."""
    judge: judging.JudgeConfig = judging.JudgeConfig()
    """What sample quality is measured with."""
    curve_examples: int = 500
    """Samples per point of the curve of quality against evaluations; 0 for no curve."""
    curve_evaluations: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 200)
    """Evaluations of the solvers with equal steps."""
    curve_tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    """Tolerances of the adaptive solvers."""


def main(config: Config) -> dict[str, Any]:
    check(config)
    name, run_config = trained.read_config(config.run)
    folder = config.run / "evaluation"
    folder.mkdir(exist_ok=True)
    with lock(folder):
        if isinstance(run_config, images.ImageConfig):
            result = evaluate_images(config, run_config, folder)
        else:
            assert isinstance(run_config, two_moons.Config), name
            result = evaluate_plane(config, run_config, folder)
        result["batches_computed"] = num_computed(folder)
        write_json(folder / "evaluation.json", result)
    table = report.table(result)
    (folder / "evaluation.md").write_text(table)
    print(f"\n{table}\nEvaluation folder  {folder}")
    return result


def check(config: Config) -> None:
    """Refuses flags that can't work, before anything is loaded."""
    for name in ("batch_size", "tolerance", "num_samples", "eval_examples", "num_draws"):
        if not getattr(config, name) > 0:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be positive; got {getattr(config, name)}.")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds) or min(config.seeds) < 0:
        raise ValueError(f"--seeds must be different and not negative; got {config.seeds}.")
    if config.num_probes < 1:
        raise ValueError(f"--num-probes must be at least 1; got {config.num_probes}.")
    sharding.check_batch_size(config.batch_size, jax.device_count())


def evaluate_images(
    config: Config, run_config: images.ImageConfig, folder: pathlib.Path
) -> dict[str, Any]:
    """Bits/dim, sample quality and the curve of an image run."""
    held_out = first(images.load(run_config, run_config.eval_split), config.eval_examples)
    event_shape = held_out.images.shape[1:]
    model = trained.load(config.run, event_shape, average=config.average)
    judge = judging.make_judge(config.judge, run_config, config.batch_size)
    for num in {config.num_samples, config.curve_examples or config.num_samples}:
        judge.check_num_samples(num)
    way = drawing.Way("Tsit5", tolerance=config.tolerance)
    shape = (config.batch_size, *event_shape)
    base = identity(model, config)

    how = likelihood_of(config, held_out)
    settings = base | how.settings | {"images": digest(held_out.images)}
    store = Store(folder, "log_prob", settings)
    likelihood = densities.measure(how, model, held_out, store, config.seeds[0])
    likelihood["images"] = (
        f"first {len(held_out.images)} of {run_config.dataset} {run_config.eval_split}"
    )

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
    plots.save_grid(drawn[:64], folder / "samples.png", num_levels=held_out.num_levels)

    def frechet(x1: np.ndarray) -> Estimate:
        return judge.frechet(judge.features(x1, held_out.num_levels, config.batch_size))

    tight = min(config.curve_tolerances) / 10
    label = judge.record["distance"]
    rows = measure_curve(config, model, folder, base, event_shape, frechet, label, tight)
    return {
        "protocol": protocol(config, model)
        | {"levels": f"samples rounded to the nearest of {held_out.num_levels} levels"},
        "likelihood": likelihood,
        "quality": measured | judge.record,
        "curve": rows,
    }


def evaluate_plane(
    config: Config, run_config: two_moons.Config, folder: pathlib.Path
) -> dict[str, Any]:
    """Log-likelihood, Wasserstein distance, density and the curve of a 2-D run."""
    num, tolerance = 2048, min(config.tolerance, 1e-5)
    held_out, another = (
        two_moons.moons(num, run_config.noise, 2**31 + 2 * run_config.seed + k) for k in range(2)
    )
    model = trained.load(config.run, (2,), average=config.average)
    base = identity(model, config) | {"tolerance": tolerance, "data": digest(held_out)}
    way = drawing.Way("Tsit5", tolerance=tolerance)
    store = Store(folder, "log_prob", base)
    likelihood = plane.likelihood(model, store, held_out, tolerance)
    density, mass = plane.density(model, store, tolerance)
    measured, drawn = plane.quality(
        model,
        Store(folder, "samples", base),
        plane.Points(held_out, another),
        way=way,
        batch_size=num - num % jax.device_count(),
        seeds=config.seeds,
    )
    plots.save_density(folder / "density.png", held_out, drawn, density, extent=plane.EXTENT)

    def wasserstein2(x1: np.ndarray) -> Estimate:
        return plane.wasserstein2_estimate(x1, held_out)

    label = "2-Wasserstein distance"
    rows = measure_curve(config, model, folder, base, (2,), wasserstein2, label, tight=1e-6)
    return {
        "protocol": protocol(config, model),
        "likelihood": likelihood | {"density_integral": mass},
        "quality": measured,
        "curve": rows,
    }


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
            "dequantization": config.dequantization,
            "divergence": "exact" if exact else f"hutchinson, {config.num_probes} {config.probe}",
            "solver": "Tsit5",
            "tolerance": config.tolerance,
            "seed": config.seeds[0],
        },
    )


def identity(model: trained.Trained, config: Config) -> dict[str, Any]:
    """What every stored number depends on. A solve's step is shared by its batch."""
    return {"parameters": model.digest, "batch_size": config.batch_size}


def protocol(config: Config, model: trained.Trained) -> dict[str, Any]:
    """How the figures were made: flags, parameters, device and versions."""
    asked = {name: value for name, value in flags(config).items() if name != "run"}
    return {
        "experiment": model.experiment,
        "step": model.step,
        "parameters": "moving average" if model.average else "last",
        "parameters_sha256": model.digest,
        "flags": asked,
    } | environment()


def first(dataset: data.ImageDataset, num: int) -> data.ImageDataset:
    """The first `num` examples, or all where there are fewer."""
    return dataset._replace(images=dataset.images[:num], labels=dataset.labels[:num])


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m experiments.evaluate", description=__doc__))
