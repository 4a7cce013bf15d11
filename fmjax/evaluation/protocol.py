"""The flags of an evaluation, what they may be, and what of them is recorded with the figures."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import tyro
from etils import epath

from fmjax import data
from fmjax.evaluation import drawing, judging
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.config import flags
from fmjax.harness.pods.cluster import ClusterConfig
from fmjax.harness.records import environment
from fmjax.harness.task import Trained
from fmjax.training import sharding

IMAGE_FLAGS = ("tolerance", "num_samples", "eval_examples", "num_draws", "dequantization")
IMAGE_FLAGS += ("divergence", "num_probes", "probe", "judge")


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluates a finished run."""

    run: Annotated[epath.Path, tyro.conf.Positional]
    """Run folder, or gs://BUCKET/FOLDER."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the noise; the figures are means over them. The first also seeds the likelihood."""
    average: bool = True
    """Whether to evaluate the moving average of the parameters, or the last ones."""
    batch_size: int = 128
    """Examples per solve, over all devices of a process. They share the adaptive step."""
    tolerance: float = 1e-3
    """Of Tsit5, relative and absolute, in samples and likelihoods of images. Of points 1e-5."""
    num_samples: int = 500
    """Samples per seed. Published figures want 50000. Of points: as many as are held out."""
    eval_examples: int = 256
    """Held-out images for bits/dim, the first of the run's --eval-split."""
    guidance: float = 1.0
    """Scale of the guidance in drawing from a run with --conditional; 1 is none."""
    num_draws: int = 1
    """K, dequantisation draws per image; above 1 the importance-weighted bound is reported too."""
    dequantization: Literal["uniform", "truncated-normal"] = "uniform"
    """How levels become real numbers."""
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    """Hutchinson's estimate, or the exact trace, which costs a product per pixel."""
    num_probes: int = 2
    """Hutchinson probes per image, fixed during a solve; two or more show their own error."""
    probe: Literal["rademacher", "gaussian"] = "rademacher"
    """What the probes are drawn from."""
    judge: judging.JudgeConfig = judging.JudgeConfig()
    """What sample quality is measured with."""
    curve_examples: int = 0
    """Samples per point of the curve of quality against evaluations, 500 say; 0 for no curve."""
    curve_evaluations: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 200)
    """Evaluations of the solvers with equal steps."""
    curve_jumps: tuple[int, ...] = (1, 2, 4, 8)
    """Evaluations by the run's own way, unguided: a flow map's jumps, Euler's steps of a student of
    reflow. Other runs have none."""
    curve_tolerances: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4)
    """Tolerances of the adaptive solvers."""
    cluster: ClusterConfig = ClusterConfig()
    """The processes of a pod, which share the work; the run folder is on a disk that all see."""


def check(config: Config) -> None:
    """Refuses flags that can't work, before anything is loaded."""
    zero = {"curve_examples", "seeds", "guidance", "cluster.process_id"}
    check_numbers(config, may_be_zero=zero, may_be_empty={"seeds"})
    check_seeds("seeds", config.seeds)
    if config.eval_examples < 2:
        raise ValueError(f"--eval-examples must be at least 2; got {config.eval_examples}.")
    judging.check(config.judge)
    sharding.check_batch_size(config.batch_size, jax.local_device_count())


def identity(model: Trained, config: Config) -> dict[str, Any]:
    """What every stored number depends on. A solve's step is shared by its batch."""
    return {"parameters": model.digest, "batch_size": config.batch_size}


def record(config: Config, model: Trained, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """How the figures were made: flags that count, parameters, device and versions."""
    jumps = () if drawing.can_jump(model) else ("curve_jumps",)
    unused = ("run", "cluster", *leave_out, *jumps)
    asked = {name: value for name, value in flags(config).items() if name not in unused}
    return {
        "experiment": model.name,
        "step": model.step,
        "parameters": "moving average" if model.average else "last",
        "parameters_sha256": model.digest,
        "flags": asked,
    } | environment()


def refuse_image_flags(config: Config, num_points: int) -> None:
    """A likelihood of points is exact, and samples are as many as the held-out points."""
    if config.curve_examples > num_points:
        raise ValueError(
            f"--curve-examples must be at most the {num_points} held-out points of the run; got "
            f"{config.curve_examples}."
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in IMAGE_FLAGS if getattr(config, name) != defaults[name]]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"These flags are for image runs; {config.run} is one of points: {names}.")


def first(dataset: data.ImageDataset, num: int) -> data.ImageDataset:
    """The first `num` examples, or all where there are fewer."""
    return dataset._replace(images=dataset.images[:num], labels=dataset.labels[:num])
