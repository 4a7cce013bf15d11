"""The local scratch folder of a run folder in a bucket: laid out from it, and sent to it."""

import contextlib
import hashlib
import math
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from fmjax.harness.places import patient
from fmjax.harness.records import lock, make_folder

EVERY_SECONDS = 30.0  # between two sendings of a file that grows
_HELD = "scratch.lock"
_LOCAL = ("checkpoints", "compiled", "lock", "owner.json", _HELD)  # what is not sent


def folder_of(address: epath.Path) -> pathlib.Path:
    """This process's local folder for a bucket's, the same at each start on this host."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(address).removeprefix("gs://"))
    name += "-" + hashlib.sha256(str(address).encode()).hexdigest()[:8]
    number = f"-process-{jax.process_index()}" if jax.process_index() else ""
    return pathlib.Path(tempfile.gettempdir()) / f"fmjax-{os.getuid()}" / (name + number)


def held(address: epath.Path, folder: pathlib.Path) -> contextlib.ExitStack:
    """Makes the local folder and holds it for this process.

    Raises:
      ValueError: if it can't be written, or another process of this host has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (owner := folder.parent.stat().st_uid) != os.getuid():
        raise ValueError(
            f"{folder.parent} must be this user's, for programs are run from it; it belongs to "
            f"user {owner}. Give TMPDIR a folder of your own."
        )
    make_folder(folder)
    return lock(folder, _HELD, address)


def lay_out(address: epath.Path, folder: pathlib.Path, *, whole: bool) -> None:
    """Makes the local folder like the bucket's, but for checkpoints and compiled programs.

    By one listing, and all files at once.

    Args:
      address: the bucket's folder.
      folder: the local one; what was never sent is removed.
      whole: whether the folders below are fetched as well, which a run that goes on never reads.
    """
    there = _listed(address, whole=whole)
    for path in list(_files(folder)):
        if path.relative_to(folder) not in there:
            path.unlink()
    _fetch(there, folder)


def _listed(address: epath.Path, *, whole: bool) -> dict[pathlib.PurePosixPath, str]:
    """The objects that were sent, by their names in the folder."""
    root = str(address).removeprefix("gs://").rstrip("/")
    found = [(pathlib.PurePosixPath(name).relative_to(root), name)
             for name in patient.names(root, below=whole)]  # fmt: skip
    return {path: name for path, name in found if _is_sent(path)}


def _fetch(there: dict[pathlib.PurePosixPath, str], folder: pathlib.Path) -> None:
    contents = patient.read_all(there.values())
    for path, name in there.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents[name])


def _is_sent(path: pathlib.PurePath) -> bool:
    return path.suffix != ".tmp" and not set(path.parts) & set(_LOCAL)


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files that are sent, in this folder and those below."""
    for path in folder.iterdir():
        if not _is_sent(path.relative_to(folder)):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


class Sender:
    """Sends the files of a local folder to a bucket's, those that have changed.

    Attributes:
      before: called before anything is sent; if it raises, nothing is sent any more.
      held: a file that is not sent yet.
      error: what has ended the sending.
    """

    def __init__(self, address: epath.Path, folder: pathlib.Path):
        self._address, self._folder = address, folder
        self.before: Any = lambda: None
        self.held: pathlib.Path | None = None
        self.error: Exception | None = None
        self._sent = {path: (_state(path), -math.inf) for path in _files(folder)}
        self._turn, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="fmjax-sender")
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            try:
                self._send(every=EVERY_SECONDS)
            except ValueError as error:  # another run's folder by now
                self.error = error
                return
            except Exception:  # an outage: it is tried again
                self._ended.wait(EVERY_SECONDS)

    def flush(self) -> None:
        """Sends all that has changed, now."""
        if self.error is not None:
            raise self.error
        self._send(every=0.0)

    def _send(self, *, every: float) -> None:
        with self._turn:
            due = [path for path in _files(self._folder) if self._due(path, every)]
            if not due:
                return
            self.before()
            for path in due:
                state = _state(path)
                target = self._address / path.relative_to(self._folder)
                patient.write(target, path.read_bytes())
                self._sent[path] = (state, time.monotonic())

    def receive(self) -> None:
        """Fetches the files of the bucket that are not here."""
        with self._turn:
            there = _listed(self._address, whole=True)
            new = {p: name for p, name in there.items() if not (self._folder / p).exists()}
            _fetch(new, self._folder)
            for path in new:
                here = self._folder / path
                self._sent[here] = (_state(here), time.monotonic())

    def _due(self, path: pathlib.Path, every: float) -> bool:
        if path == self.held:
            return False
        state, when = self._sent.get(path, (None, -math.inf))
        return _state(path) not in (state, None) and time.monotonic() - when >= every

    def close(self, *, send: bool) -> None:
        """Ends the thread, and sends the rest."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if send:
            self.held = None
            self.flush()


def _state(path: pathlib.Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:  # renamed or removed meanwhile
        return None
    return stat.st_size, stat.st_mtime_ns
