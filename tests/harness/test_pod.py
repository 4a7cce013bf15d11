"""Two processes of four devices each, on one machine, as a pod: the numbers of one process."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import two_moons
from fmjax import harness
from fmjax.harness.pods import cluster
from fmjax.harness.read import read
from fmjax.tasks.points import MLPConfig

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = "--batch-size 64 --model.features 64 64 --log-every 1 --num-samples 48 --eval-examples 64 "
FLAGS += "--frames 4 --side 24 --preview-every 15 --steps-per-dispatch 1"
SETTINGS = dict(batch_size=64, log_every=1, num_samples=48, eval_examples=64)  # the same
SETTINGS |= {"model": MLPConfig(features=(64, 64)), "frames": 4, "side": 24}
SETTINGS |= {"preview_every": 15, "steps_per_dispatch": 1}
SECONDS = 240  # far more than it takes: a pod that hangs must not hang the tests


def start(folder, num_devices, *flags):
    """One process of an experiment with its own devices."""
    command = [sys.executable, "-m", "experiments.two_moons", "--workdir", str(folder)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            [*command, *FLAGS.split(), *flags], cwd=ROOT, env=environ, stdout=log, stderr=log
        )


def start_pod(folder, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pod = ["--fsdp", "8", "--cluster.coordinator", address, "--cluster.num-processes", "2"]
    return [start(folder, 4, *flags, *pod, "--cluster.process-id", str(i)) for i in range(2)]


def wait_for_step(folder, step, processes):
    """Until a checkpoint of that step or a later one is whole."""
    deadline = time.monotonic() + SECONDS
    while not any(p.name.isdigit() and int(p.name) >= step for p in folder.glob("checkpoints/*")):
        log = pathlib.Path(f"{folder}.log").read_text()
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, log
        time.sleep(0.02)


def finish(process, folder, code=0):
    assert process.wait(SECONDS) == code, pathlib.Path(f"{folder}.log").read_text()


def final_state(folder):
    """The last step, the parameters and their average."""
    last, average = (read(folder, average=flag) for flag in (False, True))
    return last.step, (last.params, average.params)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # none twice
    return np.array([row["loss"] for row in rows])


@pytest.mark.slow
def test_a_pod_is_preempted_killed_and_goes_on_in_one_process(tmp_path):
    folder, endless = tmp_path / "pod", ("--num-steps", "1000000", "--checkpoint-every", "20")
    pod = start_pod(folder, *endless)
    wait_for_step(folder, 20, pod)
    pod[1].send_signal(signal.SIGTERM)  # one process is told, both stop after the same step
    for process in pod:
        finish(process, folder, code=143)
    preempted, _ = final_state(folder)
    assert preempted == len(losses(folder)) and preempted > 20

    pod = start_pod(folder, *endless)
    wait_for_step(folder, preempted + 20, pod)
    for process in pod:
        process.kill()
        process.wait()
    killed, _ = final_state(folder)
    assert killed >= preempted + 20

    # On: with other numbers of devices, the state whole or split otherwise.
    end = ("--num-steps", str(killed + 10), "--checkpoint-every", "100000")
    for name in ("one", "both"):
        shutil.copytree(folder, tmp_path / name)
    for process in start_pod(tmp_path / "both", *end):
        finish(process, tmp_path / "both")
    finish(start(tmp_path / "one", 1, *end), tmp_path / "one")  # where there is but one device
    for name, way in {"pod": {"fsdp": 2}, "untouched": {"num_devices": 1}}.items():
        steps = dict(num_steps=killed + 10, checkpoint_every=100_000)
        config = two_moons.Config(workdir=tmp_path / name, **SETTINGS, **steps, **way)
        harness.train(config, two_moons.make_task)
    _, state = final_state(tmp_path / "untouched")
    for name in ("pod", "one", "both"):
        step, other = final_state(tmp_path / name)
        assert step == killed + 10
        # Sums over devices are taken in another order.
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "untouched"), 1e-4)
        np.testing.assert_allclose(
            losses(tmp_path / name)[:20], losses(tmp_path / "untouched")[:20], 1e-6
        )
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    for name, count in (("pod", 1), ("both", 2)):
        record = json.loads((tmp_path / name / "config.json").read_text())
        assert record["process_count"] == count and record["device_count"] == 8
        assert (tmp_path / name / "summary.json").exists()


def test_half_an_address_is_refused():
    config = cluster.ClusterConfig(coordinator="127.0.0.1:1")
    with pytest.raises(ValueError, match="go together.*Give all three"):
        cluster.join(config)


def test_what_process_0_raises_reaches_the_caller():
    assert cluster.main_first(lambda: 3) == 3
    with pytest.raises(KeyError):
        cluster.main_first(lambda: {}["nothing"])


def test_who_waits_for_a_process_that_has_ended_is_told(monkeypatch):
    def barrier(key, timeout_ms):
        raise jax.errors.JaxRuntimeError("INTERNAL: Barrier failed: task is set to ERROR")

    monkeypatch.setattr(cluster.multihost, "get_barrier_sync_fn", lambda: barrier)
    with pytest.raises(ConnectionError, match="another one has ended.*start all of them again"):
        cluster.wait("batches")
