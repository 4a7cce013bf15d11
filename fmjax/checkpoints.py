"""Saving a run and going on with it: the state, its step and the run's config (Orbax).

A run folder holds one subfolder per kept step, each with the `TrainState` and the config that it
was trained under. A checkpoint is written under a temporary name and renamed when it is whole, so
that a run killed in the middle of a save leaves a folder that nobody takes for a checkpoint.
Restoring is exact: N steps, save, restore, N steps are 2 N steps, bit for bit. Keys need no place
in it, since step n draws from fold_in(key, n) (see `fmjax.training`).

A training loop reads

    with open_manager(folder) as manager:            # leaving it waits for the last save
        check_config(manager, config)
        if latest_step(manager) is not None:
            state = restore(manager, state)
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
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from fmjax.training import TrainState


def open_manager(
    folder: str | os.PathLike[str], *, max_to_keep: int | None = 3
) -> ocp.CheckpointManager:
    """Opens a run folder, and makes it where there is none.

    Args:
      folder: any path, or a bucket's URL; spaces and non-ASCII letters are fine.
      max_to_keep: how many checkpoints stay, the latest; None for all. Older ones are deleted.

    Returns:
      Orbax's manager, for this module's functions. Use it as a context manager, or call its
      `close()`: either waits for the save in progress.

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
    return ocp.CheckpointManager(
        path,
        options=ocp.CheckpointManagerOptions(preservation_policy=policy),
        item_names=("state", "config"),
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

    The call copies the state from the device and writes it in the background, so the state may be
    donated to the next step at once. A step that is saved already is not saved again.

    Args:
      manager: from `open_manager`.
      state: the state to save; its arrays may be sharded.
      config: what JSON can hold: `dataclasses.asdict` of a frozen dataclass, say.
      wait: whether to return only once the checkpoint is whole. An error of a background save is
        raised by the next `save` or when the manager is closed.

    Raises:
      ValueError: if the folder holds a later step: this state was not restored from it.
      TypeError: if JSON can't hold `config`.

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
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(plain),
        )
        manager.save(step, args=items)
    if wait:
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, example: TrainState, sharding: Sharding | None = None
) -> TrainState:
    """Restores the latest state.

    Args:
      manager: from `open_manager`.
      example: a state of the same structure, shapes and dtypes: the fresh state of
        `init_train_state`, or its `jax.eval_shape`. Its values are not read.
      sharding: where to put every array, `sharding.replicated(mesh)` for instance; None for where
        the example's are (the first local device for the arrays of `jax.eval_shape`). It need not
        be the one that the state was saved under.

    Returns:
      A `TrainState` of new arrays.

    Raises:
      ValueError: if there is no checkpoint, or if one does not fit the example.

    Example:
      >>> state = restore(manager, init_train_state(params, tx))
    """
    step = latest_step(manager)
    if step is None:
        raise ValueError(
            f"To restore, a folder must hold a checkpoint; got none in {manager.directory}. Check "
            "the folder's name, or start with init_train_state."
        )

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        place = sharding or getattr(x, "sharding", None)
        if place is None:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    target = ocp.args.StandardRestore(jax.tree.map(abstract, example))
    return manager.restore(step, args=ocp.args.Composite(state=target))["state"]


def restore_config(manager: ocp.CheckpointManager) -> dict[str, Any] | None:
    """The config of the latest checkpoint (tuples come back as lists), or None without one."""
    step = latest_step(manager)
    if step is None:
        return None
    args = ocp.args.Composite(config=ocp.args.JsonRestore())
    return manager.restore(step, args=args)["config"]


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

    Example:
      >>> check_config(manager, {"seed": 0, "num_steps": 200}, free={"num_steps"})
    """
    stored = restore_config(manager)
    if stored is None:
        return
    old, new = dict(_fields(stored)), dict(_fields(config))
    differences = [
        f"  {name}: folder has {old.get(name, 'nothing')}, got {new.get(name, 'nothing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name, free)
    ]
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
