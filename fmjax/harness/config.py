"""The flags that all experiments share: what they are, which may change, which can't work."""

import dataclasses
import json
import os
import re
from typing import Annotated, Any, Literal

import jax
import tyro
from etils import epath
from jax.sharding import Mesh

from fmjax.harness import places
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.pods.cluster import ClusterConfig, join
from fmjax.training import sharding

# Flags that may change when a run resumes: they leave what has been trained as it is, to rounding.
FREE = frozenset({"workdir", "num_steps", "checkpoint_every", "log_every", "known"})
FREE |= {"bucket_patience", "keep_every", "preview_every", "cpu_threads", "frames", "side"}
FREE |= {"num_devices", "fsdp", "steps_per_dispatch", "remat", "kernels", "cluster"}
FREE |= {"accumulate", "data_dir", "num_samples", "sample_tolerance", "guidance"}
FREE |= {"eval_split", "eval_examples", "eval_batch_size", "eval_probes", "eval_tolerance"}
_MAY_BE_ZERO = frozenset({"seed", "warmup_steps", "ema_decay", "noise", "max_skipped_steps"})
_MAY_BE_ZERO |= {"model.dropout", "dit.dropout", "cluster.process_id", "label_dropout", "guidance"}
_MAY_BE_ZERO |= {"condition_dropout", "adversarial_weight", "transport_weight", "penalty"}
_MAY_BE_ZERO |= {
    "preview_every",
    "num_samples",
    "eval_examples",
    "frames",
}  # zero switches these off
_MAY_BE_EMPTY = frozenset({"model.attention_resolutions", "columns", "condition"})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that all experiments share."""

    workdir: epath.Path | None = None
    """Run folder, or gs://BUCKET/FOLDER; else runs/EXPERIMENT-DATASET. Started again in the same
    folder, a run resumes from its last checkpoint."""
    seed: int = 0
    """Seed of everything random: parameters, order of the data, noise, times, samples."""
    num_steps: int = 1000
    """Training steps in all, those before a restart included."""
    batch_size: int = 128
    """Examples per step over all devices."""
    checkpoint_every: int = 500
    """Steps between checkpoints, of which the latest three stay; the last step always makes one."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this stay for good."""
    log_every: int = 50
    """Steps between lines in metrics.jsonl; losses there are means over them."""
    preview_every: int = 0
    """Steps between previews, pictures of a few samples, and held-out losses; 0 for none."""
    init_from: epath.Path | None = None
    """Run folder whose parameters, the moving average, this run begins with: fine-tuning."""
    optimizer: Literal["adam", "muon"] = "adam"
    """Adam, or Muon for the hidden matrices and Adam for the rest."""
    learning_rate: float = 2e-4
    """The learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    decay_steps: int | None = None
    """Step at which the learning rate has fallen to zero, on a line from the warm-up's end; it
    stays without it. At least num_steps, since a rate of zero trains nothing."""
    clip_norm: float | None = 1.0
    """Largest global norm of a gradient, or None."""
    ema_decay: float = 0.999
    """Decay of the parameters' moving average, warmed up as min(decay, (1 + n) / (10 + n))."""
    num_devices: int | None = None
    """Devices to train on, the first ones; all of all processes without it."""
    fsdp: int = 1
    """Over how many devices one copy of parameters, average and optimiser state is split."""
    accumulate: int = 1
    """Parts that the devices take a step's batch in, one after the other: the same update in less
    memory."""
    steps_per_dispatch: int = 1
    """Training steps per dispatch, without the host in between."""
    max_skipped_steps: int = 0
    """Steps with a loss or gradient that is not finite to leave out before the run stops."""
    cpu_threads: int | None = None
    """Threads of XLA on a CPU; one per core without it. Small networks are faster on one."""
    bucket_patience: float = 300.0
    """Seconds for which a bucket may fail before a run in one ends."""
    cluster: ClusterConfig = ClusterConfig()
    """The processes of a pod."""
    known: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
    """What the data of a finished run are, from its config.json; None in training."""

    @property
    def folder(self) -> places.Folder:
        """The run folder, on a disk or in a bucket."""
        assert self.workdir is not None, "the harness names it before anything asks"
        return places.as_path(self.workdir)

    def data_name(self) -> str:
        """A word for the data, for the run folder's name."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", getattr(self, "dataset", "")).strip("-.")


def begin(config: RunConfig) -> None:
    """Joins the pod, if there is one, and refuses flags that can't work, before all long work.

    Raises:
      ValueError: naming the flag, what it must be and what was got.
    """
    check_flags(config)
    if config.cpu_threads is not None:  # read when the backend starts; the user's own comes first
        os.environ.setdefault("PJRT_NPROC", str(config.cpu_threads))
    join(config.cluster)
    check_devices(config)


def check_flags(config: RunConfig) -> None:
    """Refuses flags that can't work on any devices, which it does not ask for.

    Of a user's own flags it knows no bounds: those that the package declares are checked.
    """
    classes = [cls for cls in type(config).__mro__ if cls.__module__.startswith("fmjax.")]
    check_numbers(
        config,
        among={name for cls in classes for name in vars(cls).get("__annotations__", {})},
        may_be_zero=_MAY_BE_ZERO,
        may_be_empty=_MAY_BE_EMPTY,
        below_one={"model.dropout", "dit.dropout"},
    )
    check_seeds("seed", [config.seed])
    for name in ("workdir", "init_from"):
        places.check_name(f"--{name.replace('_', '-')}", getattr(config, name) or "")
    if config.ema_decay > 1:
        raise ValueError(f"--ema-decay must be in [0, 1]; got {config.ema_decay}.")
    if config.decay_steps is not None and config.decay_steps <= config.warmup_steps:
        raise ValueError(
            f"--decay-steps must be above --warmup-steps; got {config.decay_steps} and "
            f"{config.warmup_steps}. Without the flag the rate stays."
        )
    if config.decay_steps is not None and config.decay_steps < config.num_steps:
        raise ValueError(
            f"--decay-steps must be at least --num-steps, since a rate of zero trains nothing; got "
            f"{config.decay_steps} and {config.num_steps}."
        )
    if config.checkpoint_every % config.steps_per_dispatch:
        raise ValueError(
            f"--checkpoint-every must be a multiple of --steps-per-dispatch; got "
            f"{config.checkpoint_every} and {config.steps_per_dispatch}."
        )


def check_devices(config: RunConfig) -> None:
    """Refuses flags that can't work on the devices that there are."""
    devices, parts = mesh(config).size, config.accumulate
    if parts == 1:
        sharding.check_batch_size(config.batch_size, devices)
    elif config.batch_size % (parts * devices):
        below = config.batch_size // (parts * devices) * parts * devices
        sizes = " or ".join(str(size) for size in (below, below + parts * devices) if size)
        raise ValueError(
            f"--batch-size must be a multiple of --accumulate times the number of devices; got "
            f"{config.batch_size} for {parts} parts on {devices} devices. Take {sizes}."
        )


def check_num_examples(config: RunConfig, num_examples: int) -> None:
    """Refuses batches that the data can't fill, before anything is compiled."""
    if config.batch_size > num_examples:
        raise ValueError(
            f"--batch-size must be at most the {num_examples} examples of the training data; got "
            f"{config.batch_size}. Take a smaller batch or more data."
        )


def mesh(config: RunConfig) -> Mesh:
    """The mesh that the flags ask for.

    Raises:
      ValueError: for more devices than there are, fewer than all in a pod, or an `fsdp` that does
        not divide them.
    """
    num, there = config.num_devices, jax.device_count()
    if num is not None and (num > there or (num < there and jax.process_count() > 1)):
        raise ValueError(
            f"--num-devices must be at most the {there} that there are, and all of them in a pod; "
            f"got {num}. Without the flag a run takes all."
        )
    return sharding.make_mesh(jax.devices()[:num], fsdp=config.fsdp)


def flags(config: Any) -> dict[str, Any]:
    """A config, a dataclass, as JSON can hold it."""
    values = dataclasses.asdict(config)
    values.pop("known", None)
    return json.loads(json.dumps(values, default=str))
