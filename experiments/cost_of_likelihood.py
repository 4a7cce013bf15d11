"""Why not maximum likelihood? A flow trained by its exact likelihood beside flow matching.

    python -m experiments.cost_of_likelihood

Both train the same network to carry N(0, I) to the data, and both are judged by

    E_p [log p(x) - log q(x)] >= 0,

the nats per held-out point above the entropy of the data, whose density p is known. What differs
is what a training step costs:

    ML             -log q(x1), through an adaptive solve with the exact divergence and back: tens
                   of calls of the network, each with a Jacobian product for every dimension
    ML + kinetic   the same plus 0.01 times the energy E int_0^1 |v|^2 dt, the first term of RNODE:
                   straighter ways, fewer calls
    FM             |v(t, x_t) - (x1 - x0)|^2 on straight lines: one call
    OT-FM          the same with the batch paired by exact optimal transport
    FM, ML         flow matching for half of the time, then likelihood

Each trains for the same seconds, compilation not counted. A finished cell has a file of its own:
started again, the command does the cells that are missing. On two cores of a shared server: 13
minutes.

Sources: Chen et al. 2018, arXiv 1806.07366; Grathwohl et al. 2018, arXiv 1810.01367; Finlay et al.
2020, arXiv 2002.02798.
"""

import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import fmjax as fm
from experiments import toy_densities
from experiments.toy_table import resume
from fmjax import models, training
from fmjax.evaluation.errors import standard_error
from fmjax.harness import command
from fmjax.harness.bounds import check_numbers
from fmjax.harness.records import environment, make_folder, write_json, write_text, writing

METHODS = ("ML", "ML + kinetic", "FM", "OT-FM", "FM, ML")
NEAR = 0.02  # nats
KINETIC = 0.01
NUM_LOOKS = 12  # at the held-out points, at times that grow by one factor
TOLERANCE = 1e-3  # of the solves in training
MODEL = models.MLP(features=(64, 64, 64))
TX = training.adam(2e-3)


@dataclasses.dataclass(frozen=True)
class Config:
    """Maximum likelihood against flow matching at equal seconds."""

    workdir: pathlib.Path = pathlib.Path("runs/cost_of_likelihood")
    """Run folder. Started again in the same folder, the command does the cells that are missing."""
    seconds: float = 40.0
    """Of training, for each cell."""
    batch_size: int = 256
    """Points per step."""
    num_test: int = 2000
    """Held-out points."""
    seed: int = 0
    """Of data and training."""


def flow_matching(pairing: fm.Coupling) -> training.LossFn:
    def loss_fn(params: Any, key: jax.Array, x1: jax.Array) -> jax.Array:
        key_x0, key_pair, key_t = jax.random.split(key, 3)
        x0 = pairing(key_pair, jax.random.normal(key_x0, x1.shape), x1)
        sample = fm.sample_path(fm.cond_ot(), x0, x1, fm.uniform(key_t, x1.shape[:1]))
        return jnp.mean(fm.cfm_loss(functools.partial(MODEL.apply, params), sample))

    return loss_fn


def likelihood(kinetic: float = 0.0) -> training.LossFn:
    """The negative log-likelihood, and `kinetic` times the energy of the ways back."""

    def with_energy(velocity: fm.Velocity, t: jax.Array, x: jax.Array) -> Any:
        u, div = fm.exact_divergence()(velocity, t, x)
        return u, jnp.stack([div, jnp.sum(u**2, axis=1)])

    def loss_fn(params: Any, key: jax.Array, x1: jax.Array) -> jax.Array:
        velocity = functools.partial(MODEL.apply, params)
        controller = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE)
        solved = fm.integrate_log_prob(
            velocity, x1, divergence=with_energy, stepsize_controller=controller
        )
        log_p, less_energy = solved.log_prob
        energy = fm.standard_normal_log_prob(solved.x0) - less_energy
        return jnp.mean(kinetic * energy - log_p)

    return loss_fn


LOSSES = {
    "FM": flow_matching(fm.independent),
    "OT-FM": flow_matching(fm.minibatch_ot),
    "ML": likelihood(),
    "ML + kinetic": likelihood(KINETIC),
}


@functools.partial(jax.jit, static_argnames="tolerance")
def log_prob(params: Any, x1: jax.Array, tolerance: float = 1e-5) -> fm.LogProb:
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    velocity = functools.partial(MODEL.apply, params)
    return fm.integrate_log_prob(velocity, x1, stepsize_controller=controller)


@jax.jit
def num_calls_of_a_sample(params: Any, x0: jax.Array) -> jax.Array:
    return fm.integrate(functools.partial(MODEL.apply, params), x0).num_evaluations


