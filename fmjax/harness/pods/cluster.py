"""The processes of a pod: who joins, who speaks, and what they do together.

One process runs per host (or per GPU under Slurm); together they see all devices. Everything that
JAX computes is done by all; printing, drawing and the files beside the checkpoints are process 0's.
"""

import contextlib
import dataclasses
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from fmjax.harness.pods import detect, peers

T = TypeVar("T")
_JOIN_SECONDS = 300  # JAX's own patience
_SILENT_SECONDS = 10
_FOREVER = 10**9  # milliseconds, eleven days; a process that dies ends it


class PeerError(RuntimeError):
    """Another process of a pod has stopped, and so do the others."""


class ProcessZeroError(PeerError):
    """Process 0 of a pod has stopped, and so do the others."""


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """The processes of a pod."""

    join: Literal["auto", "yes", "no"] = "auto"
    """Whether to call jax.distributed.initialize: where JAX detects several processes (a TPU slice,
    Slurm, Open MPI, a job of Kubernetes), always, or never: each process trains a run of its own.
    """
    coordinator: str | None = None
    """HOST:PORT of process 0, where JAX can't detect it; with the two below."""
    num_processes: int | None = None
    """Processes in all."""
    process_id: int | None = None
    """Number of this process."""
    heartbeat_seconds: int = 100
    """Seconds without a sign of life after which a process counts as gone, and the others end."""


def join(config: ClusterConfig) -> None:
    """Joins the pod, before anything asks for a device; a second call does nothing.

    Without flags a pod is joined where JAX detects one. With `join="no"` nothing is joined, and
    nothing refused: several runs may be meant, by a sweep's array of jobs say. The hosts of a TPU
    slice can't mean it, and are warned.

    Raises:
      ValueError: if only some of coordinator, num_processes and process_id are given, any of them
        with `join="no"`, or one of them can't be; if JAX detects no pod, and the environment is
        that of one process of several or `join="yes"`; if process 0 is not reached.
    """
    given = (config.coordinator, config.num_processes, config.process_id)
    named = sum(value is not None for value in given)
    if named and config.join == "no":
        raise ValueError("--cluster.join no joins no pod, which the three flags describe. Leave "
                         "it out, or them.")  # fmt: skip
    if named not in (0, 3):
        raise ValueError(f"{detect.THREE} go together; got {given}. Give all three, or none where "
                         "JAX detects a pod.")  # fmt: skip
    if jax.distributed.is_initialized():
        return
    peers.note(config.process_id)
    if not _wanted(config, given):
        return
    if named == 3:
        _reach(config)
    try:
        with _said_if_long(config):
            # One that fails alone takes the others with it within a minute.
            jax.distributed.initialize(
                *given,
                heartbeat_timeout_seconds=config.heartbeat_seconds,
                shutdown_timeout_seconds=60,
            )
    except Exception as error:  # of JAX's, the metadata server's or Kubernetes's client
        says = (str(error) or repr(error)).splitlines()[0]
        if named == 3:
            raise ValueError(
                f"The pod at {config.coordinator} can't be joined: {says.rstrip('.')}. Is the port "
                "free on the host of process 0, and each number given once?"
            ) from error
        raise ValueError(
            "To join a pod, JAX must detect Slurm, Open MPI, a TPU slice or a job of Kubernetes, "
            f"or be told; it says: {says} Give {detect.THREE}, or --cluster.join no for a run of "
            "one process."
        ) from error


@contextlib.contextmanager
def _said_if_long(config: ClusterConfig) -> Iterator[None]:
    """Process 0 says after a while that it waits for the others, which JAX does in silence."""
    if config.process_id != 0:
        yield
        return
    others = (config.num_processes or 1) - 1
    line = f"Waiting for {others} other process(es) to join at {config.coordinator}."
    timer = threading.Timer(_SILENT_SECONDS, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _wanted(config: ClusterConfig, given: tuple[object, ...]) -> bool:
    """Whether there is a pod to join."""
    if config.join == "no":
        if told := detect.in_slice():
            print(
                f"--cluster.join no: {told} names several hosts of a TPU slice, and its runtime "
                "waits for all of them. Leave the flag out.",
                file=sys.stderr,
            )
        return False
    if config.join == "yes" or None not in given:
        return True
    pod = detect.find()
    if pod is not None:
        peers.note(pod.process_id)
    return pod is not None


def _reach(config: ClusterConfig) -> None:
    """Refuses what can't be the three flags of a pod, and waits for its process 0."""
    host, _, port = (config.coordinator or "").rpartition(":")
    num, number = config.num_processes or 0, config.process_id or 0
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--cluster.coordinator must be HOST:PORT; got {config.coordinator!r}.")
    if not 0 <= number < num:
        raise ValueError(
            f"--cluster.process-id must be in 0..{num - 1}, below --cluster.num-processes; got "
            f"{number}."
        )
    if number > 0:
        _wait_for(host.strip("[]"), int(port))


def _wait_for(host: str, port: int) -> None:
    """Waits until process 0 listens: JAX would abort a process that does not reach it."""
    deadline = None
    while True:
        try:
            with socket.create_connection((host, port), timeout=10):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        if deadline is None:
            print(
                f"{peers.name()}waiting for process 0 at {host}:{port}: {reason}.", file=sys.stderr
            )
            deadline = time.monotonic() + _JOIN_SECONDS
        if time.monotonic() > deadline:
            raise ValueError(
                f"--cluster.coordinator must name process 0, which listens there; got "
                f"{host}:{port}: {reason}. Start process 0, or name its host and port."
            )
        time.sleep(0.5)


def is_main() -> bool:
    """Whether this is the process that prints, draws and writes the small files."""
    return jax.process_index() == 0


def main_first(act: Callable[[], T]) -> T | None:
    """Process 0 acts, the others wait; what it raises stops all of them.

    Returns:
      What `act` returned in process 0, None in the others.

    Raises:
      Exception: in process 0 what `act` raised.
      ProcessZeroError: in the others, if it raised there.
    """
    result, error = None, None
    if is_main():
        try:
            result = act()
        except Exception as caught:
            error = caught
    if jax.process_count() > 1:
        wait("process 0")  # which may have worked for longer than a collective waits
        failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
        if failed and error is None:
            raise ProcessZeroError("Process 0 can't continue; its message says why.")
    if error is not None:
        raise error
    return result


def gather(value: bool) -> np.ndarray:
    """What each process says, `[process]`, to all of them."""
    one = np.asarray([value])
    return one if jax.process_count() == 1 else multihost_utils.process_allgather(one).ravel()


def wait(name: str) -> None:
    """Blocks until all processes of the pod have come here, however long that takes.

    Args:
      name: what is waited for.

    Raises:
      ConnectionError: if one of them has ended, as JAX's heartbeat finds.
    """
    try:
        multihost.get_barrier_sync_fn()(key=f"fmjax {name}", timeout_ms=_FOREVER)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(
            "All processes of a pod must come to the end; another one has ended before. What is "
            "stored stays: start all of them again."
        ) from error
