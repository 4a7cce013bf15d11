"""Saving a run and resuming it: the state, its step and the run's config (Orbax).

A run folder holds one subfolder per kept step, each with the `TrainState` and the config that it
was trained under. A save is atomic: a run killed in the middle of one leaves a folder that nobody
takes for a checkpoint. Restoring is exact: N steps, save, restore, N steps are 2 N steps, bit for
bit. Random keys are not saved, since step n draws from fold_in(key, n) (see `fmjax.training`).

Beside the state are digests of its arrays, computed on the devices when it was saved. What is
restored is held against them: a checkpoint that the disk has damaged is named, never used. No
pickle is read, only Orbax's arrays and JSON.

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
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from . import digests, stored
from .step import TrainState
from .stored import CheckpointSaveError as CheckpointSaveError
from .stored import Damaged as Damaged
from .stored import DamagedCheckpointError as DamagedCheckpointError

T = TypeVar("T")


class Restored(NamedTuple):
    """A state, and what had to be passed over on the way to it.

    Attributes:
      state: of the latest checkpoint that is what was saved.
      damaged: the later ones, latest first, each a `Damaged(step, reason)`.
    """

    state: TrainState
    damaged: tuple[Damaged, ...]


def open_manager(
    folder: str | os.PathLike[str], *, max_to_keep: int | None = 3, keep_every: int | None = None
) -> ocp.CheckpointManager:
    """Opens a run folder, and makes it where there is none.

    Args:
      folder: any path, or a bucket's URL; spaces and non-ASCII letters are fine.
      max_to_keep: how many checkpoints stay, the latest; None for all. Older ones are deleted.
      keep_every: those of steps that are multiples of this stay as well; None for none.

    Returns:
      Orbax's manager, for this module's functions. Use it as a context manager, or call its
      `close()`: either waits for the save in progress, and raises `CheckpointSaveError` if that
      could not be written.

    Example:
      >>> import tempfile
      >>> with open_manager(tempfile.mkdtemp()) as manager:
      ...     print(latest_step(manager))
      None
    """
    path = os.fspath(folder)
    # Orbax wants an absolute path; a bucket's URL (gs://...) is one.
    path = path if "://" in path else os.path.abspath(path)
    # Leftovers of killed saves stay: they may be another process's save in progress.
    kept = ocp.checkpoint_managers
    policy: Any = kept.LatestN(max_to_keep)
    if keep_every is not None:
        policy = kept.AnyPreservationPolicy([policy, kept.EveryNSteps(keep_every)])
    options = ocp.CheckpointManagerOptions(preservation_policy=policy)
    return stored.Manager(path, options=options, item_names=("state", "record"))


def latest_step(manager: ocp.CheckpointManager) -> int | None:
    """The step of the latest complete checkpoint, or None where there is none."""
    return manager.latest_step()


def steps_in(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of the complete checkpoints in a folder, which need not be there."""
    folder = epath.Path(folder)
    return ocp.utils.checkpoint_steps(folder) if folder.exists() else []


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    config: Mapping[str, Any],
    *,
    wait: bool = False,
) -> None:
    """Saves a state and its config under the state's step.

    The call computes the digests, copies the state from the device and writes it in the background,
    so the state may be donated to the next step immediately. A step that is saved already is not
    saved again.

    Args:
      manager: from `open_manager`.
      state: the state to save; its arrays may be sharded.
      config: what JSON can hold: `dataclasses.asdict` of a frozen dataclass, say.
      wait: whether to return only once the checkpoint is complete. An error of a background save is
        raised by the next `save` or when the manager is closed.

    Raises:
      ValueError: if the folder holds a later step: this state was not restored from it; if a leaf
        is no array, or two leaves or two fields of the config would be saved under one name.
      TypeError: if JSON can't hold `config`.
      CheckpointSaveError: if this checkpoint, or the one before in the background, could not be
        written, on a full disk say. Those before are as they were; a half-written one is none.

    Example:
      >>> import tempfile
      >>> state = TrainState(jnp.int32(20), {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, ())
      >>> with open_manager(tempfile.mkdtemp()) as manager:
      ...     save(manager, state, {"learning_rate": 2e-4}, wait=True)
      ...     restore(manager, state).params
      {'w': Array([1., 1.], dtype=float32)}
    """
    step, latest = int(state.step), latest_step(manager)
    if latest is not None and step < latest:
        raise ValueError(
            f"The steps saved in one folder must grow; got step {step} where {manager.directory} "
            f"holds step {latest}. Restore the latest state, or use another folder."
        )
    plain = _as_json(config)  # what JSON can't hold is refused here
    if step != latest:
        stored.write(manager, step, state, plain)
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
      A `TrainState` of new arrays. The example of `save` shows it.

    Raises:
      ValueError: if there is no checkpoint, or if one is undamaged but does not fit the example.
      DamagedCheckpointError: if the latest is damaged: a file is cut short, missing or changed.
        `restore_latest_good` goes back to the one before.
    """
    return stored.read(manager, _steps(manager)[0], stored.target_of(example, sharding))


def restore_latest_good(
    manager: ocp.CheckpointManager, example: TrainState, sharding: Any = None
) -> Restored:
    """Restores the latest state that is what was saved, and puts the damaged ones after it aside.

    Their folders are renamed to `<step>.damaged`, within the same folder and only once a good
    checkpoint is found: the run can then save these steps again. Nothing is deleted.

    Args:
      manager: from `open_manager`.
      example: as for `restore`.
      sharding: as for `restore`.

    Returns:
      `Restored(state, damaged)`; tell the user what is in `damaged`.

    Raises:
      ValueError: as `restore` does. A checkpoint that does not fit the example is not damaged.
      DamagedCheckpointError: if none is good; then nothing is changed.

    Example:
      >>> import tempfile
      >>> state = TrainState(jnp.int32(20), {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, ())
      >>> with open_manager(tempfile.mkdtemp()) as manager:
      ...     save(manager, state, {}, wait=True)
      ...     state, damaged = restore_latest_good(manager, state)
      >>> damaged
      ()
    """
    target = stored.target_of(example, sharding)
    state, damaged = _latest_good(manager, lambda step: stored.read(manager, step, target))
    if damaged:
        stored.put_aside(manager, damaged)
    return Restored(state, damaged)


def restore_params(
    manager: ocp.CheckpointManager, example: Any, *, average: bool = True, sharding: Any = None
) -> Any:
    """Restores the parameters of the latest state, without its optimiser, if they are as saved.

    Args:
      manager: from `open_manager`; `latest_step(manager)` is their step.
      example: the parameters, or their `jax.eval_shape`. Values are not read.
      average: whether to restore the moving average, or the last parameters.
      sharding: as for `restore`.

    Returns:
      The parameters, new arrays; no other array is read. An average has the dtype that it is
      stored in: float32, beside bfloat16 parameters.

    Raises:
      ValueError, DamagedCheckpointError: as `restore` does.

    Example:
      >>> import tempfile
      >>> params, average = {"w": jnp.ones(2, jnp.bfloat16)}, {"w": jnp.full(2, 0.999)}
      >>> with open_manager(tempfile.mkdtemp()) as manager:
      ...     save(manager, TrainState(jnp.int32(20), params, average, ()), {}, wait=True)
      ...     restore_params(manager, params)
      {'w': Array([0.999, 0.999], dtype=float32)}
    """
    step, field = _steps(manager)[0], "ema_params" if average else "params"
    target = {field: stored.target_of(example, sharding)}
    if average:
        rows = stored.read_record(manager, step)["arrays"]
        leaves = [_as_stored(x, rows.get(name)) for name, x in digests.named(target).items()]
        target = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return stored.read(manager, step, target, field)[field]


def _as_stored(x: jax.ShapeDtypeStruct, row: tuple[str, str] | None) -> jax.ShapeDtypeStruct:
    """An average's array; in float32 if it is stored so, beside parameters in half precision."""
    if row is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    wide = x.update(dtype=jnp.promote_types(x.dtype, jnp.float32))
    return wide if row[0].startswith(f"{wide.dtype}[") else x


def restore_config(manager: ocp.CheckpointManager) -> dict[str, Any] | None:
    """The config of the latest checkpoint whose config is what was saved, or None without one.

    Tuples come back as lists. A later checkpoint with a damaged config is passed over here;
    `restore` and `restore_latest_good` name it.

    Raises:
      DamagedCheckpointError: if there are checkpoints, all with damaged configs.
    """
    if latest_step(manager) is None:
        return None
    return _latest_good(manager, lambda step: stored.read_record(manager, step)["config"])[0]


def check_config(
    manager: ocp.CheckpointManager, config: Mapping[str, Any], *, free: Collection[str] = ()
) -> None:
    """Refuses to resume a run under another config than its own.

    Args:
      manager: from `open_manager`. A folder without a checkpoint takes any config.
      config: the config of the run that starts, as `save` takes it.
      free: names of fields that may differ: "num_steps", or dotted "data.num_workers". A name
        frees the fields below it too. A dot in a field's own name is written "%2E".

    Raises:
      ValueError: if another field differs; it lists each with both values.
      DamagedCheckpointError: as `restore_config` does.

    Example:
      >>> import tempfile
      >>> state = TrainState(jnp.int32(20), {"w": jnp.ones(2)}, {"w": jnp.ones(2)}, ())
      >>> with open_manager(tempfile.mkdtemp()) as manager:
      ...     save(manager, state, {"seed": 0, "num_steps": 100}, wait=True)
      ...     check_config(manager, {"seed": 0, "num_steps": 200}, free={"num_steps"})
    """
    saved = restore_config(manager)
    if saved is None:
        return
    if lines := stored.differences(_fields(saved, free), _fields(_as_json(config), free)):
        raise ValueError(
            f"A run must resume under its own config; {manager.directory} differs in\n"
            + "\n".join(lines)
            + "\nTake another folder, or the values that this one was made with."
        )


def _fields(config: dict[str, Any], free: Collection[str]) -> dict[str, str]:
    """The leaves of a nested config that are not free, in JSON, by dotted name."""
    leaves = digests.named(config, is_leaf=lambda node: not isinstance(node, dict) or not node)
    return {
        name: json.dumps(value)
        for name, value in leaves.items()
        if not any(name == field or name.startswith(f"{field}.") for field in free)
    }


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it comes back: tuples as lists, keys as strings."""
    text = json.dumps(dict(config))
    if json.dumps(plain := json.loads(text)) != text:
        raise ValueError(f"A config's keys must differ as strings, as JSON has them; got {text}.")
    return plain


def _steps(manager: ocp.CheckpointManager) -> list[int]:
    """The steps that can be restored, the latest first."""
    manager.wait_until_finished()  # a step that is being saved counts as saved before it is
    if steps := sorted(manager.all_steps(), reverse=True):
        return steps
    raise ValueError(
        f"To restore, a folder must hold a checkpoint; got none in {manager.directory}. Check the "
        "folder's name, or start with init_train_state."
    )


def _latest_good(
    manager: ocp.CheckpointManager, read: Callable[[int], T]
) -> tuple[T, tuple[Damaged, ...]]:
    """What `read(step)` gives of the latest good checkpoint, and the damaged ones after it."""
    damaged: list[Damaged] = []
    for step in _steps(manager):
        try:
            return read(step), tuple(damaged)
        except DamagedCheckpointError as error:
            damaged += error.damaged
    advice = "No good one is left, and nothing was changed: bring back a copy, or start anew."
    raise DamagedCheckpointError(manager.directory, damaged, advice)
