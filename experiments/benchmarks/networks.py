"""A transformer beside the U-Net, and Muon beside Adam, each at the same minutes of training.

    python -m experiments.benchmarks.networks
    python -m experiments.benchmarks.networks --dataset fashion_mnist --minutes 30

Every row is a training of its own, of as many steps as its minutes hold: of what one step takes on
this machine, measured in turn before the first training, so that other work on it favours nobody;
compilation is not counted. The learning rate falls to zero at the last step. All else is the same
for all rows: data, batch, path, source, times, average, and of the learning rates given the one
that the row's optimiser is given. FD and class accuracy are under the data set's encoder, trained
at the first start, of class-conditional samples without guidance, Tsit5 at 1e-3.

A row that is recorded is not trained again, and a training that was stopped resumes.
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
from etils import epath

import fmjax as fm
from experiments import digits, in_turn, mnist
from fmjax.data import pixels
from fmjax.evaluation import judging
from fmjax.harness import command, keys, train
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.read import read
from fmjax.harness.records import environment, write_json
from fmjax.harness.start import say
from fmjax.harness.store import keep_settings
from fmjax.harness.task import Trained
from fmjax.tasks import images
from fmjax.tasks.image_networks import choose_kernels

BATCH = 128
LONG = 100_000  # training steps, whose kernels are taken
KINDS = tuple(itertools.product(("unet", "dit"), ("adam", "muon")))
SUMMARY = ("step", "num_parameters", "loss", "bits_per_dim")


@dataclasses.dataclass(frozen=True)
class Config:
    """The networks of image experiments under both optimisers, at equal minutes."""

    workdir: pathlib.Path = pathlib.Path("runs/networks")
    """A folder of run folders and of a record for each row."""
    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images."""
    minutes: float = 4.0
    """Of each training."""
    seeds: tuple[int, ...] = (0,)
    """One training of each row."""
    adam_rate: float = 2e-3
    """Adam's learning rate."""
    muon_rate: float = 5e-3
    """Muon's, for its Adam too."""
    timed_steps: int = 15
    """Timed steps of each kind."""
    num_samples: int = 500
    """Of each row."""
    judge: judging.JudgeConfig = judging.JudgeConfig()
    """What sample quality is measured with."""
    record: pathlib.Path | None = None
    """A JSON file for all rows, such as experiments/benchmarks/results/networks.json."""


def run_config(
    config: Config, network: Any, optimizer: Any, seed: int, folder: str
) -> tuple[Any, Any]:
    """The module of the data's experiment, and a row's flags but for the steps."""
    module = digits if config.dataset == "digits" else mnist
    run = module.Config(
        workdir=epath.Path(config.workdir / folder),
        dataset=config.dataset,
        conditional=True,
        network=network,
        optimizer=optimizer,
        learning_rate=config.muon_rate if optimizer == "muon" else config.adam_rate,
        seed=seed,
        preview_every=0,
        num_samples=0,
        num_steps=LONG,
    )
    return module, dataclasses.replace(run, kernels=choose_kernels(run))


def step_seconds(config: Config) -> dict[str, float]:
    """What a training step of every kind takes, by "network_optimizer", measured once and kept."""
    path = config.workdir / f"step_seconds_{config.dataset}.json"
    if not path.exists():
        say("Timing the training steps ...")
        steps = {"_".join(kind): _step(config, *kind) for kind in KINDS}
        found = in_turn.medians(steps, config.timed_steps)
        config.workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, {kind: ms / 1e3 for kind, ms in found.items()})
    return json.loads(path.read_text())


def _step(config: Config, network: str, optimizer: str) -> Callable[[], Any]:
    """One training step, of a new network."""
    module, run = run_config(config, network, optimizer, 0, "timed")
    step, args = in_turn.training_step(module.make_task(run), run.batch_size)
    return functools.partial(step, *args)


