"""Ctrl-C once is answered at once, whatever XLA does; twice it ends the process on the spot."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from made_runs import final_state, rows

from fmjax.harness.pods import preemption

pytestmark = pytest.mark.slow  # each starts processes
TESTS = pathlib.Path(__file__).parents[1]
ANSWER, ABORTED = "Ctrl-C once more stops without saving", "The last complete checkpoint stays"
SECONDS = 240  # far more than it takes


class Tiny:
    """`python -m tiny` in a process of its own, and when it said what."""

    def __init__(self, folder, *flags):
        environ = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
        environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "nothing compiled yet")}
        # A process that is started in the background ignores SIGINT, and so would this one.
        code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "runpy.run_module('tiny', run_name='__main__', alter_sys=True)"
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code, "--workdir", str(folder), *flags],
            cwd=TESTS, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said, self.times = "", []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        while text := os.read(self.process.stdout.fileno(), 4096):
            self.said += text.decode()
            self.times.append((time.monotonic(), len(self.said)))

    def wait_for(self, condition, seconds=SECONDS):
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)
        return time.monotonic()

    def end(self):
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.process.kill()
        self.reader.join()
        return code

    def heard(self, text):
        """When a text had been said."""
        place = self.said.index(text) + len(text)
        return next(when for when, length in self.times if length >= place)


def saved(folder):
    return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()), default=0)


@pytest.mark.parametrize(
    "busy", [("--rounds", str(2**31 - 1)), ("--unrolled", "4000")], ids=["computing", "compiling"]
)
def test_ctrl_c_is_answered_while_xla_is_busy_and_the_second_ends_the_process(tmp_path, busy):
    """A loop of minutes, or a compilation of a minute: Python's own handlers would wait for it."""
    run = Tiny(tmp_path / "run", *busy)
    run.wait_for(lambda: " 0/25 " in run.said)
    time.sleep(3)  # tracing, which Python does, is over
    first = run.interrupt()
    run.wait_for(lambda: ANSWER in run.said, 60)
    assert run.heard(ANSWER) - first < 2
    time.sleep(0.5)
    assert run.process.poll() is None and not rows(tmp_path / "run")  # XLA has not come back
    second = run.interrupt()
    assert run.end() == 130 and time.monotonic() - second < 5
    assert ABORTED in run.said and "Traceback" not in run.said


def test_two_in_a_row_leave_the_last_complete_checkpoint(tmp_path):
    """The second comes while the first one's step ends or is saved; the run goes on from there."""
    folder, flags = tmp_path / "run", ("--num-steps", "1000000", "--checkpoint-every", "3")
    run = Tiny(folder, *flags)
    run.wait_for(lambda: saved(folder) >= 6)
    run.interrupt()
    second = run.interrupt()
    code = run.end()
    assert code == 130 and time.monotonic() - second < 10
    step, state = final_state(folder)
    assert step >= 6 and int(state["step"]) == step
    again = Tiny(folder, *flags)
    again.wait_for(lambda: saved(folder) >= step + 6)
    assert "going on from step" in again.said and "damaged" not in again.said
    again.interrupt()  # one alone ends the step and saves it
    assert again.end() == 130 and ABORTED not in again.said
    assert "SIGINT came" in again.said and f"saved at step {saved(folder)}" in again.said


@pytest.mark.parametrize(("ends", "said"), [(True, b"Ctrl-C once more"), (False, b"is saved.")])
def test_a_notebooks_process_is_not_ended(monkeypatch, ends, said):
    """Two interrupts of a cell: its other variables stay."""
    here, there = socket.socketpair()
    written, ended = [], []
    monkeypatch.setattr(os, "write", lambda file, text: written.append((file, text)))
    monkeypatch.setattr(os, "_exit", ended.append)
    here.sendall(bytes([signal.SIGTERM, signal.SIGINT, signal.SIGINT]))
    here.close()
    preemption._answer(there, ends)
    there.close()
    assert written[0][0] == 2 and said in written[0][1]
    assert ended == ([130] if ends else [])