def train(config: Config, data: toy_densities.Data, method: str) -> dict[str, Any]:
    """One cell: its looks at the held-out points, and what a sample of the last network costs.

    A look is (seconds of training, calls of the network so far, nats above the entropy, their
    standard error). A call is one of a whole batch, with or without its Jacobian products; in a
    step of ML they are counted as in a solve of the last batch when it was looked at.
    """
    rng = np.random.default_rng((config.seed, 0))
    x1 = jnp.asarray(data.sample(rng, 50_000), jnp.float32)
    test = np.asarray(data.sample(np.random.default_rng((config.seed, 1)), config.num_test))
    exact, held_out = data.log_prob(test), jnp.asarray(test, jnp.float32)
    key_init, key = jax.random.split(jax.random.key(config.seed))
    params = MODEL.init(key_init, jnp.zeros(()), jnp.zeros((1, x1.shape[1])))
    state = training.init_train_state(params, TX)
    looks, spent, calls = [], 0.0, 0.0
    for stage in (stages := method.split(", ")):
        step = _step(LOSSES[stage], config.batch_size)
        step(state, key, x1)  # compiled before the clock starts
        each = 1.0
        ends = np.geomspace(config.seconds / 200, config.seconds / len(stages), NUM_LOOKS)
        for end in ends + spent:
            began, count = time.perf_counter() - spent, 0
            while time.perf_counter() - began < end:
                state = jax.block_until_ready(step(state, key, x1))
                count += 1
            spent = time.perf_counter() - began
            if stage.startswith("ML"):
                solved = log_prob(state.ema_params, x1[: config.batch_size], TOLERANCE)
                each = float(solved.num_evaluations)
            calls += count * each
            nats = exact - np.asarray(log_prob(state.ema_params, held_out).log_prob)
            looks.append([spent, calls, float(nats.mean()), standard_error(nats)])
    x0 = jax.random.normal(jax.random.key(1), held_out.shape)
    return {
        "looks": looks,
        "steps": int(state.step),
        "calls_of_a_sample": int(num_calls_of_a_sample(state.ema_params, x0)),
    }


def _step(loss_fn: training.LossFn, batch_size: int) -> Callable[..., training.TrainState]:
    one = training.make_train_step(loss_fn, TX, ema_decay=0.999)

    def step(state: training.TrainState, key: jax.Array, x1: jax.Array) -> training.TrainState:
        rows = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        return one(state, key, jax.random.choice(rows, x1, (batch_size,)))[0]

    return jax.jit(step)


def markdown(cells: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = [
        "| data | method | steps | nats above the entropy | within 0.02 after | calls of a sample |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name, row in cells.items():
        for method, cell in row.items():
            *_, nats, error = cell["looks"][-1]
            near = [look for look in cell["looks"] if look[2] <= NEAR]
            first = f"{near[0][0]:.1f} s, {near[0][1]:,.0f} calls" if near else "-"
            lines.append(
                f"| {name} | {method} | {cell['steps']:,} | {nats:.3f} ± {error:.3f} | {first} | "
                f"{cell['calls_of_a_sample']} |"
            )
    return "\n".join(lines) + "\n"


def draw(cells: dict[str, dict[str, dict[str, Any]]], path: pathlib.Path) -> None:
    """Nats above the entropy against seconds, and against calls of the network."""
    figure = Figure(figsize=(4 * len(cells), 6.4), layout="constrained")
    axes = figure.subplots(2, len(cells), squeeze=False, sharey=True)
    for column, (name, row) in zip(axes.T, cells.items(), strict=True):
        column[0].set_title(name)
        for method, cell in row.items():
            looks = np.asarray(cell["looks"])
            for k, axis in enumerate(column):
                axis.loglog(looks[:, k], np.maximum(looks[:, 2], 1e-3), ".-", label=method)
                axis.axhline(NEAR, color="0.7", lw=0.8, ls=":")
                axis.set_xlabel(("seconds of training", "calls of the network in training")[k])
    for axis in axes[:, 0]:
        axis.set_ylabel("nats above the entropy")
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def cell(config: Config, name: str, data: toy_densities.Data, method: str) -> dict[str, Any]:
    file = re.sub("[^a-z0-9]+", "_", f"{name} {method}".lower())
    return resume(config, file, lambda: train(config, data, method))


def main(config: Config) -> dict[str, Any]:
    check_numbers(config, may_be_zero={"seed"})
    with writing(config.workdir, lambda: "the cells that are finished stay"):
        make_folder(config.workdir)
        cells = {
            name: {method: cell(config, name, data, method) for method in METHODS}
            for name, data in toy_densities.data_sets().items()
        }
        draw(cells, config.workdir / "cost_of_likelihood.png")
        write_text(config.workdir / "cost_of_likelihood.md", table := markdown(cells))
        write_json(config.workdir / "cost_of_likelihood.json", {"cells": cells, **environment()})
    print(f"{table}\nRun folder  {config.workdir}: cost_of_likelihood.json, .md and .png")
    return cells


if __name__ == "__main__":
    command.run(main, Config, name="experiments.cost_of_likelihood", doc=__doc__)
