"""A solver learnt for one run: fitted to its flow's end points, compared with the usual ones.

    python -m experiments.learned_solver runs/digits --evaluations 8

Times and coefficients of a non-stationary solver (`flow_maps.NonStationary`, 51 free numbers at 8
evaluations) are fitted to pairs of noise and the end point of an exact solve, by Levenberg and
Marquardt's method: from Euler's and from the midpoint method on a few pairs, then from the better
one on all; pairs that are held out choose. What is printed is the root mean square distance per
coordinate to the exact end points on noise that the fit has not seen, beside Euler, Midpoint and
Heun at as many evaluations and Tsit5 at the next count that it knows (6 a step and one), and by
what factor the learnt one is closer.

The pairs are kept in RUN/pairs, for other numbers of evaluations too. The solver is
RUN/learned_solver_8.json; `read_solver` reads it for the parameters it was fitted to. Samples:

    trained = fmjax.harness.read.read(pathlib.Path("runs/digits"))
    solver = learned_solver.read_solver("runs/digits", trained, 8)
    x0 = trained.source.sample(jax.random.key(0), 10)
    velocity = trained.velocity(trained.params, jnp.arange(10))
    digits = fmjax.flow_maps.apply_solver(velocity, solver, x0)
"""

import dataclasses
import functools
import json
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from etils import epath

from fmjax import flow_maps, harness
from fmjax.evaluation.drawing import Way, make_solve
from fmjax.harness import command, places
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.read import read
from fmjax.harness.records import environment, write_json
from fmjax.harness.share import put
from fmjax.harness.start import say
from fmjax.tasks import pairs


@dataclasses.dataclass(frozen=True)
class Config:
    """Fits a solver of few evaluations to a finished run."""

    run: Annotated[epath.Path, tyro.conf.Positional]
    """Run folder."""
    evaluations: int = 8
    """Of the network, by the learnt solver."""
    num_pairs: int = 128
    """Pairs that are fitted."""
    num_held_out: int = 64
    """Pairs that choose the step."""
    num_unseen: int = 512
    """Noises on which the distances are measured."""
    num_first: int = 32
    """Pairs on which the starts are tried, and as many that choose the better; at least as many as
    the solver has numbers are taken."""
    num_steps: int = 8
    """Of Levenberg and Marquardt's method, from each start on those."""
    num_last_steps: int = 8
    """From the better one, on all pairs."""
    tolerance: float = 1e-4
    """Of the exact solves, by Tsit5."""
    projections: int = 2
    """Residuals of every pair; what the fit takes grows with it."""
    batch_size: int = 128
    """Noises per exact solve, over all devices."""
    guidance: float = 1.0
    """Scale of the guidance of the flow that the solver is fitted to; 1 is none."""
    average: bool = True
    """Whether to take the moving average of the parameters, or the last ones."""
    seed: int = 0
    """Of the noise."""


