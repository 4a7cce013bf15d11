"""The 2-D table of Tong et al. (arXiv 2302.00482): flows and bridges on four pairs.

    python -m experiments.toy_table

On two cores of a shared server: 6.4 minutes without the bridges, whose 12 trainings took 41 minutes
beside a load of 5 to 10. Prints a Markdown table: mean ± standard deviation over the seeds of

    W2   the 2-Wasserstein distance from 1,000 generated points to 1,000 test points, exact;
    NPE  |E int_0^1 |v(t, x_t)|^2 dt - W2^2(q0, q1)| / W2^2(q0, q1), normalised path energy: 0 for
         the optimal transport, which no flow between q0 and q1 can undercut;

beside torchcfm's under the same protocol, as `experiments.benchmarks.toy_table_torchcfm` recorded
it, and lists the cells that differ by more than two standard errors.

Methods, all on x_t = t x1 + (1 - t) x0 + noise. SB-CFM, SF2M and the interpolant are in
`experiments.toy_bridges`, with what NPE says of them; the others have noise of deviation 0.1:

    I-CFM   x0 and x1 as drawn; u_t = x1 - x0
    OT-CFM  the batch paired by exact optimal transport; u_t = x1 - x0
    FM      no noise, but a source that narrows to sigma around x1 (Lipman et al. 2022, arXiv
            2210.02747): x_t = t x1 + (1 - (1 - sigma) t) x0, u_t its time derivative. Its source is
            a standard normal, so moons to 8 Gaussians has none.

From the repository atong01/conditional-flow-matching: the data (`experiments.toy_data`); 10,000
training and 1,000 test points (configs/datamodule/*.yaml); a Gaussian source drawn afresh
(cfm_module.py); MLP of three hidden layers of 64, SELU, AdamW 1e-3, weight decay 1e-5, sigma 0.1
(runner/configs/model/{cfm,otcfm,fm}.yaml); 100 Euler steps (cfm_module.py and solver.py), |v|^2
summed over coordinates (augmentation.py); five seeds, FM on three pairs
(runner/scripts/two-dim-cfm.sh).

Chosen here, since the paper's own text could not be opened or for time: 10,000 steps of 128 (that
repository's experiment/cfm.yaml asks for 1,000 epochs of batches of 512, some 20,000 steps), the
last parameters rather than the best checkpoint, batches drawn with replacement, W2^2(q0, q1) from
`toy_data.squared_distance`, used for torchcfm's NPE too. fmjax's MLP takes sines and cosines of t
where torchcfm's takes t, and Flax's initialisation where torchcfm's takes torch's.

The paper's own table could not be opened, so there are no published figures next to these.

All seeds of a cell train along a leading axis, one `lax.scan` of many steps per dispatch, while
the next batches are paired in threads. A finished cell has a file of its own: started again, the
command does the cells that are missing.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

from experiments import toy_bridges, toy_data, toy_flows, toy_report
from fmjax.harness import command
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.records import environment, make_folder, write_json, write_text, writing
from fmjax.metrics.transport import wasserstein2

RECORDED = pathlib.Path(__file__).parent / "benchmarks" / "results" / "toy_table_torchcfm.json"
# What fmjax's and torchcfm's runs must share.
PROTOCOL = ("num_steps", "batch_size", "num_train", "num_test", "sigma", "bridge_sigma")


@dataclasses.dataclass(frozen=True)
class Config:
    """Flow matching and bridges on four pairs of distributions in the plane."""

    workdir: pathlib.Path = pathlib.Path("runs/toy_table")
    """Run folder. Started again in the same folder, the command does the cells that are missing."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One training each; at least two."""
    num_steps: int = 10_000
    """Training steps."""
    batch_size: int = 128
    """Pairs per step, and per exact assignment."""
    num_train: int = 10_000
    """Training points of each distribution."""
    num_test: int = 1_000
    """Test points of each distribution."""
    sigma: float = 0.1
    """Deviation of the noise on the path of the other methods."""
    bridge_sigma: float = 1.0
    """Noise of SB-CFM, SF2M and the interpolant, in units of the source's deviation."""
    chunk_steps: int = 500
    """Steps per dispatch, whose random numbers are drawn together."""
    reference_draws: int = 64
    """Exact assignments of 500 points behind W2^2(q0, q1)."""
    recorded: pathlib.Path = RECORDED
    """torchcfm's runs."""


def check(config: Config) -> None:
    check_numbers(config, may_be_zero={"seeds"}, may_be_empty={"seeds"})
    check_seeds("seeds", config.seeds, least=2)  # for a spread over them
    if config.reference_draws < 2:
        raise ValueError(f"--reference-draws must be at least 2; got {config.reference_draws}.")


def cells() -> list[tuple[str, str]]:
    """(pair, method); FM's path starts at a standard normal."""
    return [
        (pair, method)
        for pair in toy_data.PAIRS
        for method in (*toy_flows.METHODS, *toy_bridges.METHODS)
        if method != "FM" or toy_data.PAIRS[pair].source is toy_data.gaussian
    ]


def noise(config: Config, pair: str, method: str) -> float:
    """sigma of a cell: that of a bridge is in units of the source's deviation."""
    if method in toy_bridges.METHODS:
        return config.bridge_sigma * toy_data.DEVIATIONS[toy_data.PAIRS[pair].source]
    return config.sigma


