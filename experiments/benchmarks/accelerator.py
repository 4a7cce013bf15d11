"""How fast the two CIFAR-10 U-Nets train and sample, as a share of what the chip can multiply.

    python -m experiments.benchmarks.accelerator

- The peak is measured in the same run: the best rate of a chain of square matrix products in the
  network's precision, over a few sizes.
- Model FLOPs are XLA's count for the forward pass of one image, with batch 1, and three times that
  for a training step (Kaplan et al. 2020, arXiv 2001.08361, appendix). What `--remat` computes
  twice counts once.
- A training step is the experiments' own: uint8 images from the host, flip, dequantisation, noise,
  times, dropout, gradient, clipping, Adam, moving average, `--steps-per-dispatch` per dispatch.
- Sampling is a solve by equal Euler steps; images/s are network evaluations per second, times the
  batch.
- Attention is timed alone, XLA's against cuDNN's, at the shapes of the first network.
- torchcfm's network under `torch.compile` in bfloat16, with PyTorch's fused Adam, is timed in a
  process of its own where torch sees a GPU (`accelerator_torchcfm.py`).

Times are medians over repetitions that end with `block_until_ready`. On a CPU the defaults are
small, so that the script can be seen to work; its figures say nothing about accelerators.
"""

import dataclasses
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import cifar10
from fmjax import models
from fmjax.harness import command, step
from fmjax.harness.config import mesh
from fmjax.harness.records import environment, write_json
from fmjax.tasks import images
from fmjax.training import sharding

LARGE = images.UNetConfig(
    channels=128,
    channel_multipliers=(2, 2, 2),
    num_res_blocks=4,
    attention_resolutions=(16,),
    dropout=0.3,
    scale_shift_norm=True,
    conv_resample=False,
)
NETWORKS = {"cifar10_unet": cifar10.Config().model, "cifar10_unet_large": LARGE}


@dataclasses.dataclass(frozen=True)
class Config:
    """Throughput of the CIFAR-10 networks on this machine."""

    networks: tuple[str, ...] = tuple(NETWORKS)
    """Which of the two."""
    batch_size: int | None = None
    """Images per step over all devices; 128 per device, on a CPU 2."""
    precision: Literal["float32", "bfloat16"] | None = None
    """bfloat16, on a CPU float32."""
    steps_per_dispatch: int | None = None
    """Training steps per dispatch; 10, on a CPU 1."""
    remat: bool = False
    """Whether blocks are computed again in the backward pass."""
    repetitions: int = 3
    """Timed repetitions, after one that compiles."""
    record: pathlib.Path | None = None
    """A folder for accelerator.json and accelerator.md."""


def seconds(run: Callable[[], Any], repetitions: int) -> float:
    """Median time of `run`, after once to compile."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matrix_peak(precision: str, on_cpu: bool, repetitions: int) -> float:
    """FLOP/s of one device: the best of a few sizes of square products, a chain of eight each."""
    rates = []
    for size in (1024,) if on_cpu else (4096, 8192, 12288):
        a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision)) / size**0.5

        @jax.jit
        def chain(a: jax.Array, b: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, 8, lambda _, b: a @ b, b)

        rates.append(8 * 2 * size**3 / seconds(functools.partial(chain, a, a), repetitions))
    return max(rates)


def model_flops(model: models.UNet) -> float:
    """FLOPs of the forward pass of one 32x32x3 image, as XLA counts the program as written."""
    t, x = (
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    params = jax.eval_shape(model.init, jax.random.key(0), t, x)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # a GPU's client has no count
        cost: Any = jax.jit(model.apply).lower(params, t, x).cost_analysis()
    return cost["flops"]


def train_seconds(config: cifar10.Config, repetitions: int) -> float:
    """Seconds of one dispatch of the experiments' training step."""
    facts = {"event_shape": (32, 32, 3), "num_levels": 256, "num_classes": 10}
    facts |= {"num_examples": 50_000, "sha256": ""}
    task = cifar10.make_task(dataclasses.replace(config, known=facts))
    state = step.init_state(config, task.init, jax.random.key(0))
    steps = step.jit_steps(config, task.step, state)
    shape = (config.steps_per_dispatch, config.batch_size, 32, 32, 3)
    batch = images.Images(np.random.default_rng(0).integers(0, 256, shape, np.uint8), None)

    def run() -> Any:
        nonlocal state
        state, metrics = steps(state, jax.random.key(1), batch)
        return metrics

    return seconds(run, repetitions)