def trained(config: Config, network: str, optimizer: str, seed: int) -> tuple[Trained, Any]:
    """A network, and what its training printed."""
    folder = f"{config.dataset}_{network}_{optimizer}_{config.minutes:g}min_s{seed}"
    module, run = run_config(config, network, optimizer, seed, folder)
    summary = config.workdir / folder / "summary.json"
    if not summary.exists():
        steps = {kind: round(60 * config.minutes / s) for kind, s in step_seconds(config).items()}
        if min(steps.values()) <= run.warmup_steps:
            raise ValueError(
                f"--minutes must hold more steps than the {run.warmup_steps} of the warm-up; "
                f"{config.minutes:g} hold {min(steps.values())}. Give more."
            )
        num_steps = steps[f"{network}_{optimizer}"]
        run = dataclasses.replace(run, num_steps=num_steps, decay_steps=num_steps)
        train(run, module.make_task)
    return read(epath.Path(config.workdir / folder)), json.loads(summary.read_text())


def draw(config: Config, model: Trained, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Pixel values, classes, and evaluations of the velocity."""
    labels = model.condition(np.arange(config.num_samples))
    tolerance = diffrax.PIDController(rtol=1e-3, atol=1e-3)

    @jax.jit
    def solved(params: Any, key: jax.Array, labels: Any) -> tuple[jax.Array, Any]:
        x0 = model.source.sample(key, config.num_samples)
        velocity = model.velocity(params, labels)
        trajectory = fm.integrate(velocity, x0, stepsize_controller=tolerance)
        return trajectory.x[-1], trajectory.num_evaluations

    x1, evaluations = solved(model.params, keys.key(seed, "samples"), labels)
    levels = images.Pictures(model.config).num_levels
    return np.asarray(pixels.quantize(x1, levels)), labels, int(evaluations)


def row(config: Config, network: str, optimizer: str, seed: int) -> dict[str, Any]:
    """A row of the table: trained, drawn from and measured, or read."""
    name = f"{config.dataset}_{network}_{optimizer}_{config.minutes:g}min_s{seed}"
    kept = config.workdir / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    model, summary = trained(config, network, optimizer, seed)
    real = images.real_images(model.config, images.Pictures(model.config))
    judge = judging.make_judge(config.judge, real, BATCH)
    x1, labels, evaluations = draw(config, model, seed)
    figures = judge.figures(judge.encode(x1, BATCH), labels)
    found = {"network": network, "optimizer": optimizer, "seed": seed, "evaluations": evaluations}
    found |= {key: summary[key] for key in SUMMARY}
    found["fd"] = figures["frechet_distance"].value
    found["fd_standard_error"] = figures["frechet_distance"].standard_error
    found["accuracy"] = figures["class_accuracy"].value
    write_json(kept, found)
    return found


def table(record: dict[str, Any]) -> str:
    """All rows as Markdown, the mean over seeds with the least and the most."""
    rows, seconds = record["rows"], record["step_seconds"]
    heads = ("network", "optimiser", "parameters", "a step", "steps", "bits/dim", "FD")
    heads += ("accuracy", "evaluations")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    kinds = dict.fromkeys((row["network"], row["optimizer"]) for row in rows)
    for network, optimizer in kinds:
        those = [r for r in rows if (r["network"], r["optimizer"]) == (network, optimizer)]
        cells = [f"{those[0]['num_parameters']:,}"]
        cells.append(f"{1e3 * seconds[f'{network}_{optimizer}']:.0f} ms")
        cells.append(f"{np.mean([r['step'] for r in those]):.0f}")
        for key, digits_ in (("bits_per_dim", 3), ("fd", 2), ("accuracy", 3), ("evaluations", 0)):
            cells.append(_spread([r[key] for r in those], digits_))
        lines.append(f"| {network} | {optimizer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float], digits_: int) -> str:
    mean, least, most = (f"{f(values):.{digits_}f}" for f in (np.mean, min, max))
    return mean if len(values) == 1 else f"{mean} ({least} to {most})"


def main(config: Config) -> dict[str, Any]:
    check_numbers(config, may_be_zero={"seeds"})
    check_seeds("seeds", config.seeds)
    flags = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    shared = ("adam_rate", "muon_rate", "num_samples", "judge")  # by all rows of a folder
    keep_settings(config.workdir, {name: flags[name] for name in shared})
    rows = [row(config, *kind, seed) for seed in config.seeds for kind in KINDS]
    record: dict[str, Any] = environment()
    record["config"] = {name: flags[name] for name in flags if name not in ("workdir", "record")}
    record |= {"step_seconds": step_seconds(config), "rows": rows}
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.networks", doc=__doc__)
