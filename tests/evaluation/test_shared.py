"""Two processes of two devices each evaluate and draw from one run: the numbers of one process."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
from made_runs import untrained

from experiments import digits, two_moons
from fmjax.harness import store
from fmjax.tasks.images import UNetConfig
from fmjax.tasks.points import MLPConfig

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 240  # far more than it takes: a pod that hangs must not hang the tests
IMAGES = "--batch-size 20 --num-samples 100 --eval-examples 60 --num-draws 2 --seeds 0 1 "
IMAGES += "--judge.num-splits 4 --judge.allow-few-samples"
CURVE = "--curve-examples 40 --curve-evaluations 4 --curve-tolerances 0.1"


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
    said = [process.communicate(timeout=SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return said


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


def copied(runs, name, tmp_path):
    """A working folder with one of the runs, and the programs and judges that others have made."""
    shutil.copytree(runs / "runs" / name, tmp_path / "runs" / name)
    return tmp_path


@pytest.mark.slow
def test_two_processes_evaluate_images_as_one(runs, tmp_path):
    command = f"evaluate runs/digits {IMAGES} {CURVE}"
    pod, alone = tmp_path / "pod", tmp_path / "alone"
    copied(runs, "digits", pod), copied(runs, "digits", alone)
    (said, _), other = finish(*start_pod(pod, command))
    assert "Expected time: " in said and "batches in each of 2 processes" in said
    assert said.count("No encoder for digits: training one") == 1 and "bits/dim" in said
    assert other[0] == "" and "batches:" not in other[1]  # process 0 alone speaks
    lines = [
        len((pod / "runs/digits/evaluation" / name).read_text().splitlines())
        for name in ("computed.jsonl", "computed_1.jsonl")
    ]
    finish(start(alone, command, devices=1))
    want, got = (figures(folder / "runs" / "digits") for folder in (alone, pod))
    assert got.keys() == want.keys() and len(want) > 60
    for path, value in want.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-6, atol=1e-6, err_msg=str(path))
    assert sum(lines) == store.num_computed(alone / "runs/digits/evaluation")  # none twice
    assert abs(lines[0] - lines[1]) <= 3
