"""A finished run, read back from its folder: its network with the parameters that it ended with."""

import dataclasses
import functools
import importlib
import json
import pathlib
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import images, two_moons
from fmjax import models
from fmjax.harness.config import RunConfig
from fmjax.harness.run import differences
from fmjax.training import checkpoints, digests


class Trained(NamedTuple):
    """A trained velocity and where it comes from.

    Attributes:
      experiment: name of the experiment, "mnist" say.
      config: the flags that it was trained under.
      step: training steps.
      params: the network's parameters.
      velocity: `velocity(params, labels) -> (t, x) -> u`, unguided; labels `[batch]`, or None for
        a network without classes.
      guided: the same under the guidance that was asked for.
      num_classes: of a conditional network; else None.
      digest: SHA-256 of the parameters, their names, dtypes and shapes, in hex.
      average: whether `params` are the moving average.
    """

    experiment: str
    config: RunConfig
    step: int
    params: Any
    velocity: Callable[[Any, Any], fm.Velocity]
    guided: Callable[[Any, Any], fm.Velocity]
    num_classes: int | None
    digest: str
    average: bool

    def labels(self, rows: np.ndarray) -> np.ndarray | None:
        """The classes of samples by their numbers, by turns; None for a network without classes."""
        return None if self.num_classes is None else (rows % self.num_classes).astype(np.int32)


def read_config(folder: pathlib.Path) -> tuple[str, RunConfig]:
    """The experiment's name and its flags, from config.json.

    The flags are those of the class that config.json names, which is imported: a module of the
    user's own is found where Python finds it, in the working folder for instance.

    Raises:
      ValueError: if the folder holds no run, one whose module can't be imported, or other flags.
    """
    path = folder / "config.json"
    if not path.is_file():
        reason = (
            "is a file" if folder.is_file() else "does not" if folder.exists() else "does not exist"
        )
        raise ValueError(
            f"A run folder must hold config.json; got {folder}, which {reason}. Train one first, "
            "python -m experiments.digits for example, and name its folder, runs/digits."
        )
    try:
        record = json.loads(path.read_text())
        name = record["experiment"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} must be the JSON record of a run; got something else. Is it truncated?"
        ) from None
    address = record.get("config_class", f"experiments.{name}:Config")
    cls = _imported(address, path)
    try:
        return name, _from_flags(cls, record["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the flags of {address} as they are today; it lacks or adds "
            f"{error}. Evaluate it with the version that trained it, or train again."
        ) from None


def _imported(address: str, path: pathlib.Path) -> type[RunConfig]:
    """The class of flags at an address "module:name", as config.json has it."""
    module, _, name = address.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} names {address} as what made the run, which can't be imported: {error}. Start "
            "the command in the folder where that module is, or install it."
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, RunConfig)):
        raise ValueError(f"{path} must name a class of flags; got {address}.")
    return cls


def read_data(folder: pathlib.Path, config: images.ImageConfig) -> dict[str, Any]:
    """What an image run's data are, from config.json; from the data for a run that lacks it."""
    found = json.loads((folder / "config.json").read_text()).get("data")
    return found or images.describe(images.load(config, config.train_split))


def check_own_data(folder: pathlib.Path, config: images.ImageConfig) -> None:
    """Refuses pictures of a user's own that are not those which the run was trained on.

    Else what it learnt by heart could stand among what is held out.
    """
    known = json.loads((folder / "config.json").read_text()).get("data")
    if known is None or not config.dataset.startswith(("folder:", "npz:")):
        return
    now = images.describe(images.load(config, config.train_split))
    if lines := differences(known, now):
        raise ValueError(
            f"{config.dataset} must hold the pictures that {folder} was trained on; it differs in "
            f"{lines}. Bring them back."
        )


def load(
    folder: pathlib.Path,
    event_shape: tuple[int, ...],
    *,
    average: bool = True,
    num_classes: int | None = None,
    guidance: float = 1.0,
) -> Trained:
    """The run in `folder`, with its latest checkpoint.

    Args:
      folder: a run folder of the image or the 2-D experiments.
      event_shape: of one example of its data.
      average: whether to take the moving average of the parameters, or the last ones.
      num_classes: of its data; a run that isn't conditional makes nothing of it.
      guidance: the scale of `guided`.

    Raises:
      ValueError: as `read_config` does; for guidance of a run that has not learnt it; if there is
        no checkpoint, or one of another network.
    """
    name, config = read_config(folder)
    model, conditional = _model(config, num_classes), getattr(config, "conditional", False)
    if guidance != 1 and not (conditional and getattr(config, "label_dropout", 0)):
        raise ValueError(
            f"--guidance needs a run that was trained with --conditional, and with a "
            f"--label-dropout above 0; got {guidance} for {folder}."
        )
    init = functools.partial(model.init, t=jnp.zeros(()), x=jnp.zeros((1, *event_shape)))
    if not (folder / "checkpoints").is_dir():
        raise ValueError(
            f"A run folder must hold a checkpoint; got none in {folder}. Start its experiment "
            "again: it resumes and trains to the end."
        )
    with checkpoints.open_manager(folder / "checkpoints") as manager:
        example = jax.eval_shape(init, jax.random.key(0))
        params = jax.device_get(checkpoints.restore_params(manager, example, average=average))
        step = checkpoints.latest_step(manager)
    assert step is not None  # else restore_params has raised
    return Trained(
        experiment=name,
        config=config,
        step=step,
        params=params,
        velocity=functools.partial(images.make_velocity, model),
        guided=functools.partial(images.make_velocity, model, guidance=guidance),
        num_classes=num_classes if conditional else None,
        digest=digests.hash_tree(params),
        average=average,
    )


def _model(config: RunConfig, num_classes: int | None) -> models.MLP | models.UNet:
    if isinstance(config, images.ImageConfig):
        return images.make_model(config, num_classes)
    assert isinstance(config, two_moons.Config)
    return models.MLP(**dataclasses.asdict(config.model))


def _from_flags(cls: type[Any], flags: dict[str, Any]) -> Any:
    """A config from what JSON kept of it: paths are strings there, tuples lists."""
    if unknown := sorted(flags.keys() - {field.name for field in dataclasses.fields(cls)}):
        raise KeyError(", ".join(unknown))
    hints = typing.get_type_hints(cls)
    # A flag that the run did not know yet has its default.
    return cls(**{name: _value(hints[name], value) for name, value in flags.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _from_flags(hint, value)
    if typing.get_origin(hint) is types.UnionType:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return None if value is None else _value(kinds[0], value)
    if hint is pathlib.Path:
        return pathlib.Path(value)
    return tuple(value) if typing.get_origin(hint) is tuple else value
