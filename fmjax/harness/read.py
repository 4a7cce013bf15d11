"""A finished run, read back from its folder: its flags, its task, its parameters.

The task is made by the function that config.json names, which is imported: a module of the user's
own is found where Python finds it, in the working folder for instance.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import types
import typing
from typing import Any, NamedTuple

import jax

from fmjax.harness import command, places
from fmjax.harness.config import RunConfig
from fmjax.harness.task import Task, Trained, check_guidance, guided
from fmjax.training import checkpoints
from fmjax.types import Velocity

_SCALARS = {int: int, float: int | float, str: str, bool: bool}


class Loaded(NamedTuple):
    """What `load` gives: the task, the parameters `task.velocity` takes, and a velocity."""

    task: Task
    params: Any
    velocity: Velocity


def load(
    folder: str | os.PathLike[str],
    condition: Any = None,
    *,
    guidance: float = 1.0,
    average: bool = True,
) -> Loaded:
    """A finished run, for a notebook.

    Args:
      folder: a run folder.
      condition: of the velocity, `[batch, ...]`, labels for instance; None for a velocity that
        knows none.
      guidance: the scale of classifier-free guidance; 1 is none.
      average: whether to take the moving average of the parameters, or the last ones.

    Returns:
      `(task, params, velocity)`: the run's task, its parameters on the host, and the velocity
      `(t, x) -> u` under the condition. `task.velocity(params, other)` has another one.

    Raises:
      ValueError: as `read` does; for guidance of a run that has not learnt it.

    Example:
      >>> task, params, velocity = load("runs/digits", jnp.arange(10))  # doctest: +SKIP
      >>> x0 = task.samples.source.sample(jax.random.key(0), 10)  # doctest: +SKIP
      >>> digits = fm.sample(velocity, x0)  # doctest: +SKIP
    """
    trained = read(places.as_path(folder), average=average, guidance=guidance)
    velocity = guided(trained.task, trained.params, condition, guidance)
    return Loaded(trained.task, trained.params, velocity)


def read(folder: places.Folder, *, average: bool = True, guidance: float = 1.0) -> Trained:
    """The run in a folder, with the parameters of its latest checkpoint on the host.

    Args:
      folder: a run folder.
      average: whether to take the moving average of the parameters, or the last ones.
      guidance: the scale of `Trained.guided`.

    Raises:
      ValueError: as `read_config` does; for guidance of a run that has not learnt it; if there is
        no checkpoint, or one of another network.
    """
    record, config = read_config(folder)
    make_task = imported(record["make_task"], folder / "config.json", "a function")
    task = make_task(config)
    check_guidance(task, guidance)
    example = jax.eval_shape(task.init, jax.random.key(0)).params
    params, step = restore_params(folder, example, average=average)
    return Trained(task, record["experiment"], config, step, params, average, guidance)


def restore_params(folder: places.Folder, example: Any, *, average: bool = True) -> tuple[Any, int]:
    """The parameters of a run's latest checkpoint, on the host, and their step.

    Args:
      folder: a run folder.
      example: the parameters, or their `jax.eval_shape`.
      average: whether to take the moving average, or the last ones.

    Raises:
      ValueError: if there is no checkpoint, or one of another network, whose leaves are named.
    """
    if not (folder / "checkpoints").is_dir():
        if not folder.exists():
            raise ValueError(
                f"A run folder must hold a checkpoint; got {folder}, which does not exist. Train "
                "first: the last line of an experiment names its run folder."
            )
        raise ValueError(
            f"A run folder must hold a checkpoint; got none in {folder}. Start its experiment "
            "again: it resumes and trains to the end."
        )
    missed = None
    while True:
        with checkpoints.open_manager(folder / "checkpoints") as manager:
            step = checkpoints.latest_step(manager)
            try:
                params = checkpoints.restore_params(manager, example, average=average)
            except Exception:
                manager.reload()
                if checkpoints.latest_step(manager) in (step, missed):
                    raise
                missed = step  # it made room for a later one: the run is training
                continue
        assert step is not None  # else restore_params has raised
        return jax.device_get(params), step


def read_config(folder: places.Folder) -> tuple[dict[str, Any], Any]:
    """What config.json holds, and the flags in it as the class that it names.

    The flags say where the run folder is today, and what its data are.

    Raises:
      ValueError: if the folder holds no run, one whose module can't be imported, or other flags.
    """
    path = folder / "config.json"
    if not path.is_file():
        reason = (
            "is a file" if folder.is_file() else "does not" if folder.exists() else "does not exist"
        )
        raise ValueError(
            f"A run folder must hold config.json; got {folder}, which {reason}. Train first: the "
            "last line of an experiment names its run folder."
        )
    try:
        record = json.loads(path.read_text())
        flags, address = record["config"], record["config_class"]
        words = record["experiment"], record["make_task"], address
        if not (isinstance(flags, dict) and all(isinstance(word, str) for word in words)):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} must be the JSON record of a run of this version; got something else. Is it "
            "truncated, or of an older version?"
        ) from None
    cls = imported(address, path, "a class of flags")
    if not (isinstance(cls, type) and issubclass(cls, RunConfig)):
        raise ValueError(f"{path} must name a class of flags; got {address}.")
    try:
        config = from_flags(cls, flags)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold the flags of {address} as they are today; it lacks or adds "
            f"{error}. Evaluate it with the version that trained it, or train again."
        ) from None
    return record, dataclasses.replace(config, workdir=folder, known=record.get("data"))


def imported(address: str, path: places.Folder, what: str) -> Any:
    """What is at an address "module:name", as config.json has it."""
    module, _, name = address.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever is wrong in a module of a user's own
        raise ValueError(
            f"{path} names {address} as what made the run, which can't be imported: {error}. Start "
            "the command in the folder where that module is, or install it."
        ) from None
    if not callable(found):
        raise ValueError(f"{path} must name {what}; got {address}.")
    command.ours(module)
    return found


def from_flags(cls: type[Any], flags: dict[str, Any]) -> Any:
    """A config from what JSON kept of it: paths are strings there, tuples lists."""
    if not isinstance(flags, dict):
        raise TypeError(f"{flags!r} for the flags of {cls.__name__}")
    if unknown := sorted(flags.keys() - {field.name for field in dataclasses.fields(cls)}):
        raise KeyError(", ".join(unknown))
    hints = typing.get_type_hints(cls)
    # A flag that the run did not know yet has its default.
    return cls(**{name: _value(hints[name], value) for name, value in flags.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_flags(hint, value)
    if typing.get_origin(hint) is types.UnionType:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return None if value is None else _value(kinds[0], value)
    if isinstance(hint, type) and issubclass(hint, pathlib.PurePath):
        return places.as_path(value)
    if hint in _SCALARS and (
        not isinstance(value, _SCALARS[hint]) or (hint is not bool and isinstance(value, bool))
    ):
        raise TypeError(f"{value!r} where a value of {hint} should be")
    return tuple(value) if typing.get_origin(hint) is tuple else value
