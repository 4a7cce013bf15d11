"""DDPM beside flow matching: the same network, data, batches and steps; every sampler on both.

    python -m experiments.benchmarks.ddpm

`experiments.digits` trains a velocity along `cond_ot`, `experiments.ddpm` a prediction of the noise
along `vp`; both are told the class and drawn from without guidance. Either network is then solved

    Euler      in equal steps along `cond_ot`
    Tsit5      along `cond_ot`, at tolerance 1e-3
    DDIM       in equal steps of `vp`'s time: Euler on the grid of `match_times`
    ancestral  by DDPM's own steps, an SDE along `vp`, after a change of schedule to it

so that what the training does and what the sampler does can be told apart. FD and class accuracy
are under the digits' encoder, trained at the first start; each seed is one training and 500
samples, and all ways begin at the same noise. Bits/dim is what both runs print at their end.

`x1 near the noise` is the root mean square per pixel, of [-1, 1], by which x1 as either network
predicts it at t = 0.05 is off the mean of the class.

On two cores of a shared server that did much else: 100 minutes for one seed.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

import fmjax as fm
from experiments import ddpm, digits, in_turn
from experiments.benchmarks import ddpm_report
from fmjax import plotting
from fmjax.data import load_digits, pixels
from fmjax.evaluation import judging
from fmjax.harness import command, keys, train
from fmjax.harness.read import read
from fmjax.harness.records import environment, write_json
from fmjax.harness.store import Store
from fmjax.harness.task import Trained
from fmjax.tasks import images

STRAIGHT, BATCH = fm.cond_ot(), 128
OWN = ("ancestral, 1000 steps",)  # minutes, and the other network is spared them
NETWORKS: dict[str, Any] = {"flow matching": digits, "DDPM": ddpm}
Sampler = Callable[[fm.Velocity, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """DDPM beside flow matching on the 8x8 digits, over seeds."""

    workdir: pathlib.Path = pathlib.Path("runs/ddpm_beside_fm")
    """A folder of run folders; what is trained already is not trained again."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of each network, and one set of samples."""
    num_steps: int = 800
    """Training steps of each."""
    steps: tuple[int, ...] = (10, 50, 100)
    """Equal steps of Euler's and of DDIM's solves."""
    ancestral_steps: tuple[int, ...] = (50, 100, 1000)
    """Of DDPM's sampler."""
    num_samples: int = 500
    """Of each seed and way."""
    repetitions: int = 20
    """Timed training steps of each."""
    judge: judging.JudgeConfig = judging.JudgeConfig()
    """What sample quality is measured with."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/ddpm.json."""
    picture: pathlib.Path | None = None
    """A PNG of a few samples of each network."""


def solve(**options: Any) -> Sampler:
    """A flow along `cond_ot`."""

    def sampler(velocity: fm.Velocity, key: jax.Array, x0: jax.Array) -> tuple[jax.Array, Any]:
        del key
        trajectory = fm.integrate(velocity, x0, **options)
        return trajectory.x[-1], trajectory.num_evaluations

    return sampler


def ddim(num_steps: int) -> Sampler:
    """DDIM in equal steps of `vp`'s time, of a velocity along `cond_ot`."""

    def sampler(velocity: fm.Velocity, key: jax.Array, x0: jax.Array) -> tuple[jax.Array, Any]:
        ts = jnp.linspace(0.0, 1.0, num_steps + 1)
        grid = fm.match_times(ddpm.PATH, STRAIGHT, ts)
        scales = fm.match_scales(ddpm.PATH, STRAIGHT, ts)
        euler = solve(
            solver=diffrax.Euler(),
            t0=grid[0],
            t1=grid[-1],
            stepsize_controller=diffrax.StepTo(grid),
        )
        x, num_evaluations = euler(velocity, key, scales[0] * x0)
        return x / scales[-1], num_evaluations

    return sampler


def ancestral(num_steps: int) -> Sampler:
    """DDPM's sampler along `vp`, of a velocity along `cond_ot`."""

    def sampler(velocity: fm.Velocity, key: jax.Array, x0: jax.Array) -> tuple[jax.Array, Any]:
        along = fm.change_path(velocity, STRAIGHT, ddpm.PATH)
        drift = fm.ancestral_drift(ddpm.PATH, along, num_steps)
        diffusion = fm.ancestral_diffusion(ddpm.PATH, num_steps)
        return fm.sample_sde(key, drift, diffusion, x0, num_steps=num_steps), num_steps

    return sampler


def samplers(config: Config) -> dict[str, Sampler]:
    """All ways to draw, by their rows in the table."""
    tolerance = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    euler = {
        f"Euler, {n} equal steps": solve(solver=diffrax.Euler(), num_steps=n) for n in config.steps
    }
    return (
        euler
        | {"Tsit5, tolerance 0.001": solve(stepsize_controller=tolerance)}
        | {f"DDIM, {n} steps": ddim(n) for n in config.steps}
        | {f"ancestral, {n} steps": ancestral(n) for n in config.ancestral_steps}
    )