def main(config: Config) -> dict[str, Any]:
    check_numbers(config, may_be_zero={"seed", "num_held_out"})
    check_seeds("seed", [config.seed])
    n = config.evaluations
    least = -(-(2 * n - 1 + n * (n + 1) // 2) // config.projections)  # a residual for each number
    if config.num_pairs < least:
        raise ValueError(
            f"A solver of {n} evaluations wants --num-pairs of {least} or more, with --projections "
            f"{config.projections}; got {config.num_pairs}."
        )
    config = dataclasses.replace(config, num_first=max(config.num_first, least))
    if 2 * config.num_first > config.num_pairs + config.num_held_out:
        raise ValueError(
            "--num-first must be at most half of all pairs; got "
            f"{config.num_first} of {config.num_pairs} + {config.num_held_out}. Give more "
            "--num-pairs."
        )
    folder = places.as_path(config.run)
    trained = read(folder, average=config.average, guidance=config.guidance)
    num_fit = config.num_pairs + config.num_held_out
    num = num_fit + config.num_unseen
    found = pairs.make_pairs(
        folder,
        trained,
        num,
        seed=config.seed,
        tolerance=config.tolerance,
        batch_size=config.batch_size,
    )
    known, unseen = (
        jax.tree.map(lambda x, rows=rows: x[rows], tuple(found))
        for rows in (slice(num_fit), slice(num_fit, None))
    )
    say(f"Fitting a solver of {n} evaluations ...")
    began = time.perf_counter()
    fitted, start = fit(config, trained, *known)
    seconds = time.perf_counter() - began
    rms = distances(config, trained, fitted.solver, *unseen)
    record = {
        "solver": {k: np.asarray(v).tolist() for k, v in fitted.solver._asdict().items()},
        "evaluations": config.evaluations,
        "parameters": trained.digest,
        "guidance": config.guidance,
        "start": start,
        "fit_seconds": round(seconds, 1),
        "fitted_rms": np.asarray(fitted.rms).tolist(),
        "held_out_rms": np.asarray(fitted.held_out_rms).tolist(),
        "unseen_rms": rms,
        "flags": {k: v for k, v in dataclasses.asdict(config).items() if k != "run"},
        "environment": environment(),
    }
    path = _path(folder, config.evaluations)
    write_json(path, record)
    _show(record, path)
    return record


def read_solver(
    run: Any, trained: harness.Trained, num_evaluations: int
) -> flow_maps.NonStationary:
    """The solver that was fitted to a run.

    Args:
      run: its folder.
      trained: the run, as it is to be solved.
      num_evaluations: of the solver.

    Raises:
      ValueError: if none of so many evaluations is in the folder, or it was fitted to other
        parameters or another guidance.
    """
    path = _path(places.as_path(run), num_evaluations)
    if not path.is_file():
        raise ValueError(
            f"A learnt solver of {num_evaluations} evaluations must have been fitted; got no "
            f"{path}. One of another number can't stand in: fit it with --evaluations "
            f"{num_evaluations}."
        )
    record = json.loads(path.read_text())
    fitted_to = record["parameters"], record["guidance"]
    if fitted_to != (trained.digest, trained.guidance):
        raise ValueError(
            "A learnt solver is one velocity's; got one for the parameters and guidance "
            f"{fitted_to[0][:12]}, {fitted_to[1]} and a velocity of {trained.digest[:12]}, "
            f"{trained.guidance}. Fit it again."
        )
    solver = flow_maps.NonStationary(
        **{k: jnp.asarray(v, jnp.float32) for k, v in record["solver"].items()}
    )
    flow_maps.check_solver(solver)
    return solver


def fit(
    config: Config, trained: harness.Trained, x0: np.ndarray, x1: np.ndarray, condition: Any
) -> tuple[flow_maps.FittedSolver, str]:
    """The better of the fits from the usual methods, and the name of its start."""
    n = config.evaluations
    starts = {"Euler": flow_maps.from_euler(n)}
    if n % 2 == 0:
        starts["Midpoint"] = flow_maps.from_midpoint(n)

    @functools.partial(jax.jit, static_argnames=("num_steps", "num_held_out"))
    def fit_from(params: Any, solver: Any, known: Any, **options: int) -> Any:
        x0, x1, condition = known
        velocity = trained.guided(params, condition)
        return flow_maps.fit_solver(
            velocity, solver, x0, x1, num_projections=config.projections, **options
        )

    few = put(jax.tree.map(lambda x: x[: 2 * config.num_first], (x0, x1, condition)))
    options = {"num_steps": config.num_steps, "num_held_out": config.num_first}
    first = {name: fit_from(trained.params, s, few, **options) for name, s in starts.items()}
    best = min(first, key=lambda name: float(np.nanmin(first[name].held_out_rms)))
    options = {"num_steps": config.num_last_steps, "num_held_out": config.num_held_out}
    given = put((x0, x1, condition))
    return jax.device_get(fit_from(trained.params, first[best].solver, given, **options)), best


def distances(
    config: Config,
    trained: harness.Trained,
    solver: flow_maps.NonStationary,
    x0: np.ndarray,
    x1: np.ndarray,
    condition: Any,
) -> dict[str, float]:
    """Root mean square distances per coordinate to the exact end points, by solver."""

    @jax.jit
    def learnt(params: Any, solver: Any, x0: jax.Array, condition: Any) -> jax.Array:
        return flow_maps.apply_solver(trained.guided(params, condition), solver, x0)

    n, solve = config.evaluations, make_solve(trained)
    ways = {f"Euler, {n}": Way("Euler", num_steps=n)}
    if n % 2 == 0:
        ways |= {f"{name}, {n}": Way(name, num_steps=n // 2) for name in ("Midpoint", "Heun")}
    steps = max(1, -(-(n - 1) // 6))
    ways[f"Tsit5, {6 * steps + 1}"] = Way("Tsit5", num_steps=steps)
    given = put((x0, condition))
    ends = {f"learnt, {n}": learnt(trained.params, solver, *given)}
    ends |= {name: solve(way, *given)[0] for name, way in ways.items()}
    return {
        name: float(np.sqrt(np.mean(np.square(np.asarray(end, np.float64) - x1))))
        for name, end in ends.items()
    }


def _show(record: dict[str, Any], path: Any) -> None:
    rms = record["unseen_rms"]
    learnt = next(iter(rms.values()))
    print(f"{'solver, evaluations':<22}{'RMS':>10}{'factor':>9}")
    for name, value in rms.items():
        print(f"{name:<22}{value:>10.5f}{value / learnt:>9.2f}")
    print(
        f"fitted in {record['fit_seconds']} s from {record['start']}; held out "
        f"{min(record['held_out_rms']):.5f}; in {path}"
    )


def _path(folder: Any, num_evaluations: int) -> Any:
    return folder / f"learned_solver_{num_evaluations}.json"


if __name__ == "__main__":
    command.run(main, Config, name="experiments.learned_solver", doc=__doc__)