def sample_seconds(config: cifar10.Config, num_steps: int, repetitions: int) -> float:
    """Seconds of a solve by `num_steps` Euler steps."""
    model = models.UNet(**dataclasses.asdict(config.model), dtype=jnp.dtype(config.precision))
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 32, 32, 3)))
    params = jax.device_put(params, sharding.replicated(mesh(config)))
    x0 = np.random.default_rng(0).standard_normal((config.batch_size, 32, 32, 3), np.float32)
    x0 = sharding.spread(x0, mesh(config))

    @jax.jit
    def solve(params: Any, x0: jax.Array) -> jax.Array:
        velocity = functools.partial(model.apply, params)
        return fm.sample(velocity, x0, solver=diffrax.Euler(), num_steps=num_steps)

    return seconds(functools.partial(solve, params, x0), repetitions)


def attention_seconds(batch_size: int, precision: str, repetitions: int) -> dict[str, float]:
    """Forward and backward of attention over 16x16 pixels, four heads of 64."""
    q = jnp.ones((batch_size, 256, 4, 64), jnp.dtype(precision))
    found = {}
    for name in ("xla", "cudnn") if jax.default_backend() == "gpu" else ("xla",):

        @jax.jit
        @jax.grad
        def gradient(q: jax.Array, name: Any = name) -> jax.Array:
            h = jax.nn.dot_product_attention(q, q, q, implementation=name)
            return jnp.sum(h.astype(jnp.float32))

        try:
            found[name] = seconds(functools.partial(gradient, q), repetitions)
        except (RuntimeError, ValueError) as error:  # cuDNN takes some dtypes and shapes only
            print(f"attention by {name}: {error}")
    return found


def torch_rows(networks: tuple[str, ...], batch_size: int, repetitions: int) -> list[Any]:
    """torchcfm's network, timed in another process; empty without torch or without its GPU."""
    if "cifar10_unet" not in networks:
        return []
    command = [sys.executable, "-m", "experiments.benchmarks.accelerator_torchcfm"]
    done = subprocess.run(
        [*command, str(batch_size), str(repetitions)], stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout) if done.returncode == 0 else []


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        f"{record['device_count']} x {record['device_kind']}, {record['precision']}; jax "
        f"{record['versions']['jax']}, {record['started'][:10]}; measured matrix peak "
        f"{record['peak'] / 1e12:.3g} TFLOP/s per device",
        "",
        "| network | work | batch | images/s | model TFLOP/s | share of the peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['network']} | {row['work']} | {row['batch_size']} | "
            f"{row['images_per_second']:.4g} | {row['flops_per_second'] / 1e12:.3g} | "
            f"{row['flops_per_second'] / record['peak'] / record['device_count']:.1%} |"
        )
    for name, value in record["attention_seconds"].items():
        lines.append(f"| attention alone, {name} | forward + backward | {record['batch_size']} | "
                     f"{record['batch_size'] / value:.4g} | | |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main(config: Config) -> dict[str, Any]:
    on_cpu = jax.default_backend() == "cpu"
    batch_size = config.batch_size or (2 if on_cpu else 128) * jax.device_count()
    precision = config.precision or ("float32" if on_cpu else "bfloat16")
    dispatch = config.steps_per_dispatch or (1 if on_cpu else 10)
    peak = matrix_peak(precision, on_cpu, config.repetitions)
    rows = []
    for name in config.networks:
        run = cifar10.Config(
            model=NETWORKS[name],
            batch_size=batch_size,
            precision=precision,
            steps_per_dispatch=dispatch,
            remat=config.remat,
        )
        flops = model_flops(models.UNet(**dataclasses.asdict(run.model)))
        num_steps = 1 if on_cpu else 10
        for work, factor, count, spent in (
            ("training", 3, dispatch, train_seconds(run, config.repetitions)),
            ("sampling", 1, num_steps, sample_seconds(run, num_steps, config.repetitions)),
        ):
            rate = batch_size * count / spent
            rows.append(
                {"network": name, "work": work, "batch_size": batch_size}
                | {"images_per_second": rate, "flops_per_second": factor * flops * rate}
            )
            print(rows[-1], flush=True)
    flops = model_flops(models.cifar10_unet())
    for row in torch_rows(config.networks, batch_size, config.repetitions):
        factor = 3 if row["work"] == "training" else 1
        rows.append(row | {"flops_per_second": factor * flops * row["images_per_second"]})
    record = environment() | {"precision": precision, "steps_per_dispatch": dispatch}
    record |= {"remat": config.remat, "batch_size": batch_size, "peak": peak, "rows": rows}
    record["attention_seconds"] = attention_seconds(batch_size, precision, config.repetitions)
    print(table(record))
    if config.record is not None:
        config.record.mkdir(parents=True, exist_ok=True)
        write_json(config.record / "accelerator.json", record)
        (config.record / "accelerator.md").write_text(table(record))
    return record


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.accelerator", doc=__doc__)
