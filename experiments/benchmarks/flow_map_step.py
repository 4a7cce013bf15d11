"""What a training step of each flow map costs beside a flow-matching step of the same network.

    python -m experiments.benchmarks.flow_map_step

Time is the median over steps that are taken in turn, all of one network, so that other work on the
machine slows all of them; memory is what XLA plans for temporaries; compilation is one of each. On
a CPU every network is also timed with the kernels that are made for it, which training takes from
300 steps on.
"""

import dataclasses
import functools
import itertools
import pathlib
import time
from typing import Any

import jax
import numpy as np

from experiments import flow_map, in_turn
from experiments.few_steps_runs import MODELS
from fmjax.harness import command
from fmjax.harness.records import environment, write_json
from fmjax.harness.start import say
from fmjax.tasks.flow_map_methods import METHODS

NETWORKS = {"digits, 8x8x1": "digits", "Fashion-MNIST, 28x28x1": "fashion_mnist"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Training steps of flow maps side by side."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Of these."""
    methods: tuple[str, ...] = tuple(METHODS)
    """flow_matching, the base, first."""
    batch_size: int = 64
    """Examples per step."""
    repetitions: int = 20
    """Timed steps of each."""
    record: pathlib.Path | None = None
    """A JSON file for the figures."""


def compiled(config: Config, network: str, kernels: Any, method: Any) -> tuple[Any, dict[str, Any]]:
    """A compiled step with its arguments, and what compiling it took and planned."""
    dataset = NETWORKS[network]
    run = flow_map.Config(
        method=method,
        kernels=kernels,
        batch_size=config.batch_size,
        dataset=dataset,
        model=MODELS[dataset],
    )
    task = flow_map.make_task(run)
    jitted, args = in_turn.training_step(task, config.batch_size)
    lowered = jitted.lower(*args)
    began = time.perf_counter()
    step = lowered.compile()
    seconds = time.perf_counter() - began
    memory = step.memory_analysis()
    megabytes = None if memory is None else memory.temp_size_in_bytes / 2**20
    return functools.partial(step, *args), {"compile_s": seconds, "temporaries_mib": megabytes}


def main(config: Config) -> dict[str, Any]:
    if config.methods[:1] != ("flow_matching",) or set(config.methods) - METHODS.keys():
        raise ValueError(
            f"--methods must begin with flow_matching and be of {', '.join(METHODS)}; got "
            f"{' '.join(config.methods)}."
        )
    rows, kinds = [], ("xla", "cpu") if jax.default_backend() == "cpu" else ("xla",)
    jax.config.update("jax_enable_compilation_cache", False)  # compiling is timed
    for network in config.networks:
        steps, facts = {}, {}
        for kernels, method in itertools.product(kinds, config.methods):
            say(f"{network}, {kernels} kernels: {method} ...")
            found = compiled(config, network, kernels, method)
            steps[kernels, method], facts[kernels, method] = found
        times = in_turn.milliseconds(steps, config.repetitions)
        for kernels, method in steps:
            row = {"network": network, "kernels": kernels, "method": method}
            mine, base = (np.array(times[kernels, other]) for other in (method, "flow_matching"))
            row |= {"step_ms": float(np.median(mine)), "ratio": float(np.median(mine / base))}
            rows.append(row | facts[kernels, method])
    record = environment() | {"batch_size": config.batch_size, "rows": rows}
    print(table(record))
    if config.record is not None:
        write_json(config.record, record)
    return record


def table(record: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | kernels | method | a step | against flow matching | temporaries | compiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        memory = row["temporaries_mib"]
        lines.append(
            f"| {row['network']} | {row['kernels']} | {row['method']} | {row['step_ms']:.0f} ms "
            f"| {row['ratio']:.2f} | {'-' if memory is None else f'{memory:.0f} MiB'} "
            f"| {row['compile_s']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.flow_map_step", doc=__doc__)
