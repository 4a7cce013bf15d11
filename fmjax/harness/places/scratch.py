"""The local scratch folder of a run folder in a bucket: laid out from it, and sent to it."""

import hashlib
import math
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

EVERY_SECONDS = 30.0  # between two sendings of a file that grows
_LOCAL = ("checkpoints", "compiled", "lock", "owner.json")  # what is not sent


def folder_of(address: epath.Path) -> pathlib.Path:
    """This process's local folder for a bucket's, the same at each start on this host."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(address).removeprefix("gs://"))
    name += "-" + hashlib.sha256(str(address).encode()).hexdigest()[:8]
    number = f"-process-{jax.process_index()}" if jax.process_index() else ""
    return pathlib.Path(tempfile.gettempdir()) / f"fmjax-{os.getuid()}" / (name + number)


def lay_out(address: epath.Path, folder: pathlib.Path) -> None:
    """Makes the local folder like the bucket's, but for checkpoints and compiled programs."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    there = {path.relative_to(address): path for path in _files(address)}
    for path in _files(folder):
        if path.relative_to(folder) not in {pathlib.PurePosixPath(p) for p in there}:
            path.unlink()  # of a start whose files were never sent
    for name, path in there.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())


def _files(folder: Any) -> Iterator[Any]:
    """The files that are sent, in this folder and those below."""
    if not folder.exists():
        return
    for path in folder.iterdir():
        if path.name in _LOCAL or path.suffix == ".tmp":
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

    def __init__(
        self, address: epath.Path, folder: pathlib.Path, write: Callable[[Any, bytes], None]
    ):
        self._address, self._folder, self._write = address, folder, write
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
                self._write(target, path.read_bytes())
                self._sent[path] = (state, time.monotonic())

    def receive(self) -> None:
        """Fetches the files of the bucket that are not here."""
        with self._turn:
            for path in _files(self._address):
                here = self._folder / path.relative_to(self._address)
                if not here.exists():
                    here.parent.mkdir(parents=True, exist_ok=True)
                    here.write_bytes(path.read_bytes())
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
