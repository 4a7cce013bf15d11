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
import fcntl
import importlib.metadata
import json
import math
import pathlib
import platform
import time
from typing import Any, Literal, TextIO

import jax
import tensorboardX

import fmjax as fm
from fmjax import checkpoints, sharding, training

PATHS = {"cond_ot": fm.cond_ot(), "cosine": fm.cosine(), "linear_vp": fm.linear_vp(), "vp": fm.vp()}
COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
TIMES = {"uniform": fm.uniform, "logit_normal": fm.logit_normal(), "edm_skewed": fm.edm_skewed()}
# The velocity's square has no mean over times up to 1 where the slope of sigma is infinite.
T_MAX = {"linear_vp": 0.999, "vp": 0.999}

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
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        may_be_zero = name in ("seed", "warmup_steps", "ema_decay", "noise")
        if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            rule = "zero or more" if may_be_zero else "positive"
            raise ValueError(f"--{name.replace('_', '-')} must be {rule}; got {value}.")
    if config.ema_decay > 1:
        raise ValueError(f"--ema-decay must lie in [0, 1]; got {config.ema_decay}.")
    sharding.check_batch_size(config.batch_size, jax.device_count())


def flags(config: Any) -> dict[str, Any]:
    """A config, a dataclass, as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


class Run:
    """An open run folder. Use it as a context manager: leaving it finishes what is being written.

    Raises:
      ValueError: if the folder holds a run with other flags, which are listed, or one that is
        further than `num_steps`, or if another process is running there.
    """

    def __init__(self, experiment: str, config: RunConfig):
        self.folder = config.workdir
        self.config = config
        self._flags = flags(config)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        self._manager = checkpoints.open_manager(self.folder / "checkpoints")
        try:
            checkpoints.check_config(self._manager, self._flags, free=FREE)
            self._check_num_steps()
        except ValueError:
            self._manager.close()
            self._lock.close()
            raise
        record = {"experiment": experiment, "config": self._flags} | environment()
        record |= {"global_batch": config.batch_size}
        write_json(self.folder / "config.json", record)
        self.seconds = 0.0  # of training, earlier starts included
        self._writer = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._writer is not None:
            self._writer.close()
        self._manager.close()
        self._lock.close()

    def _check_num_steps(self) -> None:
        step = checkpoints.latest_step(self._manager) or 0
        if step > self.config.num_steps:
            raise ValueError(
                f"--num-steps must be at least the {step} steps that {self.folder} has done; got "
                f"{self.config.num_steps}. Take another --workdir for a shorter run."
            )

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
            str(self.folder / "tensorboard"), purge_step=step + 1
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
        if summary["images_per_second"] is None and path.exists():  # no step was taken this time
            old = json.loads(path.read_text())
            summary |= {"images_per_second": old.get("images_per_second")}
        write_json(path, summary)
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        print(f"\nRun folder  {self.folder}")
        for name in ("samples", "loss.png", "summary.json", "metrics.jsonl", "checkpoints"):
            print(f"  {self.folder / name}")
        print(
            f"  {self.folder / 'tensorboard'}  (pip install tensorboard; tensorboard --logdir ...)"
        )


def draw_path_sample(config: RunConfig, key: jax.Array, x1: jax.Array) -> fm.PathSample:
    """Noise, its pairing with the data, times and the point on the path, as the flags say.

    Args:
      config: the run's flags.
      key: random key.
      x1: data, `[batch, *event]`.
    """
    key_x0, key_pair, key_t = jax.random.split(key, 3)
    x0 = jax.random.normal(key_x0, x1.shape)
    if config.coupling != "independent":
        # Whole on every device: the assignment is a loop, which would talk between them every turn.
        whole = sharding.replicated(sharding.make_mesh())
        x0, x1 = jax.lax.with_sharding_constraint((x0, x1), whole)
    x0 = COUPLINGS[config.coupling](key_pair, x0, x1)
    t = T_MAX.get(config.path, 1.0) * TIMES[config.times](key_t, x1.shape[:1])
    return fm.sample_path(PATHS[config.path], x0, x1, t)


def lock(folder: pathlib.Path) -> TextIO:
    """Holds the folder for this process; the system lets go of it however the process ends."""
    file = open(folder / "lock", "w")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(
            f"A run folder is one process's at a time; another is running in {folder}. Wait for "
            "it, or take another folder."
        ) from None
    return file


def write_json(path: pathlib.Path, value: Any) -> None:
    _replace(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all: a kill in between leaves the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Versions, devices and the time of day, for the record."""
    packages = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {p: importlib.metadata.version(p) for p in packages if p in installed}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
