"""The small files of a run folder: written whole or not at all, by one process at a time."""

import contextlib
import fcntl
import importlib.metadata
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Iterator
from typing import Any, TextIO

import jax
from jax.experimental.compilation_cache import compilation_cache

from fmjax.files import write_whole as write_whole


def claim(folder: pathlib.Path) -> TextIO:
    """Makes a run folder and holds it for this process.

    Raises:
      ValueError: if it can't be written, or another process holds it.
    """
    try:
        for part in (folder, folder / "checkpoints", folder / "samples"):
            part.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=part) as file:
                file.write(b"0")
    except OSError as error:
        raise ValueError(
            f"A run folder must be one that can be written; got {folder}: {error.strerror}. Take "
            "another --workdir, or make room."
        ) from None
    return lock(folder)


def lock(folder: pathlib.Path) -> TextIO:
    """Holds the folder for this process; the system lets go of it however the process ends."""
    file = open(folder / "lock", "w")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise ValueError(
                f"A run folder must be on a disk that knows file locks; got {folder}: "
                f"{error.strerror}. Take another one."
            ) from None
        raise ValueError(
            f"A run folder is one process's at a time; another is running in {folder}. Wait for "
            "it, or take another folder."
        ) from None
    return file


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
    """Writes a file whole or not at all: a kill in between leaves the old one."""
    write_whole(path, lambda file: file.write(text.encode()))


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
