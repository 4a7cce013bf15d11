"""Which time of a population is predicted, by five methods beside torchcfm's: a table over seeds.

    FMJAX_DATA_DIR=... python -m experiments.benchmarks.single_cell

Every time between others of every file is left out in turn (`experiments.single_cell` has the
methods). The table holds the 1-Wasserstein distance between predicted and true cells, mean and
standard deviation over seeds, beside that of the cells of the time before, left where they are, and
torchcfm's as `experiments.benchmarks.single_cell_torchcfm` recorded it on the same files.

The protocol of both: three hidden layers of 64, SELU, AdamW 1e-3 with weight decay 1e-5, batches of
128 pairs per interval, whitened by all cells, the last parameters, 100 Euler steps. All seeds of a
cell train along a leading axis, one `lax.scan` of many steps per dispatch. A finished cell has a
file of its own: started again, the command does the cells that are missing.

On two cores of a server that did much other work: 48 minutes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import single_cell
from experiments.toy_report import mean_and_deviation, standard_errors_apart
from experiments.toy_table import resume
from fmjax import models, training
from fmjax.harness import command
from fmjax.harness.records import environment, make_folder, write_json
from fmjax.tasks import intervals, snapshot_methods, snapshots

RECORDED = pathlib.Path(__file__).parent / "results" / "single_cell_torchcfm.json"
FILES = {"emt": (1, 2), "mouse_hematopoiesis": (1,), "simulation_gene_data": (1, 2, 3)}
METHODS = {
    "i-cfm": ("I-CFM", "w1"),
    "ot-cfm": ("OT-CFM", "w1"),
    "unbalanced": ("unbalanced", "w1", "w1_weighted"),
    "sf2m-exact": ("SF2M, exact pairs", "w1", "w1_sde"),
    "sf2m-entropic": ("SF2M, entropic pairs", "w1", "w1_sde"),
}
WORDS = {"w1": "", "w1_weighted": ", weighted", "w1_sde": ", SDE"}
MODEL = models.MLP(features=(64, 64, 64), activation=nn.selu)
TX = optax.adamw(1e-3, weight_decay=1e-5)


@dataclasses.dataclass(frozen=True)
class Config:
    """The left-out times of the cell populations, by seeds."""

    workdir: pathlib.Path = pathlib.Path("runs/single_cell")
    """Folder of the finished cells."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of parameters and pairs; at least two."""
    num_steps: int = 1000
    """Training steps of each."""
    batch_size: int = 128
    """Pairs of each interval in a step."""
    chunk_steps: int = 250
    """Steps per dispatch."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which are trained; the record holds these alone."""
    record: pathlib.Path | None = None
    """A JSON file for the figures, such as experiments/benchmarks/results/single_cell.json."""


