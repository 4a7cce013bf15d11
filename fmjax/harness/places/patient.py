"""`gs://` with patience: what reads or writes it through fsspec, Orbax's small files among it.

A request that is answered with 408, 429 or 5xx, that is cut off or that is not answered at all is
tried again for `patience` seconds, where gcsfs gives up after half a minute. 403 and 404 are
answers.
"""

import asyncio
import inspect
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import aiohttp
import fsspec
import gcsfs.core
from etils import epath
from gcsfs.retry import HttpError, is_retriable

from fmjax.harness.pods import peers

SILENT_SECONDS = 5.0  # an outage as short as this is not spoken of
_COMMIT = "commit_success.txt"  # Orbax's last object of a checkpoint


class Patient(gcsfs.core.GCSFileSystem):
    """gcsfs with patience, and without caches of what others may have changed.

    Attributes:
      patience: seconds for which a request is tried again.
      request_seconds: for one to be answered; it may carry many megabytes.
      failing: since when every request has failed, and the last one's error; None after an answer.
      before_commit: by folder, called before a checkpoint in it is made complete.
    """

    patience = 300.0
    request_seconds = 60.0
    failing: tuple[float, Exception] | None = None
    before_commit: dict[str, Callable[[], None]] = {}
    _told = False  # whether an outage has been spoken of

    def __init__(self, *args: Any, **kwargs: Any):
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            kwargs.setdefault("token", "anon")
        super().__init__(*args, **kwargs | {"use_listings_cache": False})

    async def _request(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        attempt: Any = inspect.unwrap(gcsfs.core.GCSFileSystem._request)  # without its six tries
        deadline, wait = time.monotonic() + self.patience, 0.5
        while True:
            began = time.monotonic()
            try:
                call = attempt(self, method, path, *args, **kwargs)
                answer = await asyncio.wait_for(call, self.request_seconds)
                self._answered()
                return answer
            except Exception as error:
                if not passing(error):
                    self._answered()
                    raise
                self._failed(began, error)
                if time.monotonic() + wait > deadline:
                    raise
            await asyncio.sleep(wait)
            wait = min(2 * wait, 15.0)

    def _failed(self, began: float, error: Exception) -> None:
        since = (Patient.failing or (began,))[0]
        Patient.failing = since, error
        if not Patient._told and time.monotonic() - since > SILENT_SECONDS:
            Patient._told = True
            _say(f"The bucket does not answer ({in_short(error)}); it is asked again, for "
                 f"{self.patience:.0f} s at most.")  # fmt: skip

    def _answered(self) -> None:
        failing, Patient.failing = Patient.failing, None
        if Patient._told and failing is not None:
            Patient._told = False
            _say(f"The bucket answers again, after {time.monotonic() - failing[0]:.0f} s.")

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        if mode != "rb" and path.endswith(_COMMIT):
            folder = path.removeprefix("gs://").rsplit("/", 2)[0]  # without the step's
            self.before_commit.get(folder, lambda: None)()
        return super()._open(path, mode, *args, **kwargs)


def in_short(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")


def _say(line: str) -> None:
    if not peers.name():  # else process 0 says it
        print(f"\n{line}", file=sys.stderr, flush=True)


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


def names(root: str, *, below: bool) -> list[str]:
    """The objects in a bucket's folder, and in those below it, as `BUCKET/NAME`."""
    files = fsspec.filesystem("gs")
    try:
        if below:
            return list(files.find(root))
        return [one["name"] for one in files.ls(root, detail=True) if one["type"] == "file"]
    except FileNotFoundError:
        return []


def read_all(names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of objects, `BUCKET/NAME`, many at a time."""
    names = list(names)
    return fsspec.filesystem("gs").cat(names, recursive=False) if names else {}


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
        if _anonymous():
            raise ValueError("no credentials")
        write(probe, b"")
        probe.unlink()
    except Exception as error:
        raise ValueError(
            f"A run folder in a bucket must be one that can be written; got {folder}: "
            f"{_why(error, name)}."
        ) from None


def _anonymous() -> bool:
    """Whether nobody's credentials were found, which takes gcsfs twenty seconds."""
    found = fsspec.filesystem("gs").credentials.method
    return found == "anon" and not os.environ.get("STORAGE_EMULATOR_HOST")


def _why(error: Exception, name: str) -> str:
    code, text = getattr(error, "code", None), str(error).strip()
    if code == 404 or isinstance(error, FileNotFoundError):
        return f"there is no bucket {name}. `gcloud storage buckets create gs://{name}` makes one"
    if code in (401, 403) or "Forbidden" in text:
        who = text.splitlines()[-1] if text else "403"
        return f"access is denied ({who}). Give the account that runs here objectAdmin on {name}"
    if "credentials" in text.lower():
        return "there are no credentials. `gcloud auth application-default login` makes some"
    return in_short(error)
