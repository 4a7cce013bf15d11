"""One stored checkpoint: written, read, held against its record, put aside where it is damaged.

A step's folder holds three items: "state" (arrays), "config" and "digest" (JSON; the record of
`fmjax.digests`). Orbax renames the folder when all three are whole, so they are there together.
It is read by Orbax's item handlers and not by its manager, which waits for all processes at its
end: a process that alone fails to read its part would leave the others waiting. Here every process
first tells the others whether it has failed, so that all come to the same decision.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fmjax import digests
from fmjax._manager import Damaged, DamagedCheckpointError, reason_of

T = TypeVar("T")
Path = Any  # of etils: Orbax takes buckets as well as disks


def steps_of(manager: ocp.CheckpointManager) -> list[int]:
    """The steps that can be restored, the latest first."""
    manager.wait_until_finished()  # a step that is being saved counts as saved before it is
    steps = sorted(manager.all_steps(), reverse=True)
    if not steps:
        raise ValueError(
            f"To restore, a folder must hold a checkpoint; got none in {manager.directory}. Check "
            "the folder's name, or start with init_train_state."
        )
    return steps


def target_of(example: Any, sharding: Any) -> Any:
    """The example's shapes with the shardings to restore into."""
    local = SingleDeviceSharding(jax.local_devices()[0])
    if sharding is None:
        places = jax.tree.map(lambda x: getattr(x, "sharding", None) or local, example)
    else:
        places = jax.tree.broadcast(sharding, example)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), example, places
    )


@functools.cache
def _digest_on(sharding: Sharding | None) -> Callable[[jax.Array], jax.Array]:
    """The compiled digest; its result lies whole on every device, for each process to read."""
    if isinstance(sharding, NamedSharding):
        whole = NamedSharding(sharding.mesh, PartitionSpec())
        return jax.jit(digests.digest, out_shardings=whole)
    return jax.jit(digests.digest)


def digests_of(tree: Any) -> list[str]:
    """The digests of a tree's arrays in hexadecimal, taken on their devices."""
    words = [_digest_on(getattr(x, "sharding", None))(x) for x in jax.tree.leaves(tree)]
    return ["".join(f"{int(word):08x}" for word in pair) for pair in jax.device_get(words)]


def read_config(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The config of one step, as it was saved.

    Raises:
      DamagedCheckpointError: if it is not.
    """

    def read() -> dict[str, Any]:
        folder = _folder(manager, step)
        config, record = _read_json(folder / "config"), _read_record(folder)
        if record is not None and digests.hash_json(config) != record["config"]:
            raise ValueError("the config is not the one that was saved")
        return config

    return _attempt(manager, step, read)


def read_state(manager: ocp.CheckpointManager, step: int, target: Any) -> Any:
    """The state of one step, if all of the checkpoint is what was saved.

    Args:
      manager: the open manager.
      step: one of its steps.
      target: the state's tree of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      DamagedCheckpointError: if anything can't be read, or is not what was saved.
      ValueError: if the checkpoint is whole but of another structure, shapes or dtypes.
    """
    read_config(manager, step)
    folder = _folder(manager, step)
    record = _attempt(manager, step, lambda: _read_record(folder))
    if record is None:
        warnings.warn(f"{folder} was saved without digests: not verified.", stacklevel=3)
    handler = ocp.StandardCheckpointHandler()
    stored = _attempt(manager, step, lambda: _stored_rows(handler, folder, record))
    _check_fits(folder, stored, digests.describe(target), empty=record is not None)
    args = ocp.args.StandardRestore(target)
    state = _attempt(manager, step, lambda: handler.restore(folder / "state", args=args))
    if record is not None and (names := digests.changed(record, state, digests_of(state))):
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        reason = f"the digests of {some} are not those of the saved values"
        raise _damage(manager, step, reason)
    return state


def _folder(manager: ocp.CheckpointManager, step: int) -> Path:
    return manager.directory / str(step)


def _read_json(folder: Path) -> dict[str, Any]:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
        return dict(handler.restore(folder, args=ocp.args.JsonRestore()))


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record, or None in a checkpoint from before there were records."""
    if not (folder / "digest").exists():
        return None
    record = _read_json(folder / "digest")
    digests.check_seal(record)
    return record


def _stored_rows(handler: Any, folder: Path, record: Any) -> list[digests.Row]:
    """What is stored: by the record, or else by Orbax's own metadata."""
    if record is not None:
        return [(name, kind) for name, kind, _ in record["arrays"]]
    return digests.describe(handler.metadata(folder / "state").tree)


def _check_fits(
    folder: Path, stored: list[digests.Row], rows: list[digests.Row], *, empty: bool
) -> None:
    """Compares the arrays, and the empty nodes too, which Orbax's own metadata does not list."""
    old, new = (
        {name: kind for name, kind in x if empty or kind != "empty"} for x in (stored, rows)
    )
    if lines := digests.differences(old, new):
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ValueError(
            f"A checkpoint must fit the state that is restored; {folder} differs in\n"
            + "\n".join(lines[:10] + more)
            + "\nBuild the model and the optimiser that it was saved with, or take another folder."
        )


def _attempt(manager: ocp.CheckpointManager, step: int, read: Callable[[], T]) -> T:
    """What `read` returns; where it fails in one process, every process raises."""
    value, reason, cause = None, "", None
    try:
        value = read()
    except jax.errors.JaxRuntimeError:  # of the devices, out of memory for one: no damage
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception too
        reason, cause = reason_of(error), error
    if _anywhere(bool(reason)):
        raise _damage(manager, step, reason or "another process could not read it") from cause
    return value  # pyright: ignore[reportReturnType]


def _damage(manager: ocp.CheckpointManager, step: int, reason: str) -> DamagedCheckpointError:
    mend = "restore_latest_good goes back to the last whole one: a run that starts again does so."
    return DamagedCheckpointError(manager.directory, [Damaged(step, reason)], mend)


def _anywhere(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def put_aside(manager: ocp.CheckpointManager, damaged: Sequence[Damaged]) -> None:
    """Renames the folders of damaged steps to `<step>.damaged`, a name that is no checkpoint's."""
    if jax.process_index() == 0:
        for step, _ in damaged:
            folder = _folder(manager, step)
            taken = len(list(folder.parent.glob(f"{step}.damaged*")))
            folder.rename(folder.with_name(f"{step}.damaged" + (f"-{taken}" if taken else "")))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("fmjax: damaged checkpoints are put aside")
    manager.reload()
