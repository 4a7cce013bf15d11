"""SIGTERM and Ctrl-C: the step in flight ends and is saved, in a pod the same step everywhere."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from fmjax.harness.pods.cluster import is_main


class Preemption:
    """Notices SIGTERM and SIGINT: the step in flight shall end and its state be kept.

    Attributes:
      signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def watch(self) -> Iterator["Preemption"]:
        """Takes the two signals for as long as the context lasts.

        The first Ctrl-C is answered at once, also while a program compiles; a second one ends a
        command on the spot, whose checkpoints are complete or not there. A notebook's process holds
        more than the run, and goes on.
        """
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def notice(number: int, frame: object) -> None:
            self.signal = signal.Signals(number)
            if jax.process_count() > 1 and number == signal.SIGINT:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX's own notice, which tells the others

        # In a pod JAX has a handler of SIGTERM.
        own = _SIGNALS if jax.process_count() == 1 else _SIGNALS[:1]
        with _answered():
            for number in own:
                signal.signal(number, notice)
            try:
                yield self
            finally:
                for number in own:
                    signal.signal(number, before[number])
                if jax.process_count() > 1:  # all is saved, and nobody asks `reached` any more
                    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def came(self) -> bool:
        """Whether a signal has come, to the only process."""
        return jax.process_count() == 1 and self.signal is not None

    def reached(self, dispatch: int) -> bool:
        """Whether to stop now: in a pod after the same dispatch in every process."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(dispatch):
            self.signal = self.signal or signal.SIGTERM
            return True
        return self.came()

    def exit(self, folder: Any, step: int) -> SystemExit:
        """Says what happened; the exit code is 128 and the signal's number, as a shell's."""
        assert self.signal is not None, "nothing has been reached"
        if is_main():
            print(f"\n{self.signal.name} came: {folder} is saved at step {step}. Start it again "
                  "with the same flags, and it resumes there.", flush=True)  # fmt: skip
        return SystemExit(128 + self.signal)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """A thread that answers Ctrl-C: Python's own handlers wait until XLA comes back."""
    there, here = socket.socketpair()
    here.setblocking(False)
    before = signal.set_wakeup_fd(here.fileno(), warn_on_full_buffer=False)
    ends = not hasattr(sys, "ps1") and "ipykernel" not in sys.modules
    thread = threading.Thread(target=_answer, args=(there, ends), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        here.close()
        thread.join()
        there.close()


def _answer(signals: socket.socket, ends: bool) -> None:
    """Reads the numbers of the signals that come, until nobody writes them any more.

    Args:
      signals: where the numbers come from, a byte each.
      ends: whether a second SIGINT ends the process.
    """
    count = 0
    while number := signals.recv(1):
        if number[0] != signal.SIGINT:
            continue
        count += 1
        said = (_AGAIN if ends else _SAVED) if count == 1 else _ABORTED if ends else b""
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, said)
        if count > 1 and ends:
            os._exit(128 + signal.SIGINT)


_SAVED = b"\nThis step ends and is saved.\n"
_AGAIN = b"\nThis step ends and is saved; Ctrl-C once more stops without saving.\n"
_ABORTED = b"\nStopped. The last complete checkpoint stays: start the command again.\n"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
