"""A run folder in a bucket: who may write there, what is sent, and when nobody waits any more.

Two runs in one folder are told apart by a fence. A start writes a token of its own to
`RUN/owner.json`, once its flags and data are found to be the run's; a save begins, a small file is
sent, and the object that makes a checkpoint complete is written only while the token there is still
its own. So a preempted pod's successor begins at once, and a predecessor that lives on ends without
another complete checkpoint. (What it was writing at that moment stays, as any half-written one.) On
one host a second process is refused: the scratch folder has a lock.
"""

import contextlib
import json
import math
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

from etils import epath

from fmjax.harness.places import patient, scratch
from fmjax.harness.places.disk import Disk
from fmjax.harness.pods import cluster, peers


class OwnerError(ValueError):
    """Another run has begun in the folder; this one must not write there any more."""


class Bucket(Disk):
    """A folder in a bucket, and this process's scratch folder for it.

    Args:
      address: `gs://BUCKET/FOLDER`.
      patience: seconds for which the bucket may fail.
    """

    def __init__(self, address: epath.Path, patience: float):
        patient.register(patience)
        self._address, self._patience = address, patience
        self.folder = scratch.folder_of(address)
        self._sender: scratch.Sender | None = None
        self._fence: Fence | None = None
        self._dog: Watchdog | None = None
        self._scratch = contextlib.ExitStack()  # lets go of it

    def reach(self) -> None:
        cluster.main_first(lambda: patient.check(self._address))
        error = None
        try:
            self._scratch.enter_context(scratch.held(self._address, self.folder))
        except ValueError as caught:
            error = caught
        if not cluster.gather(error is None).all():
            self._scratch.close()
            raise error or cluster.PeerError("Another process can't continue; it says why.")

    def open(self, *, alone: bool = True) -> None:
        if alone:
            cluster.main_first(self._own)
        else:
            scratch.lay_out(self._address, self.folder, whole=True)
        self._sender = scratch.Sender(self._address, self.folder)
        if self._fence is not None:
            self._fence.flush, self._sender.before = self._sender.flush, self._fence.check

    def _own(self) -> None:
        self._fence = Fence(self._address)
        self._fence.raise_it()
        scratch.lay_out(self._address, self.folder, whole=False)

    def send(self) -> None:
        if self._sender is not None:
            self._sender.start()

    def check(self) -> None:
        if self._sender is not None and self._sender.error is not None:
            raise self._sender.error
        if self._fence is not None:
            self._fence.check_lately()

    def watch(self, saving: Callable[[], bool], kept: Callable[[], str]) -> None:
        self._dog = Watchdog(self._address, self._patience, saving, kept)

    def hold(self, path: pathlib.Path) -> None:
        if self._sender is not None:
            self._sender.held = path

    def exchange(self) -> None:
        assert self._sender is not None, "open comes first"
        self._sender.flush()
        cluster.wait("files of the bucket")
        if cluster.is_main():
            self._sender.receive()

    def close(self, *, forget: bool = False) -> None:
        with contextlib.ExitStack() as ends:  # the last one first, each its turn
            ends.enter_context(self._scratch)
            if self._dog is not None:
                ends.callback(self._dog.close)
            if self._fence is not None:
                ends.callback(self._fence.drop, forget=forget)
            if self._sender is not None:
                ends.callback(self._sender.close, send=not forget)


class Fence:
    """This start's token in a run folder of a bucket.

    Attributes:
      flush: called before a checkpoint is made complete, to send what belongs to it.

    Args:
      folder: the run folder.
    """

    lately = scratch.EVERY_SECONDS + 5.0  # for what sends is checked by the sending

    def __init__(self, folder: epath.Path):
        self._folder = folder
        self.flush: Callable[[], None] = lambda: None
        self._checked = -math.inf
        self._path, self._token = folder / "owner.json", uuid.uuid4().hex
        self._key = f"{str(folder).removeprefix('gs://')}/checkpoints"
        patient.Patient.before_commit[self._key] = self._before_commit

    def raise_it(self) -> None:
        """Takes the folder; whoever had it finds this token."""
        owner = {"token": self._token, "host": socket.gethostname(), "began": time.time()}
        patient.write(self._path, json.dumps(owner).encode())

    def check(self) -> None:
        """Raises:
        OwnerError: if another start has taken the folder since.
        """
        try:
            owner = json.loads(patient.read(self._path))
        except (FileNotFoundError, json.JSONDecodeError):
            owner = {}
        if owner.get("token") != self._token:
            raise OwnerError(
                f"Another run has begun in {self._folder}, on {owner.get('host', 'no host')}: this "
                "one ends, and has completed no checkpoint since. Start it in another --workdir."
            )
        self._checked = time.time()

    def check_lately(self) -> None:
        """`check`, unless it has passed a moment ago."""
        if not 0 <= time.time() - self._checked < self.lately:
            self.check()

    def _before_commit(self) -> None:
        self.check()
        self.flush()

    def drop(self, *, forget: bool = False) -> None:
        """Lets commits pass again; with `forget` removes the token, if it is still this one's."""
        patient.Patient.before_commit.pop(self._key, None)
        if forget:
            self.check()
            self._path.unlink()


class Watchdog:
    """Ends this process when the bucket has not answered for too long.

    What waits for the bucket would wait on: TensorStore asks for a quarter of an hour, and the
    processes of a pod wait for each other. All requests through `Patient` tell whether there are
    answers; as long as a save is in progress, which is TensorStore's, this makes some of its own.

    Args:
      folder: the run folder.
      patience: seconds.
      saving: whether a save is in progress.
      kept: says what a run that starts again goes on from.
    """

    every = 5.0

    def __init__(
        self,
        folder: epath.Path,
        patience: float,
        saving: Callable[[], bool],
        kept: Callable[[], str],
    ):
        self._folder, self._patience = folder, patience
        self._saving, self._kept = saving, kept
        self._probe = patient.Patient(skip_instance_cache=True)
        self._probe.patience, self._probe.request_seconds = 0.0, 2 * self.every
        self._ended, self._busy = threading.Event(), 0
        threading.Thread(target=self._watch, daemon=True, name="fmjax-watchdog").start()

    def _watch(self) -> None:
        while not self._ended.wait(self.every):
            self._busy = self._busy + 1 if self._saving() else 0
            if self._busy > 3:  # most saves are done by then, and cost no request
                with contextlib.suppress(Exception):
                    self._probe.cat_file(f"{self._folder}/owner.json")
            failing = patient.Patient.failing
            if failing is not None and time.monotonic() - failing[0] > self._patience:
                self._end(failing[1])

    def _end(self, error: Exception) -> None:
        say = (
            f"\n{peers.name()}error: {self._folder} has not answered for {self._patience:.0f} s "
            f"({patient.in_short(error)}); {self._kept()}. Start again when it does; "
            "--bucket-patience waits longer.\n"
        )
        os.write(2, say.encode())
        os._exit(2)

    def close(self) -> None:
        self._ended.set()
