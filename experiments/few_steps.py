"""What few steps buy: every way to draw in 1, 2, 4 and 8 evaluations, from one flow, at equal time.

    python -m experiments.few_steps
    python -m experiments.few_steps --dataset fashion_mnist --minutes 20 --seeds 0 \\
        --methods mean_flow alpha_flow shortcut longer --workdir runs/few_steps_fashion

A flow is trained first, by `experiments.flow_map --method flow_matching`. Every method goes on from
it for the same time, `--minutes`, flow matching itself among them ("longer"). An adversary belongs
on top of a flow map: "adversary_longer" goes on from MeanFlow's network for as long again, and
beside it MeanFlow itself ("mean_flow_longer"). The time is counted in steps, of what one step takes
on this machine, measured in turn before the first training, so that other work on it favours
nobody; compilation is not counted. Reflow pays for its pairs first, by the clock. The flow itself
is drawn from by Euler, Midpoint, Heun and Tsit5 at the counts that they know, and by learned
solvers.

FD and class accuracy are under the data set's encoder, trained at the first start, on
`--num-samples` samples of each seed; all ways begin at the same noise, told the class, without
guidance. What is trained or drawn already is not trained or drawn again.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import jax
import numpy as np

import fmjax as fm
from experiments import few_steps_report
from experiments.few_steps_runs import (
    ALL,
    KIND,
    learned,
    learned_figures,
    run_config,
    step_seconds,
    trained,
)
from fmjax import plotting
from fmjax.evaluation import judging
from fmjax.flow_maps import apply_solver
from fmjax.harness import command, keys
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.records import environment, write_json
from fmjax.harness.start import say
from fmjax.harness.store import Store, keep_settings
from fmjax.harness.task import Trained
from fmjax.tasks import flow_maps, images
from fmjax.tasks.flow_map_methods import METHODS

BATCH = 100  # samples per solve
SHOWN = 6  # samples of each way in the picture
PLACES = ("workdir", "record", "picture")  # flags that say nothing of the figures
LEARNED = "learned solver, "
Way = Callable[[Trained, Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Ways to draw in few steps, side by side."""

    workdir: pathlib.Path = pathlib.Path("runs/few_steps")
    """A folder of run folders and samples."""
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    """The images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One flow, one training of each method and one set of samples each."""
    minutes: float = 2.0
    """Of every training, the flow's included."""
    methods: tuple[str, ...] = ALL
    """What is trained from the flow; "longer" is flow matching again."""
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Evaluations of a draw."""
    num_pairs: int = 4096
    """Pairs that reflow learns from."""
    num_samples: int = 500
    """Of each seed and way."""
    judge: judging.JudgeConfig = judging.JudgeConfig()
    """What sample quality is measured with."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, in experiments/benchmarks/results for instance; one that
    is there gains these seeds, methods and steps."""
    picture: pathlib.Path | None = None
    """A PNG of a few samples of each way of this call."""


def solved(**options: Any) -> Way:
    """The velocity's own flow, by a solver."""

    def way(model: Trained, params: Any, key: jax.Array, x0: jax.Array, labels: jax.Array) -> Any:
        del key
        trajectory = fm.integrate(model.velocity(params, labels), x0, **options)
        return trajectory.x[-1], trajectory.num_evaluations

    return way


def jumped(name: str, num_steps: int) -> Way:
    """A flow map's own way."""

    def way(model: Trained, params: Any, key: jax.Array, x0: jax.Array, labels: jax.Array) -> Any:
        adversary = KIND.get(name, name) == "adversary"
        given = params["generator"] if adversary else params
        average = flow_maps.average_velocity_of(flow_maps.network_of(model), given, labels)
        method = METHODS["mean_flow" if adversary else KIND.get(name, name)]
        return method.sample(key, average, x0, num_steps), num_steps

    return way


def by_its_solver(
    model: Trained, given: Any, key: jax.Array, x0: jax.Array, labels: jax.Array
) -> Any:
    """The flow by a learned solver: `given` is (parameters, solver)."""
    del key
    params, solver = given
    x1 = apply_solver(model.velocity(params, labels), solver, x0)
    return x1, len(solver.ts)


ADAPTIVE = solved(stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3))