def trained(config: Config, name: str, seed: int) -> tuple[Trained, dict[str, Any]]:
    """A network, and what its training printed."""
    module = NETWORKS[name]
    folder = config.workdir / f"{module.__name__.rpartition('.')[2]}_s{seed}"
    if not (folder / "summary.json").exists():
        flags = {"num_steps": config.num_steps, "num_samples": 0, "preview_every": 0}
        run = module.Config(workdir=epath.Path(folder), seed=seed, **flags)
        train(run, module.make_task)
    return read(epath.Path(folder)), json.loads((folder / "summary.json").read_text())


def draw(config: Config, way: str, models: list[Trained]) -> list[tuple[np.ndarray, int]]:
    """Pixel values and evaluations of every seed's network, drawn once and kept."""
    sampler, num = samplers(config)[way], config.num_samples
    labels, levels = models[0].condition(np.arange(num)), load_digits("test").num_levels

    @jax.jit
    def solved(params: Any, key: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        key_x0, key_noise = jax.random.split(key)
        x0 = models[0].source.sample(key_x0, num)
        return sampler(models[0].velocity(params, labels), key_noise, x0)

    def arrays(seed: int, model: Trained) -> dict[str, np.ndarray]:
        x1, evaluations = solved(model.params, keys.key(seed, "samples"), labels)
        images = pixels.quantize(x1, levels)
        return {"images": np.asarray(images), "evaluations": np.asarray(evaluations)}

    found = []
    for seed, model in zip(config.seeds, models, strict=True):
        kind = type(model.config).__module__  # equal parameters may be another velocity
        settings = {"run": kind, "parameters": model.digest, "seed": seed, "num_samples": num}
        kept = Store(config.workdir / "drawn", "samples", settings)
        drawn = kept.get(way, functools.partial(arrays, seed, model))
        found.append((drawn["images"], int(drawn["evaluations"])))
    return found


def measure(config: Config, models: dict[str, list[Trained]]) -> dict[str, Any]:
    """A row for each sampler and network, each with what every seed gave, and real images'."""
    run, num = models["DDPM"][0].config, config.num_samples
    pictures = images.Pictures(run)
    judge = judging.make_judge(config.judge, images.real_images(run, pictures), BATCH)
    rows, shown, labels = [], [], models["DDPM"][0].condition(np.arange(num))
    for way in samplers(config):
        for name, of_seeds in models.items():
            if way in OWN and name != "DDPM":
                continue
            drawn = draw(config, way, of_seeds)
            row = {"sampler": way, "network": name, "evaluations": [n for _, n in drawn]}
            rows.append(row | judge.of_sets([(x1, labels) for x1, _ in drawn], BATCH))
            shown.append(drawn[0][0][:20])
            print(rows[-1], flush=True)
    real = pictures.train
    if config.picture is not None:
        picture = plotting.grid(np.concatenate(shown), columns=20, num_levels=real.num_levels)
        plotting.save(config.picture, picture)
    found = judge.of_sets(judging.real_sets(real, labels, config.seeds), BATCH)
    return {"samples": rows, "real": found, "judge": judge.record}


def early_error(models: dict[str, list[Trained]], t: float = 0.05) -> dict[str, list[float]]:
    """How far x1 as predicted near the noise is from the class mean, root mean square per pixel.

    At the points (1 - t) x0 + t mean, where next to nothing but the class is known of the image.
    """
    real, labels = load_digits("train"), np.arange(500) % 10
    x1 = (2 * real.images.astype(np.float32) + 1) / real.num_levels - 1
    mean = jnp.asarray(np.stack([x1[real.labels == label].mean(0) for label in range(10)])[labels])
    x = (1 - t) * jax.random.normal(jax.random.key(0), mean.shape) + t * mean
    found: dict[str, list[float]] = {}
    for name, of_seeds in models.items():
        velocity = of_seeds[0].velocity
        guess = jax.jit(lambda p, velocity=velocity: x + (1 - t) * velocity(p, labels)(t, x))
        guesses = [guess(model.params) for model in of_seeds]
        found[name] = [float(jnp.sqrt(jnp.mean((x1 - mean) ** 2))) for x1 in guesses]
    return found


def step_milliseconds(models: dict[str, list[Trained]], repetitions: int) -> dict[str, list[float]]:
    """Training steps of both networks in turn, after a first one of each."""
    steps = {}
    for name, of_seeds in models.items():
        step, args = in_turn.training_step(of_seeds[0].task, of_seeds[0].config.batch_size)
        steps[name] = functools.partial(step, *args)
    return in_turn.milliseconds(steps, repetitions)


def main(config: Config) -> dict[str, Any]:
    models: dict[str, list[Trained]] = {name: [] for name in NETWORKS}
    runs, kept = [], ("bits_per_dim", "bits_per_dim_standard_error", "bits_per_dim_method")
    for seed in config.seeds:
        for name in NETWORKS:
            model, summary = trained(config, name, seed)
            models[name].append(model)
            runs.append({"network": name, "seed": seed} | {key: summary[key] for key in kept})
    record: dict[str, Any] = environment() | {"runs": runs}
    flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    record["config"] = {name: flags[name] for name in flags if name not in ("record", "picture")}
    record["step_ms"] = step_milliseconds(models, config.repetitions)
    record |= {"early_error": early_error(models)} | measure(config, models)
    print(ddpm_report.table(record), ddpm_report.samples(record), sep="\n")
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.ddpm", doc=__doc__)