def train(config: Config, method: intervals.Method, pairs: list[np.ndarray]) -> Any:
    """The last parameters `[seeds, ...]` and losses `[steps, seeds]`, all in one program."""

    def loss(params: Any, key: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean(method.loss(params, method.draw(key, batch)))

    step = training.make_train_step(loss, TX, ema_decay=0.0)  # no moving average

    @functools.partial(jax.jit, donate_argnums=0)
    def run(states: Any, keys: jax.Array, chunk: jax.Array) -> Any:
        def body(states: Any, batch: jax.Array) -> Any:
            states, metrics = jax.vmap(step)(states, keys, batch)
            return states, metrics.loss

        return jax.lax.scan(body, states, chunk)

    def init(key: jax.Array) -> Any:
        return training.init_train_state(method.init(key), TX)

    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(jnp.array(config.seeds))
    states, losses = jax.jit(jax.vmap(init))(keys[:, 0]), []
    rngs = [np.random.default_rng((seed, 3)) for seed in config.seeds]
    for begin in range(0, config.num_steps, config.chunk_steps):
        shape = (min(config.chunk_steps, config.num_steps - begin), config.batch_size)
        chunk = [x[rng.integers(len(x), size=shape)] for x, rng in zip(pairs, rngs, strict=True)]
        # The next chunk is drawn while this one trains.
        states, part = run(states, keys[:, 1], np.stack(chunk, axis=1))
        losses.append(part)
    return states.params, np.concatenate(losses)


def run_cell(config: Config, file: str, leave_out: int, name: str) -> dict[str, Any]:
    """Trains and measures all seeds of one cell."""
    began = time.perf_counter()
    path = pathlib.Path(os.environ["FMJAX_DATA_DIR"], "singlecell_time", f"{file}.csv")
    flags: Any = {"data": path, "leave_out": leave_out, "method": name}
    every = [single_cell.Config(seed=seed, **flags) for seed in config.seeds]
    data = snapshots.open_snapshots(every[0])
    pairs, grown = zip(*(snapshot_methods.make_pairs(of, data) for of in every), strict=True)
    paired = time.perf_counter() - began
    method = snapshot_methods.make_method(every[0], data, MODEL)
    params, losses = train(config, method, list(pairs))
    keys = jax.vmap(jax.random.key)(jnp.array(config.seeds))
    moved = jax.device_get(jax.jit(jax.vmap(method.moved))(params, keys))
    figures = [
        intervals.left_out_figures(data, {sampler: x[i] for sampler, x in moved.items()}, grown[i])
        for i in range(len(config.seeds))
    ]
    return {
        "file": file,
        "leave_out": leave_out,
        "method": name,
        **{n: [f[n] for f in figures] for n in figures[0] if n in WORDS},
        "w1_still": figures[0]["w1_still"],
        "w1_method": figures[0]["w1_method"],
        "loss_by_eighths": [float(x.mean()) for x in np.array_split(losses, 8)],
        "pairing_seconds": round(paired, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "load_average": os.getloadavg()[1],
    }


def figures_of(record: dict[str, Any], theirs: dict[str, Any]) -> dict[Any, list[list[float]]]:
    """(row's label, file, time) -> the figures of fmjax and of torchcfm over seeds."""
    found = {}
    for cell in record["cells"]:
        names = ("file", "leave_out", "method")
        runs = [run for run in theirs["runs"] if all(run[n] == cell[n] for n in names)]
        label, *figures = METHODS[cell["method"]]
        for name in figures:
            other = [run[name] for run in runs if name in run]
            found[label + WORDS[name], cell["file"], cell["leave_out"]] = [cell[name], other]
    return found


def table(record: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Markdown: two rows for each method and sampler, a column for each left-out time.

    A star marks cells of fmjax that differ from torchcfm's by more than two standard errors.
    """
    places = [(file, k) for file, times in FILES.items() for k in times]
    found = figures_of(record, theirs)
    still = {(cell["file"], cell["leave_out"]): cell["w1_still"] for cell in record["cells"]}
    lines = ["| method | by | " + " | ".join(f"{file}, {k}" for file, k in places) + " |"]
    lines.append("|---|---|" + "---|" * len(places))
    lines.append(
        "| left where they were | - | " + " | ".join(_still(still, p) for p in places) + " |"
    )
    for label in dict.fromkeys(label for label, *_ in found):
        both = [found.get((label, *place), [[], []]) for place in places]
        ours = [mean_and_deviation(of[0]) + "*" * _is_apart(*of) for of in both]
        lines.append(f"| {label} | fmjax | " + " | ".join(ours) + " |")
        if any(of[1] for of in both):
            other = [mean_and_deviation(of[1]) for of in both]
            lines.append(f"| {label} | torchcfm | " + " | ".join(other) + " |")
    return "\n".join(lines) + "\n"


def differing(record: dict[str, Any], theirs: dict[str, Any]) -> str:
    """A line for each cell with a star."""
    return "".join(
        f"- {file}, {k}, {label}: {mean_and_deviation(ours)} against {mean_and_deviation(other)}, "
        f"{standard_errors_apart(ours, other):+.1f} standard errors.\n"
        for (label, file, k), (ours, other) in figures_of(record, theirs).items()
        if _is_apart(ours, other)
    )


def _still(still: dict[Any, float], place: Any) -> str:
    return f"{still[place]:.3f}" if place in still else "-"


def _is_apart(ours: list[float], theirs: list[float]) -> bool:
    return min(len(ours), len(theirs)) > 1 and abs(standard_errors_apart(ours, theirs)) > 2


def main(config: Config) -> dict[str, Any]:
    if "FMJAX_DATA_DIR" not in os.environ:
        raise ValueError("FMJAX_DATA_DIR must name the folder with singlecell_time; it is not set.")
    make_folder(config.workdir)
    kept = dataclasses.replace(config, methods=(), record=None)
    cells = [
        resume(kept, f"{file}-{k}-{name}", functools.partial(run_cell, config, file, k, name))
        for name in config.methods
        for file, times in FILES.items()
        for k in times
    ]
    record = environment() | {
        "config": {"seeds": list(config.seeds), "num_steps": config.num_steps,
                   "batch_size": config.batch_size},
        "cells": cells,
    }  # fmt: skip
    theirs = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"runs": []}
    print(table(record, theirs))
    print("More than two standard errors apart, fmjax against torchcfm:\n")
    print(differing(record, theirs) or "None.")
    if config.record is not None:
        write_json(config.record, record)
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.single_cell", doc=__doc__)
