"""One stored checkpoint: written, read, held against its record, put aside where it is damaged.

A step's folder holds two items. "state" is a flat dict of the arrays under their names, which are
unique (`digests.named`). "record", in JSON, has the config, every array's dtype, shape and digest,
and a seal, the hash of all this. Orbax renames the folder once both are written.

Items are read by Orbax's handlers and not by its manager, which waits for all processes at its end:
a process that alone fails to read its part would leave the others waiting. Here every process
first tells the others whether it has failed, so that all come to the same decision.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from . import digests

T = TypeVar("T")


class Damaged(NamedTuple):
    """A checkpoint that is not what was saved: its step, and what was found."""

    step: int
    reason: str


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved; `damaged` lists the steps with the reasons."""

    def __init__(self, folder: Any, damaged: Sequence[Damaged], advice: str):
        self.damaged = tuple(damaged)
        found = [f"step {step}: {reason}" for step, reason in damaged]
        text = f" {found[0]}. " if len(found) == 1 else "\n  {}\n".format("\n  ".join(found))
        super().__init__(f"A checkpoint must be what was saved; damaged in {folder}:{text}{advice}")


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager; the error of a save in the background says what was not written.

    It is raised once, by whatever blocks first: the next save, `wait_until_finished` or `close`.
    """

    _failed: CheckpointSaveError | None = None

    def _load_checkpoint_infos(self, *args: Any, **kwargs: Any) -> Any:
        """Orbax's list. A run that is still there makes room: what has gone is listed no more.

        Opening and reloading begin with it; no process waits for another in it.
        """
        for _ in range(4):
            with contextlib.suppress(FileNotFoundError):
                return super()._load_checkpoint_infos(*args, **kwargs)
        return super()._load_checkpoint_infos(*args, **kwargs)

    def wait_until_finished(self) -> None:
        step = self.latest_step()  # the one in progress, if any is
        try:
            super().wait_until_finished()
        except Exception as error:
            self._failed = _save_error(self, step, error)
            raise self._failed from error

    def close(self) -> None:
        told, step = self._failed is not None, self.latest_step()
        for finish in (self.wait_until_finished, super().close):
            try:
                finish()
            except CheckpointSaveError:  # kept in _failed
                pass
            except Exception as error:  # Orbax's parts may raise one error twice
                self._failed = self._failed or _save_error(self, step, error)
        if self._failed is not None and not told:
            raise self._failed


def write(manager: ocp.CheckpointManager, step: int, state: Any, config: Any) -> None:
    """Copies the state from the devices, and starts to write it with its record.

    Raises:
      ValueError: if two arrays have one name, or a leaf is no array that JAX keeps as it is.
      CheckpointSaveError: as `checkpoints.save` does.
    """
    arrays = digests.named(state)
    for name, x in arrays.items():
        dtype = getattr(x, "dtype", None)  # NumPy's float64 would come back as float32
        if dtype is None or dtype != jax.dtypes.canonicalize_dtype(dtype, True):
            raise ValueError(
                f"A state's leaves must be arrays of JAX; got {dtype or repr(x)} at {name}. "
                "jax.numpy.asarray makes one."
            )
    kinds, values = digests.describe(state), digests.digest_each(arrays)
    record = {"config": config, "arrays": {n: [kinds[n], values.get(n)] for n in kinds}}
    items = ocp.args.Composite(
        # Orbax takes no array without elements; the record says all that there is to one.
        state=ocp.args.StandardSave({name: x for name, x in arrays.items() if x.size}),
        record=ocp.args.JsonSave(record | {"seal": digests.hash_json(record)}),
    )
    try:
        manager.save(step, args=items)
    except CheckpointSaveError:  # of the save before
        raise
    except OSError as error:
        raise _save_error(manager, step, error) from error


def read_record(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The record of one step: "config", and "arrays" as {name: [dtype and shape, digest]}.

    Raises:
      DamagedCheckpointError: if it is not the one that was saved.
    """

    def read() -> dict[str, Any]:
        with contextlib.closing(ocp.JsonCheckpointHandler()) as handler:
            record = dict(handler.restore(_folder(manager, step) / "record"))
        if record.pop("seal", None) != digests.hash_json(record):
            raise ValueError("the record is not the one that was saved, its hash is another")
        return record

    return _attempt(manager, step, read)


