"""The other processes of a pod: this one's name among them, and what it does when one is gone."""

import os
import re
import socket
import sys

import jax

from fmjax.harness.pods import detect

GONE = 134  # the exit code: JAX's own, which aborts where it is the first to notice
_LOST = re.compile(
    r".*(Gloo .*failed|heartbeat|Socket closed|Connection (closed|reset) by peer|"
    "coordination service|remote process exited).*"
)
_PREFIX = re.compile(r"^[A-Z_]+: |\[external/\S+\] ")  # XLA's kind of error, a line of its code
_NUMBER: list[int] = []  # this process's, as soon as it is known


def note(number: int | None) -> None:
    """Keeps this process's number in its pod, for what it says; None where it is not given."""
    _NUMBER[:] = [] if number is None else [number]


def name() -> str:
    """`process 1 on HOST: ` before what any process but 0 says; "" for it and where it is alone.

    It asks no device, which in a pod would wait for the others.
    """
    number = _NUMBER[0] if _NUMBER else detect.told_number()
    return f"process {number} on {socket.gethostname()}: " if number else ""


def end_if_one_is_gone(error: BaseException | None) -> None:
    """Ends this process, with one line and the code 134, if the error says that another is gone.

    Nothing is waited for: no save in progress can be completed without the other, and JAX would
    abort this process within its heartbeat. What is half-written is no checkpoint.
    """
    reason = lost(error) if jax.distributed.is_initialized() else None
    if reason is None:
        return
    sys.stdout.flush()
    print(
        f"\n{name()}error: A process of the pod is gone or does not answer: {reason} Complete "
        "checkpoints stay. Start the command again on every host, fewer or more: it resumes.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(GONE)


def lost(error: BaseException | None) -> str | None:
    """In what words a device's error, or one that led to this one, says that a process is gone."""
    while error is not None:
        found = _LOST.search(str(error)) if isinstance(error, jax.errors.JaxRuntimeError) else None
        if found:
            return _PREFIX.sub("", found[0]).rstrip(".") + "."
        error = error.__cause__ or error.__context__
    return None
