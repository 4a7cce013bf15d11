"""After how many training steps the CPU's kernels have paid back their longer compilation.

    python -m experiments.benchmarks.kernels

The U-Nets of the experiments, with their own batches and steps, on random images on one CPU device:
seconds to trace and compile the step, and seconds per step (the median of interleaved repetitions),
with XLA's kernels and with `fmjax.models.cpu.KERNELS`. Where the latter's step is shorter by s and
its compilation longer by c, c / s steps pay it back. `fmjax.tasks.images` chooses by it.

On two cores of a shared server: about five minutes.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from experiments import cifar10, digits, mnist
from fmjax.harness import command, step
from fmjax.tasks.images import KERNELS, ImageConfig, Images, UNetConfig

SMALL = UNetConfig(32, (1, 2, 2, 2), attention_resolutions=(16,), head_channels=32)
RUNS: dict[str, tuple[Any, ImageConfig, tuple[int, ...]]] = {
    "digits": (digits, digits.Config(), (8, 8, 1)),
    "mnist": (mnist, mnist.Config(), (28, 28, 1)),
    "cifar10_small": (cifar10, cifar10.Config(batch_size=32, model=SMALL), (32, 32, 3)),
    "cifar10": (cifar10, cifar10.Config(), (32, 32, 3)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Compilation and steps with and without the CPU's kernels."""

    runs: tuple[str, ...] = tuple(RUNS)
    """Which experiments' networks."""
    repetitions: int = 5
    """Timed steps of each kind; the median counts."""


def compiled(experiment: Any, config: ImageConfig, shape: tuple[int, ...]) -> dict[str, Any]:
    """Seconds to compile, the compiled step and what it takes."""
    facts = {"event_shape": shape, "num_levels": 256, "num_classes": 10}
    facts |= {"num_examples": 50_000, "sha256": ""}
    config = dataclasses.replace(config, num_devices=1, known=facts, conditional=False)
    task = experiment.make_task(config)
    state = step.init_state(config, task.init, jax.random.key(0))
    steps = step.jit_steps(config, task.step, state)
    x1 = np.random.default_rng(0).integers(256, size=(1, config.batch_size, *shape), dtype=np.uint8)
    batch = Images(x1, None)
    began = time.perf_counter()
    state, metrics = steps(state, jax.random.key(1), batch)
    jax.block_until_ready(metrics)
    return {"seconds": time.perf_counter() - began, "state": state, "steps": steps, "batch": batch}


def timed(case: dict[str, Any]) -> float:
    began = time.perf_counter()
    case["state"], metrics = case["steps"](case["state"], jax.random.key(1), case["batch"])
    jax.block_until_ready(metrics)
    return time.perf_counter() - began


def main(config: Config) -> None:
    for name in config.runs:
        experiment, run, shape = RUNS[name]
        cases = {
            k: compiled(experiment, dataclasses.replace(run, kernels=k), shape) for k in KERNELS
        }
        steps: dict[str, list[float]] = {k: [] for k in KERNELS}
        for _ in range(config.repetitions):
            for k, case in cases.items():
                steps[k].append(timed(case))
        each = {k: float(np.median(values)) for k, values in steps.items()}
        compiling = {k: case["seconds"] - each[k] for k, case in cases.items()}
        saved = each["xla"] - each["cpu"]
        more = compiling["cpu"] - compiling["xla"]
        even = f"{max(0.0, more / saved):,.0f} steps" if saved > 0 else "never"
        print(
            f"{name:14} compile {compiling['xla']:.1f} s, cpu {compiling['cpu']:.1f} s; "
            f"step {each['xla']:.4f} s, cpu {each['cpu']:.4f} s; paid back after {even}",
            flush=True,
        )


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.kernels", doc=__doc__)
