"""Two processes of two devices each evaluate and draw from one run: the numbers of one process.

That process has two devices too: another number of them rounds otherwise, which changes the
adaptive steps and with them figures by some 1e-6.
"""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from made_runs import untrained

from experiments import digits, two_moons
from fmjax.harness import store
from fmjax.tasks.images import UNetConfig
from fmjax.tasks.points import MLPConfig

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600  # far more than it takes: a pod that hangs must not hang the tests
IMAGES = "--batch-size 20 --num-samples 100 --eval-examples 60 --num-draws 2 --seeds 0 1 "
IMAGES += "--judge.num-splits 4 --judge.allow-few-samples"
CURVE = "--curve-examples 40 --curve-evaluations 4 --curve-tolerances 0.1 --batch-size 20"


def start(folder, command, *flags, devices):
    """One process of a command, in the folder where runs/ is."""
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environ |= {"PYTHONPATH": f"{ROOT}", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "fmjax.cli", *command.split(), *flags],
        cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_pod(folder, command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--cluster.coordinator", address, "--cluster.num-processes", "2"]
    return [
        start(folder, command, *flags, "--cluster.process-id", str(i), devices=2) for i in range(2)
    ]


def finish(*processes):
    """What each has printed on stdout and stderr."""
    try:
        said = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), said
    # Gloo's threads speak too, at times into each other's lines.
    return [(re.sub(r".*(\[Gloo\]|peer ranks).*\n", "", out), err) for out, err in said]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs/digits and runs/moons, untrained, in a working folder."""
    folder = tmp_path_factory.mktemp("pod")
    unet = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)
    untrained(digits.Config(workdir=folder / "runs" / "digits", model=unet), digits.make_task)
    mlp = MLPConfig(features=(16,))
    untrained(two_moons.Config(workdir=folder / "runs" / "moons", model=mlp), two_moons.make_task)
    return folder


def figures(folder):
    """The numbers in evaluation.json, by their path, but for times and devices."""
    record = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    found = {}

    def walk(path, value):
        if isinstance(value, dict | list):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, part in pairs:
                walk((*path, key), part)
        elif isinstance(value, int | float):
            found[path] = value

    for name in ("likelihood", "quality", "curve"):
        walk((name,), record[name])
    return {p: x for p, x in found.items() if not {"seconds", "begun_on"} & {*p}}


def compare(pod, alone):
    want, got = figures(alone), figures(pod)
    assert got.keys() == want.keys() and len(want) > 30
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-6, atol=1e-6, err_msg=str(path))


def computed(folder):
    """Batches that each process has computed."""
    paths = [folder / name for name in ("computed.jsonl", "computed_1.jsonl")]
    return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]


@pytest.mark.slow
def test_two_processes_evaluate_images_as_one(runs):
    shutil.copytree(runs / "runs" / "digits", runs / "runs" / "alone")
    (said, _), other = finish(*start_pod(runs, f"evaluate runs/digits {IMAGES}"))
    assert re.search("Expected time: .* more batches in each of 2 processes", said)
    assert said.count("No encoder for digits: training one") == 1 and "bits/dim" in said
    assert other[0] == "" and "batches:" not in other[1]  # process 0 alone speaks
    finish(start(runs, f"evaluate runs/alone {IMAGES}", devices=2))
    compare(runs / "runs" / "digits", runs / "runs" / "alone")
    one, two = computed(runs / "runs/digits/evaluation")
    assert one + two == store.num_computed(runs / "runs/alone/evaluation")  # none twice
    assert one - two in (0, 1, 2, 3)  # in each of three stores the first is process 0's


@pytest.mark.long
def test_two_processes_evaluate_points_and_their_curve_as_one(runs):
    shutil.copytree(runs / "runs" / "moons", runs / "runs" / "one")
    finish(*start_pod(runs, f"evaluate runs/moons {CURVE}"))
    finish(start(runs, f"evaluate runs/one {CURVE}", devices=2))
    compare(runs / "runs" / "moons", runs / "runs" / "one")
    assert sum(computed(runs / "runs/moons/evaluation")) == store.num_computed(
        runs / "runs/one/evaluation"
    )


@pytest.mark.slow
def test_a_killed_pod_computes_what_is_missing(runs):
    """A kill costs each process the batch in flight, whatever the number of processes after it."""
    drawn, num = runs / "runs" / "moons" / "drawn", 400
    command = f"sample runs/moons --num {4 * num} --batch-size 4 --format npz --out"

    def stored():
        return {path.name: path.stat().st_mtime_ns for path in drawn.glob("batches-*/batch_*.npz")}

    pod, deadline = start_pod(runs, f"{command} pod.npz"), time.monotonic() + SECONDS
    while min(computed(drawn)) < 10 and time.monotonic() < deadline:
        time.sleep(0.001)
    for process in pod:  # the second one's end is what JAX's heartbeat does to the others
        process.kill()
        process.communicate()
    before = stored()
    assert 20 <= len(before) < num
    done = sum(computed(drawn))
    assert len(before) - 2 <= done <= len(before)
    finish(*start_pod(runs, f"{command} pod.npz"))
    assert sum(computed(drawn)) - done == num - len(before)
    assert before.items() <= stored().items()
    shutil.rmtree(drawn)
    finish(start(runs, f"{command} alone.npz", devices=2))
    with np.load(runs / "pod.npz") as got, np.load(runs / "alone.npz") as want:
        np.testing.assert_allclose(got["x"], want["x"], rtol=1e-6, atol=1e-6)
