"""Where a run folder lies: on a disk, or in a bucket.

Objects of a bucket can't be appended to or renamed, and each request costs a tenth of a second. So
what a run writes beside its checkpoints, it writes to a local scratch folder, laid out from the
bucket at the start, and a thread of its own sends it: a file that is new or was written anew goes
up whole, what grows (metrics.jsonl) every 30 s at most, all of it before a checkpoint is complete
and at the end. TensorBoard's events go up once, when their file is closed. Compiled programs stay
in the scratch. On a disk the run folder is the scratch, and nothing is sent.
"""

import contextlib
import hashlib
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from fmjax.harness import cluster

EVERY_SECONDS = 30.0
SHARED_SECONDS = 30.0
_LOCAL = ("checkpoints", "compiled")  # folders that are not sent
Folder = pathlib.Path | epath.Path


def in_bucket(folder: Any) -> bool:
    return str(folder).startswith("gs://")


def check_name(name: str, folder: Any) -> None:
    """Refuses what is neither a local folder nor a bucket's.

    Raises:
      ValueError: for another scheme, a bucket without a folder, or where gcsfs is missing.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", str(folder))
    if scheme is None:
        return
    if scheme[1] != "gs" or not in_bucket(folder):
        raise ValueError(
            f"{name} must be a local folder or gs://BUCKET/FOLDER, to which Orbax can write; got "
            f"{folder}."
        )
    if not re.match(r"gs://[^/]+/[^/]", str(folder)):
        raise ValueError(f"{name} must name a folder, gs://BUCKET/FOLDER; got {folder}.")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{name} in a bucket needs gcsfs: pip install 'fmjax[gcs]'; got {folder}.")


def as_path(folder: str | os.PathLike[str], name: str = "A run folder") -> Folder:
    """A folder of a disk or a bucket.

    Raises:
      ValueError: as `check_name` does.
    """
    check_name(name, folder)
    if not in_bucket(folder):
        return pathlib.Path(folder)
    from fmjax.harness import bucket  # an extra's packages

    bucket.register()
    return epath.Path(folder)


def check_shared(folder: Folder) -> None:
    """Refuses a folder that not every process sees; by all of them.

    Raises:
      ValueError: in every process, naming those that don't see it.
    """
    if jax.process_count() == 1:
        return
    name = multihost_utils.broadcast_one_to_all(np.frombuffer(uuid.uuid4().bytes, np.uint8))
    token = folder / f"seen-{bytes(np.asarray(name)).hex()}.tmp"
    if cluster.is_main():
        token.write_text("")
    try:
        deadline = time.monotonic() + SHARED_SECONDS
        while not (seen := _is_there(token)) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = np.flatnonzero(~cluster.gather(seen))
    finally:
        if cluster.is_main():
            token.unlink()
    if blind.size:
        raise ValueError(
            f"All processes must see one run folder; {folder} of process 0 is not there for "
            f"process {', '.join(map(str, blind))}. Give --workdir gs://BUCKET/FOLDER, or a folder "
            "on a disk that all hosts mount."
        )


def _is_there(path: Folder) -> bool:
    """Whether it is; also False where it can't be asked for."""
    try:
        return path.exists()
    except Exception:  # of a network or of rights, of many kinds
        return False


class Place:
    """A folder and the local one in which its files are written.

    Args:
      address: the folder, on a disk or in a bucket.
      patience: seconds for which a bucket may fail.

    Attributes:
      address: as given.
      folder: the local one.
    """

    def __init__(self, address: Folder, patience: float = 300.0):
        self.address, self.folder = address, pathlib.Path(address)
        self._sender: Sender | None = None
        self._fence: Any = None
        self._dog: Any = None
        self._patience = patience
        if in_bucket(address):
            from fmjax.harness import bucket  # an extra's packages

            bucket.register(patience)
            self.folder = scratch(address)

    def open(self, *, fenced: bool = True) -> None:
        """Makes the local folder like the bucket's and takes it; by every process.

        Raises:
          ValueError: if the bucket can't be written.
        """
        if not in_bucket(self.address):
            return
        from fmjax.harness import bucket

        def prepare() -> None:
            bucket.check(self.address)  # pyright: ignore[reportArgumentType]
            lay_out(self.address, self.folder)

        cluster.main_first(prepare)
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sender = Sender(self.address, self.folder, bucket.write)
        if fenced and cluster.is_main():
            self._fence = bucket.Fence(self.address, self._sender.flush)  # pyright: ignore
            self._fence.raise_it()
            self._sender.before = self._fence.check

    def send(self) -> None:
        """From now on a thread sends what is written."""
        if self._sender is not None:
            self._sender.start()

    def check(self) -> None:
        """Raises what has ended the sending, an `OwnerError` for one."""
        if self._sender is not None and self._sender.error is not None:
            raise self._sender.error

    def watch(self, saving: Callable[[], bool], kept: Callable[[], str]) -> None:
        """Ends this process if a save can't come to its end."""
        if in_bucket(self.address):
            from fmjax.harness import bucket

            self._dog = bucket.Watchdog(self.address, self._patience, saving, kept)  # pyright: ignore

    def hold(self, path: pathlib.Path | None) -> None:
        """This file is not sent as long as it is the one that is held."""
        if self._sender is not None:
            self._sender.held = path

    def close(self, *, forget: bool = False) -> None:
        """Sends the rest; with `forget` nothing, and takes back the claim."""
        if self._dog is not None:
            self._dog.close()
        try:
            if self._sender is not None:
                self._sender.close(send=not forget)
        finally:
            if self._fence is not None:
                self._fence.drop(forget=forget)


@contextlib.contextmanager
def at_hand(address: Folder) -> Iterator[pathlib.Path]:
    """A local folder like this one; what is written there is sent as it comes, and at the end."""
    place = Place(address)
    place.open(fenced=False)
    place.send()
    try:
        yield place.folder
    finally:
        place.close()


def scratch(address: Folder) -> pathlib.Path:
    """This process's local folder for a bucket's, the same at each start on this host."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", str(address).removeprefix("gs://"))
    name += "-" + hashlib.sha256(str(address).encode()).hexdigest()[:8]
    number = f"-process-{jax.process_index()}" if jax.process_index() else ""
    return pathlib.Path(tempfile.gettempdir()) / f"fmjax-{os.getuid()}" / (name + number)


def lay_out(address: Folder, folder: pathlib.Path) -> None:
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
        if path.is_dir():
            if path.name not in _LOCAL:
                yield from _files(path)
        elif path.suffix != ".tmp" and path.name not in ("lock", "owner.json"):
            yield path


class Sender:
    """Sends the files of a local folder to a bucket's, those that have changed.

    Attributes:
      before: called before anything is sent; if it raises, nothing is sent any more.
      held: a file that is not sent yet.
      error: what has ended the sending.
    """

    def __init__(self, address: Folder, folder: pathlib.Path, write: Callable[[Any, bytes], None]):
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