def run_cell(config: Config, pair: str, method: str) -> dict[str, Any]:
    """Trains and measures all seeds of one cell, and draws the first seed's flow."""
    splits = [
        toy_data.split(pair, seed, config.num_train, config.num_test) for seed in config.seeds
    ]
    make = toy_bridges.make if method in toy_bridges.METHODS else toy_flows.make
    sigma = noise(config, pair, method)
    made = make(method, sigma)
    began = time.perf_counter()
    chunks = toy_data.batches(
        pair,
        config.seeds,
        [train for train, _ in splits],
        made.pairing,
        num_steps=config.num_steps,
        chunk_steps=config.chunk_steps,
        batch_size=config.batch_size,
    )
    if method in ("SB-CFM", "SF2M"):
        chunks = toy_bridges.entropic(config.seeds, chunks, sigma)
    params, losses = toy_flows.train(config.seeds, chunks, made)
    seconds = time.perf_counter() - began
    tests = np.stack([test for _, test in splits])
    trajectories = np.asarray(
        toy_flows.solve_all(params, tests[:, 0], velocity=made.velocity, times=made.times)
    )
    ends, energies = trajectories[:, -1, :, :2], trajectories[:, -1, :, 2]
    toy_report.save_flow(
        config.workdir / f"{pair}_{method}.png", tests[0, 1], trajectories[0, ..., :2]
    )
    result = {
        "pair": pair,
        "method": method,
        "wasserstein2": [wasserstein2(x, y) for x, y in zip(ends, tests[:, 1], strict=True)],
        "path_energy": energies.mean(axis=1, dtype=np.float64).tolist(),
        "last_loss": losses[-config.chunk_steps :].mean(axis=0, dtype=np.float64).tolist(),
        "training_seconds": round(seconds, 1),
        "load_average": os.getloadavg()[1],
        "date": datetime.date.today().isoformat(),
    }
    if method == "SF2M":
        result["sde_wasserstein2"] = toy_bridges.distances(config.seeds, params, tests, sigma)
    return result


def run_pair(config: Config, pair: str) -> dict[str, Any]:
    """W2^2(q0, q1), and W2 between two test sets of the target: what a perfect flow would show."""
    target = toy_data.PAIRS[pair].target
    rngs = [toy_data.generator(pair, seed, 3) for seed in config.seeds]
    sets = [[target(rng, config.num_test) for _ in range(2)] for rng in rngs]
    distance = toy_data.squared_distance(
        toy_data.PAIRS[pair], toy_data.generator(pair, 0, 2), num_draws=config.reference_draws
    )
    return {
        "pair": pair,
        "squared_distance": distance.value,
        "squared_distance_standard_error": distance.standard_error,
        "data_to_data_wasserstein2": [wasserstein2(x, y) for x, y in sets],
    }


def flags(config: Any) -> dict[str, Any]:
    """The flags behind the numbers, as JSON holds them."""
    kept = {k: v for k, v in vars(config).items() if k not in ("workdir", "recorded")}
    return json.loads(json.dumps(kept))


def resume(config: Any, name: str, compute: Any) -> dict[str, Any]:
    """The file `name` of the run folder, or what `compute` gives, kept there."""
    path = config.workdir / f"{name}.json"
    if not path.exists():
        write_json(path, {"config": flags(config), "result": compute()})
    record = json.loads(path.read_text())
    if record["config"] != flags(config):
        raise ValueError(
            f"{path} was made with {record['config']}, not {flags(config)}. Take another --workdir."
        )
    return record["result"]


def load_recorded(config: Config) -> list[dict[str, Any]]:
    """torchcfm's runs, or none, with a line that says why."""
    if not config.recorded.exists():
        print(f"No runs of torchcfm: {config.recorded} is not there.\n")
        return []
    record = json.loads(config.recorded.read_text())
    own = {name: getattr(config, name) for name in PROTOCOL}
    if record["protocol"] != own:
        print(f"No runs of torchcfm under this protocol: {record['protocol']}, here {own}.\n")
        return []
    return record["runs"]


def main(config: Config) -> dict[str, Any]:
    check(config)
    with writing(config.workdir, lambda: "the cells that are finished stay"):
        return fill_table(config)


def fill_table(config: Config) -> dict[str, Any]:
    """Does the cells that are missing, prints the table, writes both down."""
    make_folder(config.workdir)
    pairs = [resume(config, pair, lambda p=pair: run_pair(config, p)) for pair in toy_data.PAIRS]
    rows = [
        resume(config, f"{pair}_{method}", lambda p=pair, m=method: run_cell(config, p, m))
        for pair, method in cells()
    ]
    table = toy_report.markdown(pairs, rows, load_recorded(config))
    print(table)
    write_text(config.workdir / "toy_table.md", table)
    summary = {
        "experiment": "toy_table",
        "command": "python -m experiments.toy_table",
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores of a {platform.machine()} machine; JAX on "
        f"{jax.devices()[0].device_kind}",
        "versions": environment()["versions"],
        "config": flags(config),
        "training_seconds": round(sum(row["training_seconds"] for row in rows), 1),
        "pairs": pairs,
        "cells": rows,
    }
    write_json(config.workdir / "toy_table.json", summary)
    print(f"Run folder  {config.workdir}: toy_table.json, toy_table.md and a picture per cell")
    return summary


if __name__ == "__main__":
    command.run(main, Config, name="experiments.toy_table", doc=__doc__)
