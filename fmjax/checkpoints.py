"""Saving a run and going on with it: the state, its step and the run's config (Orbax).

A run folder holds one subfolder per kept step, each with the `TrainState` and the config that it
was trained under. A checkpoint is written under a temporary name and renamed when it is whole, so
that a run killed in the middle of a save leaves a folder that nobody takes for a checkpoint.
Restoring is exact: N steps, save, restore, N steps are 2 N steps, bit for bit. Keys need no place
in it, since step n draws from fold_in(key, n) (see `fmjax.training`).

Beside the state stand digests of its arrays, taken on the devices when it was saved, and a hash of
the config. What is restored is held against them: a checkpoint that the disk has damaged is named,
never used. No pickle is read, only Orbax's arrays and JSON.

A training loop reads

    with open_manager(folder) as manager:            # leaving it waits for the last save
        check_config(manager, config)
        if latest_step(manager) is not None:
            state, damaged = restore_latest_good(manager, state)
        for step in range(int(state.step), num_steps):
            state, metrics = train_step(state, key, next(batches))
            if (step + 1) % save_every == 0:
                save(manager, state, config)
        save(manager, state, config, wait=True)

On a pod every process calls every function, with the same folder.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import orbax.checkpoint as ocp

from fmjax import _manager, _stored, digests
from fmjax._manager import CheckpointSaveError as CheckpointSaveError
from fmjax._manager import Damaged as Damaged
from fmjax._manager import DamagedCheckpointError as DamagedCheckpointError
from fmjax.training import TrainState


class Restored(NamedTuple):
    """A state, and what had to be passed over on the way to it.

    Attributes:
      state: of the latest checkpoint that is what was saved.
      damaged: the later ones, latest first, each a `Damaged(step, reason)`.
    """

    state: TrainState
    damaged: tuple[Damaged, ...]


def open_manager(
    folder: str | os.PathLike[str], *, max_to_keep: int | None = 3
) -> ocp.CheckpointManager:
    """Opens a run folder, and makes it where there is none.

    Args:
      folder: any path, or a bucket's URL; spaces and non-ASCII letters are fine.
      max_to_keep: how many checkpoints stay, the latest; None for all. Older ones are deleted.

    Returns:
      Orbax's manager, for this module's functions. Use it as a context manager, or call its
      `close()`: either waits for the save in progress, and raises `CheckpointSaveError` if that
      could not be written.

    Example:
      >>> with open_manager("runs/moons") as manager:
      ...     print(latest_step(manager))
      None
    """
    path = os.fspath(folder)
    # Orbax wants an absolute path; a bucket's URL (gs://...) is one.
    path = path if "://" in path else os.path.abspath(path)
    # Leftovers of killed saves stay: they may be another process's save in progress.
    policy = ocp.checkpoint_managers.LatestN(max_to_keep)
    return _manager.Manager(
        path,
        options=ocp.CheckpointManagerOptions(preservation_policy=policy),
        item_names=("state", "config", "digest"),
    )


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The step of the latest whole checkpoint, or None where there is none."""
    return manager.latest_step()


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    config: Mapping[str, Any],
    *,
    wait: bool = False,
) -> None:
    """Saves a state and its config under the state's step.

    The call takes the digests, copies the state from the device and writes it in the background,
    so the state may be donated to the next step at once. A step that is saved already is not saved
    again.

    Args:
      manager: from `open_manager`.
      state: the state to save; its arrays may be sharded.
      config: what JSON can hold: `dataclasses.asdict` of a frozen dataclass, say.
      wait: whether to return only once the checkpoint is whole. An error of a background save is
        raised by the next `save` or when the manager is closed.

    Raises:
      ValueError: if the folder holds a later step: this state was not restored from it.
      TypeError: if JSON can't hold `config`.
      CheckpointSaveError: if this checkpoint, or the one before in the background, could not be
        written, on a full disk say. Those before are as they were; a half-written one is none.

    Example:
      >>> save(manager, state, {"learning_rate": 2e-4}, wait=True)
    """
    step, latest = int(state.step), latest_step(manager)
    if latest is not None and step < latest:
        raise ValueError(
            f"The steps saved in one folder must grow; got step {step} where {manager.directory} "
            f"holds step {latest}. Restore the latest state, or use another folder."
        )
    plain = json.loads(json.dumps(config))  # what JSON can't hold is refused here
    if step != latest:
        record = digests.make_record(state, _stored.digests_of(state), plain)
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(plain),
            digest=ocp.args.JsonSave(record),
        )
        try:
            manager.save(step, args=items)
        except CheckpointSaveError:  # of the save before
            raise
        except OSError as error:
            raise _manager.save_error(manager, step, error) from error
    if wait:
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, example: TrainState, sharding: Any = None
) -> TrainState:
    """Restores the latest state, if it is what was saved.

    Args:
      manager: from `open_manager`.
      example: a state of the same structure, shapes and dtypes: the fresh state of
        `init_train_state`, or its `jax.eval_shape`. Its values are not read.
      sharding: where to put the arrays: one sharding for all, `sharding.replicated(mesh)` for
        instance, or a tree of them as `jax.jit` takes it; None for where the example's are (the
        first local device for the arrays of `jax.eval_shape`). It need not be the one that the
        state was saved under, nor the mesh.

    Returns:
      A `TrainState` of new arrays. One that was saved before there were digests is not verified;
      a warning says so.

    Raises:
      ValueError: if there is no checkpoint, or if one is whole but does not fit the example.
      DamagedCheckpointError: if the latest is damaged: a file is cut short, missing or changed.
        `restore_latest_good` goes back to the one before.

    Example:
      >>> state = restore(manager, init_train_state(params, tx))
    """
    return _stored.read_state(
        manager, _stored.steps_of(manager)[0], _stored.target_of(example, sharding)
    )


