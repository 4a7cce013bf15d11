"""Processes of a pod that vanish: the others end, and the run goes on with fewer or more."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from made_runs import rows

from fmjax import harness

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT = 10
SECONDS = 240  # far more than it takes: a pod that hangs must not hang the tests
STEPS = dict(num_steps=20, checkpoint_every=5, log_every=1, dim=8)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in STEPS.items()]
FLAGS += [f"--cluster.heartbeat-seconds={HEARTBEAT}"]
TRAIN = """
import os, pathlib, signal, sys, time
import tiny
from fmjax import harness
from fmjax.training import stored

folder, number, act = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def saved(step):
    while not (folder / "checkpoints" / str(step)).exists():
        time.sleep(0.01)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

{act}
harness.main(tiny.Config, tiny.make_task, "A pod.", args=["--workdir", str(folder), *sys.argv[4:]])
"""
DIE = "tiny.BEFORE.append(lambda batch: batch == 7 and (saved({step}), kill()))"
STOP = "tiny.BEFORE.append(lambda batch: batch == 7 and os.kill(os.getpid(), signal.SIGSTOP))"
RENAME = """
rename = os.rename
os.rename = lambda old, new: kill() if os.path.basename(new) == "10" else rename(old, new)
"""
WRITE = """
write = stored.write
stored.write = lambda manager, step, *args: (write(manager, step, *args), step == 10 and kill())
"""


def start(folder, number, act, *flags):
    """One process with four devices, its output in a file of its own beside the folder."""
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    code = TRAIN.replace("{act}", act)
    words = [sys.executable, "-c", code, str(folder), str(number), "", *FLAGS, "--fsdp", "4"]
    with open(f"{folder}.{number}.log", "a") as log:
        return subprocess.Popen([*words, *flags], cwd=ROOT, env=environ, stdout=log, stderr=log)


def start_pod(folder, acts):
    """Two processes, each with what happens in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--cluster.coordinator", address, "--cluster.num-processes", "2"]
    return [start(folder, k, acts[k], *flags, "--cluster.process-id", str(k)) for k in range(2)]


def said(folder, number):
    return pathlib.Path(f"{folder}.{number}.log").read_text()


def survivor(folder, pod, victim):
    """How a pod ends whose `victim` is killed: seconds after it, exit code and words."""
    assert pod[victim].wait(SECONDS) == -signal.SIGKILL, said(folder, victim)
    began = time.monotonic()
    code = pod[1 - victim].wait(SECONDS)
    seconds = time.monotonic() - began
    print(f"process {victim} was killed: the other ended after {seconds:.1f} s with {code}")
    return seconds, code, said(folder, 1 - victim)


def saved(folder):
    return sorted(int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit())


def assert_gone_on_as_untouched(folder, tmp_path):
    """Every step logged once, the losses those of a run of one process on eight devices."""
    config = tiny.Config(workdir=tmp_path / "untouched", **STEPS)
    harness.train(config, tiny.make_task)
    wanted, found = rows(tmp_path / "untouched"), rows(folder)
    assert [row["step"] for row in found] == list(range(1, 21))
    for name in ("loss", "gradient_norm"):
        a, b = ([row[name] for row in lines] for lines in (found, wanted))
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert len({row["loss"] for row in wanted}) == 20


def assert_ended_by_the_other(seconds, code, words):
    """Within the heartbeat and what a busy machine adds, by JAX's own abort or our one line."""
    assert seconds < HEARTBEAT + 10 and code in (134, -signal.SIGABRT), words
    known = ("A process of the pod is gone", "another task died", "gloo::EnforceNotMet")
    assert any(part in words for part in known), words


@pytest.mark.slow
def test_a_run_goes_on_from_two_processes_in_one_and_then_in_two(tmp_path):
    folder = tmp_path / "run"
    pod = start_pod(folder, ["", DIE.format(step=5)])  # at step 8
    assert_ended_by_the_other(*survivor(folder, pod, 1))
    assert saved(folder) == [5]
    alone = start(folder, 0, DIE.format(step=10))  # on four devices, at step 13
    assert alone.wait(SECONDS) == -signal.SIGKILL, said(folder, 0)
    assert saved(folder) == [5, 10]
    for number, process in enumerate(start_pod(folder, ["", ""])):
        assert process.wait(SECONDS) == 0, said(folder, number)
    assert_gone_on_as_untouched(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "act"), [(0, RENAME), (1, WRITE)])
def test_what_a_kill_leaves_half_written_is_no_checkpoint(tmp_path, victim, act):
    """Process 0 before it completes the save of step 10, process 1 while it writes its part."""
    folder, acts = tmp_path / "run", ["", ""]
    acts[victim] = act
    assert_ended_by_the_other(*survivor(folder, start_pod(folder, acts), victim))
    assert saved(folder) == [5]
    assert [p for p in folder.glob("checkpoints/10*") if "tmp" in p.name]  # it had begun
    harness.train(tiny.Config(workdir=folder, **STEPS), tiny.make_task)
    assert_gone_on_as_untouched(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_host_that_no_longer_answers_ends_the_others_within_the_heartbeat(tmp_path, victim):
    """Its connections stay open, as when a machine is cut off."""
    folder, acts = tmp_path / "run", ["", ""]
    acts[victim] = STOP
    pod = start_pod(folder, acts)
    try:
        deadline = time.monotonic() + SECONDS
        while pathlib.Path(f"/proc/{pod[victim].pid}/stat").read_text().split()[2] != "T":
            assert pod[victim].poll() is None and time.monotonic() < deadline, said(folder, victim)
            time.sleep(0.05)
        began = time.monotonic()
        code, words = pod[1 - victim].wait(SECONDS), said(folder, 1 - victim)
        seconds = time.monotonic() - began
    finally:
        pod[victim].kill()
        pod[victim].wait()
    print(f"process {victim} stopped answering: the other ended after {seconds:.1f} s with {code}")
    assert_ended_by_the_other(seconds, code, words)
    assert seconds > HEARTBEAT / 3  # not for another reason
