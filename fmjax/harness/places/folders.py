"""Where a run folder lies: on a disk, or in a bucket.

Objects of a bucket can't be appended to or renamed, and each request costs a tenth of a second. So
what a run writes beside its checkpoints, it writes to a local scratch folder, laid out from the
bucket at the start, and a thread of its own sends it: a file that is new or was written anew goes
up whole, what grows (metrics.jsonl) every 30 s at most, all of it before a checkpoint is complete
and at the end. TensorBoard's events go up once, when their file is closed. Compiled programs stay
in the scratch. On a disk the run folder is the scratch, and nothing is sent.
"""

import contextlib
import importlib.util
import os
import pathlib
import re
import time
import uuid
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from fmjax.harness.places.disk import Disk
from fmjax.harness.pods import cluster

_SHARED_SECONDS = 30.0
Folder = pathlib.Path | epath.Path
"""A run folder's address: a local path, or one in a bucket."""
_AT_HAND: list[Disk] = []


def in_bucket(folder: Any) -> bool:
    """Whether an address is one in a bucket, `gs://`."""
    return str(folder).startswith("gs://")


def check_name(name: str, folder: Any) -> None:
    """Refuses what is neither a local folder nor a bucket's.

    Raises:
      ValueError: for another scheme, a bucket without a folder, a character that can't be in a URL,
        or where gcsfs is missing.
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
    if odd := re.search(r"[^A-Za-z0-9._/=+-]", str(folder).removeprefix("gs://")):
        raise ValueError(
            f"{name} in a bucket must be of letters, digits and . _ - = + alone, for TensorStore "
            f"reads others as parts of a URL; got {odd[0]!r} in {folder}."
        )
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
    from fmjax.harness.places import patient  # an extra's packages

    patient.register()
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
        deadline = time.monotonic() + _SHARED_SECONDS
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


def place(address: Folder, patience: float = 300.0) -> Disk:
    """Where the small files of a run folder are written.

    Args:
      address: the run folder, on a disk or in a bucket.
      patience: seconds for which a bucket may fail.
    """
    if not in_bucket(address):
        return Disk(address)
    from fmjax.harness.places.bucket import Bucket  # an extra's packages

    return Bucket(epath.Path(address), patience)


@contextlib.contextmanager
def at_hand(address: Folder) -> Iterator[pathlib.Path]:
    """A local folder like this one; what is written there is sent as it comes, and at the end."""
    here = place(address)
    here.reach()
    with contextlib.ExitStack() as ends:
        ends.callback(here.close)
        here.open(alone=False)
        here.send()
        _AT_HAND.append(here)
        ends.callback(_AT_HAND.remove, here)
        yield here.folder


def exchange() -> None:
    """`Disk.exchange` of what is at hand."""
    for here in _AT_HAND:
        here.exchange()
