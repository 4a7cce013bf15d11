"""What `experiments.few_steps` trains: one flow, and every method from it for the same time.

A `config` is a `few_steps.Config`.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from experiments import adversary, flow_map, in_turn, learned_solver, reflow
from fmjax.harness import train
from fmjax.harness.read import read
from fmjax.harness.records import write_json
from fmjax.harness.start import say
from fmjax.harness.task import Trained
from fmjax.tasks import images, pairs
from fmjax.tasks.flow_map_methods import METHODS

MODELS = {
    "digits": flow_map.Config.model,
    "fashion_mnist": images.UNetConfig(
        channels=16,
        channel_multipliers=(1, 2, 4),
        attention_resolutions=(7,),
        head_channels=32,
        horizon=True,
        time_scale=16.0,
    ),
}
MODULES: dict[str, Any] = {"reflow": reflow, "adversary": adversary}
KIND: dict[str, Any] = {  # what a training is, where that is not its name
    "flow": "flow_matching",
    "longer": "flow_matching",
    "mean_flow_longer": "mean_flow",
    "adversary_longer": "adversary",
}
# What it begins with, where that is not the flow.
BEGINS: dict[str, str] = dict.fromkeys(("mean_flow_longer", "adversary_longer"), "mean_flow")
ALL = ("longer", *(name for name in METHODS if name != "flow_matching"), *MODULES, *BEGINS)


def run_config(config: Any, name: str, seed: int, num_steps: int) -> Any:
    """The flags of one training."""
    kind, begins = KIND.get(name, name), BEGINS.get(name, "flow")
    begun = None if name == "flow" else epath.Path(folder(config, begins, seed))
    shared: dict[str, Any] = {
        "workdir": epath.Path(folder(config, name, seed)),
        "seed": seed,
        "num_steps": num_steps,
        "decay_steps": num_steps,
        "warmup_steps": min(100, num_steps // 4),
        "checkpoint_every": 100,
    }
    if kind == "reflow":
        return reflow.Config(teacher=begun, num_pairs=config.num_pairs, **shared)
    shared |= {"dataset": config.dataset, "model": MODELS[config.dataset], "preview_every": 0}
    shared |= {"num_samples": 0, "eval_examples": 0}
    if kind == "adversary":
        return adversary.Config(generator=begun, **shared)
    rates = {"learning_rate": 2e-3} if name == "flow" else {}
    anneal = max(1, num_steps * 3 // 4)
    return flow_map.Config(method=kind, init_from=begun, anneal_steps=anneal, **rates, **shared)


def folder(config: Any, name: str, seed: int) -> pathlib.Path:
    return config.workdir / f"{name}_s{seed}"


def step_seconds(config: Any, name: str, repetitions: int = 15) -> float:
    """What a training step takes: flow matching's, times what it was against that in turn.

    Measured once and kept; reflow's when its teacher is trained.
    """
    path = config.workdir / "step_seconds.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    name = KIND.get(name, name)
    if name in known:
        return known[name]
    kinds = [KIND.get(other, other) for other in config.methods if name != "reflow"]
    others = [kind for kind in kinds if kind != "reflow" and kind not in known]
    names = dict.fromkeys(["flow_matching", *others, name])
    say(f"Timing the training steps of {', '.join(names)} ...")
    steps = {other: _step(config, other) for other in names}
    median = in_turn.medians(steps, repetitions)
    base = known.get("flow_matching", median["flow_matching"] / 1e3)
    known |= {other: base * median[other] / median["flow_matching"] for other in names}
    config.workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, known)
    return known[name]


def _step(config: Any, name: str) -> Callable[[], Any]:
    """One training step, of a new network."""
    run = run_config(config, name, config.seeds[0], 1000)
    if name != "reflow":
        run = dataclasses.replace(run, init_from=None)
    if name == "adversary":
        run = dataclasses.replace(run, generator=None)
    task = MODULES.get(name, flow_map).make_task(run)
    step, args = in_turn.training_step(task, run.batch_size)
    return functools.partial(step, *args)


def trained(config: Any, name: str, seed: int) -> Trained:
    """One training, for so many steps as take the time that was asked for."""
    place = folder(config, name, seed)
    if not (place / "summary.json").exists():
        left = 60 * config.minutes - (_pair_seconds(config, seed) if name == "reflow" else 0.0)
        num_steps = max(1, round(left / step_seconds(config, name)))
        if name in BEGINS:
            trained(config, BEGINS[name], seed)
        say(f"Training {name}, seed {seed}: {num_steps} steps ...")
        module = MODULES.get(KIND.get(name, name), flow_map)
        train(run_config(config, name, seed, num_steps), module.make_task)
    return read(epath.Path(place))


def _pair_seconds(config: Any, seed: int) -> float:
    """What the pairs of a flow took, on the clock."""
    path = config.workdir / f"pair_seconds_s{seed}.json"
    if not path.exists():
        began = time.perf_counter()
        pairs.TeacherPairs(run_config(config, "reflow", seed, 1000))
        write_json(path, time.perf_counter() - began)
    return json.loads(path.read_text())


def learned(config: Any, seed: int, num_steps: int) -> Any:
    """The solver of so many evaluations of a flow, fitted once."""
    _fit(config, seed, num_steps)
    place = epath.Path(folder(config, "flow", seed))
    return learned_solver.read_solver(place, read(place), num_steps)


def learned_figures(config: Any, seed: int, num_steps: int) -> dict[str, Any]:
    """What that solver and the usual ones miss, root mean square, and what its fit took."""
    found = _fit(config, seed, num_steps)
    kept = {"seed": seed, "evaluations": num_steps, "fit_seconds": found["fit_seconds"]}
    return kept | {"start": found["start"], "rms": found["unseen_rms"]}


def _fit(config: Any, seed: int, num_steps: int) -> dict[str, Any]:
    place = folder(config, "flow", seed)
    path = place / f"learned_solver_{num_steps}.json"
    if not path.exists():
        run = epath.Path(place)
        learned_solver.main(learned_solver.Config(run=run, evaluations=num_steps))
    return json.loads(path.read_text())