def ways(config: Config, name: str) -> dict[str, Way]:
    """All ways to draw from a training."""
    euler = {f"Euler, {n}": solved(solver=diffrax.Euler(), num_steps=n) for n in config.steps}
    if name in ("longer", "reflow"):
        return euler | {"adaptive": ADAPTIVE}
    if name != "flow":
        return {f"{n}": jumped(name, n) for n in config.steps} | {"adaptive": ADAPTIVE}
    even = [n for n in config.steps if n % 2 == 0]
    return (
        euler
        | {"Euler, 16": solved(solver=diffrax.Euler(), num_steps=16)}
        | {f"Midpoint, {n}": solved(solver=diffrax.Midpoint(), num_steps=n // 2) for n in even}
        | {f"Heun, {n}": solved(solver=diffrax.Heun(), num_steps=n // 2) for n in even}
        | {f"Tsit5, {6 * n + 1}": solved(solver=diffrax.Tsit5(), num_steps=n) for n in (1, 2)}
        | {f"{LEARNED}{n}": by_its_solver for n in config.steps}
        | {"adaptive": ADAPTIVE}
    )


def draw(config: Config, name: str, label: str, way: Way, models: list[Trained]) -> list[Any]:
    """Pixel values and evaluations of every seed's network, drawn once and kept."""
    num, samples = config.num_samples, models[0].task.samples
    labels = models[0].condition(np.arange(num))
    assert samples is not None  # of every image run
    solve = jax.jit(functools.partial(way, models[0]))

    def arrays(seed: int, model: Trained) -> dict[str, np.ndarray]:
        key_x0, key_way = jax.random.split(keys.key(seed, "samples"))
        x0, parts, counts = model.source.sample(key_x0, num), [], []
        given: Any = model.params
        if label.startswith(LEARNED):
            given = given, learned(config, seed, int(label.removeprefix(LEARNED)))
        for first in range(0, num, BATCH):
            rows = np.arange(first, first + BATCH) % num
            key = jax.random.fold_in(key_way, first)
            x1, count = solve(given, key, x0[rows], labels[rows])
            parts.append(samples.arrays(np.asarray(x1))["images"][: num - first])
            counts.append(int(count))
        return {"images": np.concatenate(parts), "evaluations": np.asarray(np.mean(counts))}

    found = []
    for seed, model in zip(config.seeds, models, strict=True):
        settings = {"parameters": model.digest, "seed": seed, "num_samples": num}
        if label.startswith(LEARNED):
            solver = learned(config, seed, int(label.removeprefix(LEARNED)))
            settings["solver"] = [np.asarray(part).tolist() for part in solver]
        kept = Store(config.workdir / "drawn", name, settings)
        found.append(kept.get(label.replace(", ", "_"), functools.partial(arrays, seed, model)))
    return found


def judge_of(config: Config) -> tuple[judging.Judge, images.Pictures]:
    """What quality is measured with, refused if it can't be of so few samples; and the images."""
    judging.check(config.judge)
    run = run_config(config, "flow", config.seeds[0], 1)
    pictures = images.Pictures(run)
    judge = judging.make_judge(config.judge, images.real_images(run, pictures), BATCH)
    judge.check_num_samples("--num-samples", config.num_samples)
    return judge, pictures


def measure(
    config: Config,
    models: dict[str, list[Trained]],
    judge: judging.Judge,
    pictures: images.Pictures,
) -> dict[str, Any]:
    """A row for each training and way, each with what every seed gave, and real images'."""
    num = config.num_samples
    labels = models["flow"][0].condition(np.arange(num))
    rows, shown = [], []
    for name, of_seeds in models.items():
        for label, way in ways(config, name).items():
            drawn = draw(config, name, label, way, of_seeds)
            row = {"training": name, "way": label, "seeds": list(config.seeds)}
            row |= {"evaluations": [float(found["evaluations"]) for found in drawn]}
            row |= {"num_steps": [model.config.num_steps for model in of_seeds]}  # of training
            rows.append(row | judge.of_sets([(found["images"], labels) for found in drawn], BATCH))
            shown.append((name, label, drawn[0]["images"][:SHOWN]))
            say(few_steps_report.line(rows[-1]))
    real = pictures.train
    if config.picture is not None:
        plotting.save(config.picture, few_steps_report.picture(shown, real.num_levels))
    found = judge.of_sets(judging.real_sets(real, labels, config.seeds), BATCH)
    found = {"seeds": list(config.seeds)} | found
    return {"samples": rows, "real": found, "judge": judge.record}


def main(config: Config) -> dict[str, Any]:
    check_numbers(config, may_be_zero={"seeds"})
    check_seeds("seeds", config.seeds)
    for name, given in (("methods", config.methods), ("steps", config.steps)):
        if len(set(given)) < len(given):
            raise ValueError(f"--{name} must name each once; got {' '.join(map(str, given))}.")
    if unknown := set(config.methods) - set(ALL):
        raise ValueError(f"--methods must be of {', '.join(ALL)}; got {unknown.pop()}.")
    if unknown := set(config.steps) - {*few_steps_report.COUNTS}:
        counts = ", ".join(map(str, few_steps_report.COUNTS))
        raise ValueError(f"--steps must be of {counts}, the table's columns; got {unknown.pop()}.")
    known = None
    if config.record is not None and config.record.exists():
        known = json.loads(config.record.read_text())
        few_steps_report.check_kind(known, config)
    kind = {name: getattr(config, name) for name in ("dataset", "minutes", "num_pairs")}
    keep_settings(config.workdir, kind)
    judge, pictures = judge_of(config)  # before hours of training
    models: dict[str, list[Trained]] = {}
    for seed in config.seeds:
        for name in ("flow", *config.methods):
            models.setdefault(name, []).append(trained(config, name, seed))
    flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    record: dict[str, Any] = environment()
    record["config"] = {name: flags[name] for name in flags if name not in PLACES}
    record["step_seconds"] = {name: step_seconds(config, name) for name in models}
    record |= measure(config, models, judge, pictures)
    solvers = itertools.product(config.seeds, config.steps)
    record["learned"] = [learned_figures(config, seed, n) for seed, n in solvers]
    if config.record is not None:
        record = record if known is None else few_steps_report.merged(known, record)
        write_json(config.record, record)
    print(few_steps_report.table(record))
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.few_steps", doc=__doc__)
