"""The small files of a run folder: atomic writes, by one process at a time."""

import contextlib
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from fmjax.files import write_whole as write_whole
from fmjax.training.checkpoints import CheckpointSaveError

# What the system says of a disk that is full, over its quota, read-only, closed to us or broken.
_OF_DISKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_OF_DISKS |= {errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


class DiskError(OSError):
    """A folder can't be written; the message says what of it is kept."""


def claim(folder: pathlib.Path) -> contextlib.ExitStack:
    """Makes a run folder and holds it for this process.

    Raises:
      ValueError: if it can't be written, or another process holds it.
    """
    for part in (folder, folder / "checkpoints", folder / "samples"):
        make_folder(part)
    return lock(folder)


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, unless it is there, and writes a byte to it to see if there is room.

    Raises:
      ValueError: if it can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"A folder must be one that can be written; got {folder}: {error.strerror}. Take "
            "another one, or make room there."
        ) from None


def lock(folder: pathlib.Path, file: str = "lock", name: object = None) -> contextlib.ExitStack:
    """Holds the folder for this process; the system lets go of it however the process ends.

    Args:
      folder: a local one.
      file: in it, that is locked.
      name: what messages call the folder; None for its path.

    Returns:
      What lets go of it when it is closed or left.

    Raises:
      ValueError: if the folder can't be written, or another process holds it. A disk without locks
        is warned about.
    """
    held = filelock.FileLock(
        folder / file, blocking=False, thread_local=False, fallback_to_soft=False
    )
    stack = contextlib.ExitStack()
    try:
        held.acquire()
        stack.callback(held.release)
    except filelock.Timeout:
        raise ValueError(
            f"A run folder is one process's at a time; another is running in {name or folder}. "
            "Wait for it, or take another folder."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise ValueError(
                f"A folder must be one that can be written; got {folder}: {error.strerror}. Take "
                "another one, or make room there."
            ) from None
        print(
            f"{folder} lies on a disk without file locks ({error.strerror}): see to it yourself "
            "that no second run is started there.",
            file=sys.stderr,
        )
    return stack


@contextlib.contextmanager
def writing(folder: pathlib.Path, kept: Callable[[], str]) -> Iterator[None]:
    """Where a file can't be written, says the folder, the reason, what is kept, and the fix.

    Args:
      folder: what is written.
      kept: what is said to be kept, asked for when it happens.

    Raises:
      DiskError: instead of any error behind which a disk's is found.
    """
    try:
        yield
    except Exception as error:
        reason = disk_failure(folder, error)
        if reason is None:
            raise
        raise DiskError(
            f"{folder} can't be written: {reason}; {kept()}. Make room there, or repair the disk, "
            "and start again."
        ) from error


def disk_failure(folder: pathlib.Path, error: BaseException | None) -> str | None:
    """What the system says of the folder's disk behind an error; None where it says nothing.

    An archive that can't be closed on a full disk fails once more, with an error of its own. None
    also for what is in words already, a checkpoint's error or a DiskError, and for a file that is
    not in the folder.
    """
    while error is not None:
        if isinstance(error, DiskError | CheckpointSaveError):
            return None
        if isinstance(error, OSError) and error.errno in _OF_DISKS:
            inside = not error.filename or folder.absolute() in _above(error.filename)
            return os.strerror(error.errno) if inside else None
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _above(file: str) -> set[pathlib.Path]:
    path = pathlib.Path(file).absolute()
    return {path, *path.parents}


@contextlib.contextmanager
def compiled_in(folder: pathlib.Path) -> Iterator[None]:
    """Keeps what is compiled in a folder, unless the user keeps it elsewhere already."""
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def write_json(path: pathlib.Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """An atomic write: a kill in between leaves the old file."""
    write_whole(path, lambda file: file.write(text.encode()))


def address(value: Any) -> str:
    """Where a class or a function can be imported from again, "module:name".

    That is also so for a module that runs as a command: `python -m my_project.moons` and
    `python moons.py` name it `__main__`.
    """
    module = value.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec else pathlib.Path(file).stem if file else module
    return f"{module}:{value.__qualname__}"


def environment() -> dict[str, Any]:
    """Versions, devices and the time of day, for the record."""
    packages = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
    packages += ("scipy", "safetensors")
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {p: importlib.metadata.version(p) for p in packages if p in installed}
    return {
        "versions": {"python": platform.python_version()} | versions,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
