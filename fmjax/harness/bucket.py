"""A Google Cloud Storage bucket under a run: patient requests, and who may write.

Whatever reads or writes `gs://` through fsspec, Orbax's small files among it, comes through
`Patient`: a request that is answered with 408, 429 or 5xx, that is cut off or that is not answered
at all is tried again for `patience` seconds, where gcsfs gives up after half a minute. 403 and 404
are answers.

Two runs in one folder are told apart by a fence. A start writes a token of its own to
`RUN/owner.json`; the object that makes a checkpoint complete is written only while the token there
is still its own. So a preempted pod's successor begins at once, and a predecessor that lives on
ends without having written.
"""

import asyncio
import inspect
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import aiohttp
import fsspec
import gcsfs.core
from etils import epath
from gcsfs.retry import HttpError, is_retriable

from fmjax.harness import cluster

_COMMIT = "commit_success.txt"  # Orbax's last object of a checkpoint


class OwnerError(ValueError):
    """Another run has begun in the folder; this one must not write there any more."""


class Patient(gcsfs.core.GCSFileSystem):
    """gcsfs with patience, without caches of what others may have changed, behind a fence."""

    patience = 300.0
    request_seconds = 60.0  # for one to be answered; it may carry many megabytes
    fences: dict[str, "Fence"] = {}

    def __init__(self, *args: Any, **kwargs: Any):
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            kwargs.setdefault("token", "anon")
        super().__init__(*args, **kwargs | {"use_listings_cache": False})

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        attempt: Any = inspect.unwrap(gcsfs.core.GCSFileSystem._request)  # without its six tries
        deadline, wait = time.monotonic() + self.patience, 0.5
        while True:
            try:
                call = attempt(self, method, path, *args, **kwargs)
                return await asyncio.wait_for(call, self.request_seconds)
            except Exception as error:
                if not passing(error) or time.monotonic() + wait > deadline:
                    raise
            await asyncio.sleep(wait)
            wait = min(2 * wait, 15.0)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        if mode != "rb" and path.endswith(_COMMIT):
            for folder, fence in self.fences.items():
                if path.removeprefix("gs://").startswith(folder):
                    fence.before_commit()
        return super()._open(path, mode, *args, **kwargs)


def passing(error: BaseException) -> bool:
    """Whether a failure may pass: an outage, a throttled or a lost request."""
    if isinstance(error, asyncio.TimeoutError | aiohttp.ClientError | ConnectionError):
        return not (isinstance(error, aiohttp.ClientResponseError) and error.status in (403, 404))
    if isinstance(error, HttpError) and error.code is not None:
        return int(error.code) in (408, 429) or int(error.code) >= 500
    return is_retriable(error)


def register(patience: float | None = None) -> None:
    """Makes `gs://` patient in this process, for epath and for Orbax."""
    Patient.patience = Patient.patience if patience is None else patience
    for protocol in Patient.protocol:
        fsspec.register_implementation(protocol, Patient, clobber=True)


def read(path: Any) -> bytes:
    """An object's bytes, by one request."""
    return fsspec.filesystem("gs").cat_file(str(path))


def write(path: Any, content: bytes) -> None:
    """Writes an object whole, by one request unless it is large."""
    fsspec.filesystem("gs").pipe_file(str(path), content)


def check(folder: epath.Path) -> None:
    """Refuses a bucket that can't be written, before long work.

    Raises:
      ValueError: if there is no such bucket, no credentials, or no right to write.
    """
    name = str(folder).removeprefix("gs://").partition("/")[0]
    probe = folder / f"probe-{uuid.uuid4().hex}"
    try:
        write(probe, b"")
        probe.unlink()
    except Exception as error:
        raise ValueError(
            f"A run folder in a bucket must be one that can be written; got {folder}: "
            f"{_why(error, name)}."
        ) from None


def _why(error: Exception, name: str) -> str:
    code, text = getattr(error, "code", None), str(error).strip()
    if code == 404 or isinstance(error, FileNotFoundError):
        return f"there is no bucket {name}. `gcloud storage buckets create gs://{name}` makes one"
    if code in (401, 403) or "Forbidden" in text:
        who = text.splitlines()[-1] if text else "403"
        return f"access is denied ({who}). Give the account that runs here objectAdmin on {name}"
    if "credentials" in text.lower():
        return "there are no credentials. `gcloud auth application-default login` makes some"
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"


class Fence:
    """This start's token in a run folder of a bucket.

    Args:
      folder: the run folder.
      flush: called before a checkpoint is made complete, to send what belongs to it.
    """

    def __init__(self, folder: epath.Path, flush: Callable[[], None]):
        self._folder, self._flush = folder, flush
        self._path, self._token = folder / "owner.json", uuid.uuid4().hex
        Patient.fences[f"{str(folder).removeprefix('gs://')}/checkpoints/"] = self

    def raise_it(self) -> None:
        """Takes the folder; whoever had it finds this token."""
        owner = {"token": self._token, "host": socket.gethostname(), "began": time.time()}
        write(self._path, json.dumps(owner).encode())

    def check(self) -> None:
        """Raises:
        OwnerError: if another start has taken the folder since.
        """
        try:
            owner = json.loads(read(self._path))
        except FileNotFoundError:
            owner = {}
        if owner.get("token") != self._token:
            raise OwnerError(
                f"Another run has begun in {self._folder}, on {owner.get('host', 'no host')}: this "
                "one ends and has written nothing since. Start it in another --workdir."
            )

    def before_commit(self) -> None:
        self.check()
        self._flush()

    def drop(self, *, forget: bool = False) -> None:
        """Lets commits pass again; with `forget` removes the token, if it is still this one's."""
        Patient.fences.pop(f"{str(self._folder).removeprefix('gs://')}/checkpoints/", None)
        if forget:
            self.check()
            self._path.unlink()


class Watchdog:
    """Ends this process when a save can't come to its end, which others would wait for for ever.

    TensorStore goes on asking for a quarter of an hour, and then the processes wait for each other.
    As long as a save is in progress, this asks the bucket for the token by requests of its own;
    when all have failed for `patience` seconds, the process ends.

    Args:
      folder: the run folder.
      patience: seconds.
      saving: whether a save is in progress.
      kept: says what a run that starts again goes on from.
    """

    every = 10.0

    def __init__(
        self,
        folder: epath.Path,
        patience: float,
        saving: Callable[[], bool],
        kept: Callable[[], str],
    ):
        self._folder, self._patience = folder, patience
        self._saving, self._kept = saving, kept
        self._probe = Patient(skip_instance_cache=True)
        self._probe.patience, self._probe.request_seconds = 0.0, self.every
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="fmjax-watchdog").start()

    def _watch(self) -> None:
        failing = None  # since when
        while not self._ended.wait(self.every):
            if not self._saving():
                failing = None
                continue
            began = time.monotonic()
            try:
                self._probe.cat_file(f"{self._folder}/owner.json")
                failing = None
            except Exception as error:
                failing = began if failing is None else failing
                if time.monotonic() - failing > self._patience:
                    self._end(error)

    def _end(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        say = (
            f"\nerror: {cluster.where()}{self._folder} has not answered for {self._patience:.0f} s "
            f"({type(error).__name__}: {reason}); {self._kept()}. Start again when it does; "
            "--bucket-patience waits longer.\n"
        )
        os.write(2, say.encode())
        os._exit(2)

    def close(self) -> None:
        self._ended.set()