def read(manager: ocp.CheckpointManager, step: int, target: Any, field: str | None = None) -> Any:
    """The state of one step, or one field of it, if it is what was saved.

    Args:
      manager: the open manager.
      step: one of its steps.
      target: what is wanted, a tree of `jax.ShapeDtypeStruct` with shardings.
      field: of the state, where the target is {field: ...} and the rest is not to be read.

    Raises:
      DamagedCheckpointError: if anything can't be read, or is not what was saved.
      ValueError: if the checkpoint is undamaged but of another structure, shapes or dtypes.
    """
    rows: dict[str, Any] = read_record(manager, step)["arrays"]
    rows = {name: row for name, row in rows.items() if field in (None, name.split(".")[0])}
    kinds = {name: kind for name, (kind, _) in rows.items()}
    if lines := differences(kinds, digests.describe(target)):
        raise ValueError(
            f"A checkpoint must fit the state that is restored; {_folder(manager, step)} differs "
            f"in {len(lines)} arrays, the first of them\n" + "\n".join(lines[:10]) + "\nBuild the "
            "model and the optimiser that it was saved with, or take another folder."
        )
    wanted = digests.named(target)
    arrays = _attempt(manager, step, lambda: _read_arrays(_folder(manager, step) / "state", wanted))
    found = digests.digest_each(arrays)
    if changed := [name for name in wanted if found[name] != rows[name][1]]:
        reason = f"{len(changed)} digests are not those of the saved values: of "
        raise _damage(manager, step, reason + ", ".join(changed[:5]))
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])


def _read_arrays(folder: Any, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    item = {name: x for name, x in wanted.items() if x.size}
    args = ocp.args.PyTreeRestore(
        item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        arrays = handler.restore(folder, args=args)
    if missing := [name for name, x in arrays.items() if not isinstance(x, jax.Array)]:
        raise ValueError(f"there is no array {missing[0]}")
    empty = {name: x for name, x in wanted.items() if not x.size}
    return arrays | {n: jnp.zeros(x.shape, x.dtype, device=x.sharding) for n, x in empty.items()}


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Where two descriptions by name disagree, a line for each name.

    Example:
      >>> differences({"w": "float32[2,3]", "b": "int8[]"}, {"w": "float32[2,4]", "b": "int8[]"})
      ['  w: folder has float32[2,3], got float32[2,4]']
    """
    return [
        f"  {name}: folder has {old.get(name, 'nothing')}, got {new.get(name, 'nothing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def put_aside(manager: ocp.CheckpointManager, damaged: Sequence[Damaged]) -> None:
    """Renames the folders of damaged steps to `<step>.damaged`, a name that is no checkpoint's.

    In a bucket nothing can be renamed: there the object that made the checkpoint complete becomes
    one of that name, which says what was found. Saving the step again replaces the rest.
    """
    if jax.process_index() == 0:
        for step, reason in damaged:
            folder = _folder(manager, step)
            if "://" in str(folder):
                (folder.parent / f"{step}.damaged").write_text(reason)
                (folder / "commit_success.txt").unlink(missing_ok=True)
                continue
            taken = len(list(folder.parent.glob(f"{step}.damaged*")))
            folder.rename(folder.with_name(f"{step}.damaged" + (f"-{taken}" if taken else "")))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("fmjax: damaged checkpoints are put aside")
    manager.reload()


def target_of(example: Any, sharding: Any) -> Any:
    """The example's shapes with the shardings to restore into."""
    local = SingleDeviceSharding(jax.local_devices()[0])
    if sharding is None:
        sharding = jax.tree.map(lambda x: getattr(x, "sharding", None) or local, example)
    sharding = jax.tree.broadcast(sharding, example)
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), example, sharding
    )


def _folder(manager: ocp.CheckpointManager, step: int) -> Any:
    return manager.directory / str(step)  # of etils: Orbax takes buckets as well as disks


def _attempt(manager: ocp.CheckpointManager, step: int, read: Callable[[], T]) -> T:
    """What `read` returns; where it fails in one process, every process raises."""
    value, error = None, None
    try:
        value = read()
    except jax.errors.JaxRuntimeError:  # of the devices, out of memory for one: no damage
        raise
    except Exception as raised:  # Orbax and TensorStore raise many kinds, bare Exception too
        error = raised
    failed = np.array(error is not None)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(failed)
    if np.any(failed):
        reason = _reason(error) if error else "another process could not read it"
        raise _damage(manager, step, reason) from error
    return value  # pyright: ignore[reportReturnType]


def _damage(manager: ocp.CheckpointManager, step: int, reason: str) -> DamagedCheckpointError:
    advice = "restore_latest_good goes back to the last good one: a run that starts again does so."
    return DamagedCheckpointError(manager.directory, [Damaged(step, reason)], advice)


def _save_error(manager: ocp.CheckpointManager, step: Any, error: Exception) -> CheckpointSaveError:
    """The error of a save, in words: the step, the reason, the last good step, the fix."""
    good = [n for n in ocp.utils.checkpoint_steps(manager.directory) if n != step]
    last = f"the last good one is step {max(good)}" if good else "there is no earlier one"
    # What the system says ("No space left on device"), where it is behind the error.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    return CheckpointSaveError(
        f"The checkpoint of step {step} was not written to {manager.directory}: "
        f"{_reason(error) if number is None else os.strerror(number)}; {last}. Make room there, or "
        "repair the disk, and start again."
    )


def _reason(error: BaseException) -> str:
    """The first cause of an error in one short line, without TensorStore's specifications."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = re.sub(r" \[(tensorstore_spec|source locations|os_error_code)=?.*", "", str(error))
    first = (first.strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-190:]}"
