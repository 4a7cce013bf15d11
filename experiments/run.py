"""What every run shares: its flags, its folder and the record that it leaves there.

A run folder holds

    config.json      the flags, versions, devices, global batch
    checkpoints/     the latest three states (Orbax)
    metrics.jsonl    loss, gradient norm, learning rate and images/s, a line every `log_every` steps
    tensorboard/     the same as TensorBoard events
    loss.png         the loss curve
    samples/         pictures
    summary.json     the figures at the end

A run that is started again in its folder goes on from the last checkpoint.
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any, Literal

import jax
import tensorboardX

import fmjax as fm
from fmjax import checkpoints, sharding, training

PATHS = {"cond_ot": fm.cond_ot(), "cosine": fm.cosine(), "linear_vp": fm.linear_vp(), "vp": fm.vp()}
COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
TIMES = {"uniform": fm.uniform, "logit_normal": fm.logit_normal(), "edm_skewed": fm.edm_skewed()}

# Flags that may change when a run goes on: they leave what has been trained as it is.
FREE = frozenset({"workdir", "num_steps", "checkpoint_every", "log_every"})
FREE |= {"data_dir", "num_samples", "sample_tolerance"}
FREE |= {"eval_split", "eval_examples", "eval_batch_size", "eval_probes", "eval_tolerance"}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that all experiments share."""

    workdir: pathlib.Path
    """Run folder. Started again in the same folder, a run goes on from its last checkpoint."""
    seed: int = 0
    """Seed of everything random: parameters, order of the data, noise, times, samples."""
    num_steps: int = 1000
    """Training steps in all, those before a restart included."""
    batch_size: int = 128
    """Examples per step over all devices."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always makes one."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl."""
    learning_rate: float = 2e-4
    """Adam's learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    clip_norm: float | None = 1.0
    """Largest global norm of a gradient, or None."""
    ema_decay: float = 0.999
    """Decay of the parameters' moving average, warmed up as min(decay, (1 + n) / (10 + n))."""
    path: Literal["cond_ot", "cosine", "linear_vp", "vp"] = "cond_ot"
    """Conditional path from noise to data."""
    coupling: Literal["independent", "minibatch_ot"] = "independent"
    """How noise and data are paired within a batch."""
    times: Literal["uniform", "logit_normal", "edm_skewed"] = "uniform"
    """Density of the training times."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is spread over the devices: jax.jit over a mesh, or jax.pmap."""


def check(config: RunConfig) -> None:
    """Refuses flags that can't work, before anything is loaded or compiled."""
    for name, value in vars(config).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and value <= 0 and name not in ("seed", "warmup_steps", "ema_decay"):
            raise ValueError(f"--{name.replace('_', '-')} must be positive; got {value}.")
    sharding.check_batch_size(config.batch_size, jax.device_count())


def flags(config: RunConfig) -> dict[str, Any]:
    """The config as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


class Run:
    """An open run folder. Use it as a context manager: leaving it finishes what is being written.

    Raises:
      ValueError: if the folder holds a run with other flags; it lists those that differ.
    """

    def __init__(self, experiment: str, config: RunConfig):
        self.folder = config.workdir
        self.config = config
        self._flags = flags(config)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self._manager = checkpoints.open_manager(self.folder / "checkpoints")
        try:
            checkpoints.check_config(self._manager, self._flags, free=FREE)
        except ValueError:
            self._manager.close()
            raise
        record = {"experiment": experiment, "config": self._flags} | _environment(config)
        write_json(self.folder / "config.json", record)
        self.seconds = 0.0  # of training, earlier starts included
        self._writer = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()
        self._manager.close()

    def restore(self, state: training.TrainState) -> training.TrainState:
        """The latest checkpoint, or `state` where there is none; metrics after it are dropped."""
        if checkpoints.latest_step(self._manager) is not None:
            state = checkpoints.restore(self._manager, state)
        step = int(state.step)
        kept = [row for row in self.metrics() if row["step"] <= step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        _replace(self.folder / "metrics.jsonl", lines)
        self._writer = tensorboardX.SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=step + 1 if step else None
        )
        return state

    def save(self, state: training.TrainState, *, wait: bool = False) -> None:
        checkpoints.save(self._manager, state, self._flags, wait=wait)

    def log(self, step: int, metrics: training.Metrics, images_per_second: float) -> None:
        """A line in metrics.jsonl, and the same for TensorBoard."""
        row = {name: float(value) for name, value in metrics._asdict().items()}
        row |= {"images_per_second": images_per_second, "seconds": round(self.seconds, 3)}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | row) + "\n")
        assert self._writer is not None, "restore() comes first"
        for name, value in row.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl; a last line that a kill cut short is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and says where everything is."""
        path = self.folder / "summary.json"
        write_json(path, summary)
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        print(f"\nRun folder  {self.folder}")
        for name in ("samples", "loss.png", "summary.json", "metrics.jsonl", "checkpoints"):
            print(f"  {self.folder / name}")
        print(f"  tensorboard --logdir {self.folder / 'tensorboard'}")


def write_json(path: pathlib.Path, value: Any) -> None:
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: a kill in between leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _environment(config: RunConfig) -> dict[str, Any]:
    packages = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {p: importlib.metadata.version(p) for p in packages if p in installed}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "global_batch": config.batch_size,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