def restore_latest_good(
    manager: ocp.CheckpointManager, example: TrainState, sharding: Any = None
) -> Restored:
    """Restores the latest state that is what was saved, and puts the damaged ones after it aside.

    Their folders are renamed to `<step>.damaged`, within the same folder and only once a whole
    checkpoint is found: the run can then save these steps again. Nothing is deleted.

    Args:
      manager: from `open_manager`.
      example: as for `restore`.
      sharding: as for `restore`.

    Returns:
      `Restored(state, damaged)`; tell the user what is in `damaged`.

    Raises:
      ValueError: as `restore` does. A checkpoint that does not fit the example is not damaged.
      DamagedCheckpointError: if none is whole; then nothing is changed.

    Example:
      >>> state, damaged = restore_latest_good(manager, init_train_state(params, tx))
    """
    target, damaged = _stored.target_of(example, sharding), []
    for step in _stored.steps_of(manager):
        try:
            state = _stored.read_state(manager, step, target)
        except DamagedCheckpointError as error:
            damaged += error.damaged
            continue
        if damaged:
            _stored.put_aside(manager, damaged)
        return Restored(state, tuple(damaged))
    raise _none_left(manager, damaged)


def _none_left(manager: ocp.CheckpointManager, damaged: list[Damaged]) -> DamagedCheckpointError:
    mend = (
        "No whole one is left, and nothing was changed: bring back a copy, or take another folder."
    )
    return DamagedCheckpointError(manager.directory, damaged, mend)


def restore_config(manager: ocp.CheckpointManager) -> dict[str, Any] | None:
    """The config of the latest checkpoint whose config is what was saved, or None without one.

    Tuples come back as lists. A later checkpoint with a damaged config is passed over here;
    `restore` and `restore_latest_good` name it.

    Raises:
      DamagedCheckpointError: if there are checkpoints, all with damaged configs.
    """
    if latest_step(manager) is None:
        return None
    damaged = []
    for step in _stored.steps_of(manager):
        try:
            return _stored.read_config(manager, step)
        except DamagedCheckpointError as error:
            damaged += error.damaged
    raise _none_left(manager, damaged)


def check_config(
    manager: ocp.CheckpointManager, config: Mapping[str, Any], *, free: Collection[str] = ()
) -> None:
    """Refuses to go on with a run under another config than its own.

    Args:
      manager: from `open_manager`. A folder without a checkpoint takes any config.
      config: the config of the run that starts, as `save` takes it.
      free: names of fields that may differ: "num_steps", or dotted "data.num_workers". A name
        frees the fields below it too.

    Raises:
      ValueError: if another field differs; it lists each with both values.
      DamagedCheckpointError: as `restore_config` does.

    Example:
      >>> check_config(manager, {"seed": 0, "num_steps": 200}, free={"num_steps"})
    """
    stored = restore_config(manager)
    if stored is None:
        return
    kept = ((n, v) for n, v in _fields(stored) if not _is_free(n, free))
    given = ((n, v) for n, v in _fields(config) if not _is_free(n, free))
    differences = digests.differences(dict(kept), dict(given))
    if differences:
        raise ValueError(
            f"A run must go on under its own config; {manager.directory} differs in\n"
            + "\n".join(differences)
            + "\nGive another folder (--workdir), or the flags that this one was made with."
        )


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a nested config as (dotted name, value in JSON)."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value)


def _is_free(name: str, free: Collection[str]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in free)
