"""The flags that all experiments share: what they are, which may change, which can't work."""

import dataclasses
import json
import pathlib
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.cluster import ClusterConfig, join
from fmjax.training import sharding

# Flags that may change when a run resumes: they leave what has been trained as it is, to rounding.
FREE = frozenset({"workdir", "num_steps", "checkpoint_every", "log_every"})
FREE |= {"num_devices", "fsdp", "steps_per_dispatch", "remat", "kernels", "cluster"}
FREE |= {"data_dir", "num_samples", "sample_tolerance", "guidance"}
FREE |= {"eval_split", "eval_examples", "eval_batch_size", "eval_probes", "eval_tolerance"}
_MAY_BE_ZERO = frozenset({"seed", "warmup_steps", "ema_decay", "noise", "max_skipped_steps"})
_MAY_BE_ZERO |= {"model.dropout", "cluster.process_id", "label_dropout", "guidance"}
_MAY_BE_EMPTY = frozenset({"model.attention_resolutions"})


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The flags that all experiments share."""

    workdir: pathlib.Path
    """Run folder. Started again in the same folder, a run resumes from its last checkpoint."""
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
    num_devices: int | None = None
    """Devices to train on, the first ones; all of all processes without it."""
    fsdp: int = 1
    """Over how many devices one copy of parameters, average and optimiser state is split."""
    parallel: Literal["jit", "pmap"] = "jit"
    """How a step is spread over the devices: jax.jit over a mesh, or jax.pmap."""
    steps_per_dispatch: int = 1
    """Training steps per dispatch, without the host in between."""
    max_skipped_steps: int = 0
    """Steps with a loss or gradient that is not finite to leave out before the run stops."""
    cluster: ClusterConfig = ClusterConfig()
    """The processes of a pod."""


def begin(config: RunConfig) -> None:
    """Joins the pod, if there is one, and refuses flags that can't work, before all long work.

    Raises:
      ValueError: naming the flag, what it must be and what was got.
    """
    check_flags(config)
    join(config.cluster)
    check_devices(config)


def check_flags(config: RunConfig) -> None:
    """Refuses flags that can't work on any devices, which it does not ask for."""
    check_numbers(
        config,
        may_be_zero=_MAY_BE_ZERO,
        may_be_empty=_MAY_BE_EMPTY,
        below_one={"model.dropout"},
    )
    check_seeds("seed", [config.seed])
    if config.ema_decay > 1:
        raise ValueError(f"--ema-decay must be in [0, 1]; got {config.ema_decay}.")
    if config.checkpoint_every % config.steps_per_dispatch:
        raise ValueError(
            f"--checkpoint-every must be a multiple of --steps-per-dispatch; got "
            f"{config.checkpoint_every} and {config.steps_per_dispatch}."
        )


def check_devices(config: RunConfig) -> None:
    """Refuses flags that can't work on the devices that there are."""
    if config.parallel == "pmap" and (config.fsdp > 1 or jax.process_count() > 1):
        raise ValueError(
            f"--parallel pmap replicates the state, in one process; got --fsdp {config.fsdp} and "
            f"{jax.process_count()} process(es). Take --parallel jit."
        )
    sharding.check_batch_size(config.batch_size, mesh(config).size)


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
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
