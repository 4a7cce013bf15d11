"""Runs in a bucket, which a server on this machine stands for: hosts, commands, what is there."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.parse

import bucket_server
import fsspec
import pytest

from fmjax.harness.places import patient

ROOT = pathlib.Path(__file__).parents[1]
RUN = "gs://bucket/run"
FLAGS = "--batch-size 64 --model.features 64 64 --log-every 1 --num-samples 0 --eval-examples 0 "
FLAGS += "--frames 0 --side 8 --steps-per-dispatch 1"
SECONDS = 240


@pytest.fixture
def server(tmp_path):
    with bucket_server.serve(tmp_path / "contents") as server:
        yield server


class Host:
    """Processes with a working folder, a home and a temporary folder of their own."""

    def __init__(self, server, folder):
        self.folder, self.log = folder, folder / "log"
        (folder / "tmp").mkdir(parents=True)
        (folder / "work").mkdir()
        self.environ = os.environ | server.environ
        self.environ |= {"TMPDIR": str(folder / "tmp"), "HOME": str(folder)}
        self.environ |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        self.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

    def start(self, *words, devices=4):
        environ = self.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, *words]
        with open(self.log, "a") as log:
            return subprocess.Popen(
                command, cwd=self.folder / "work", env=environ, stdout=log, stderr=log
            )

    def finish(self, process, code=0, seconds=SECONDS):
        assert process.wait(seconds) == code, self.log.read_text()


@pytest.fixture
def hosts(server, tmp_path):
    return [Host(server, tmp_path / f"host{k}") for k in range(2)]


def pod_flags():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return ["--cluster.coordinator", address, "--cluster.num-processes", "2"]


def pod(hosts, *flags, workdir=RUN):
    words = ["-m", "experiments.two_moons", "--workdir", workdir, *FLAGS.split(), *flags]
    words += pod_flags()
    return [host.start(*words, "--cluster.process-id", str(k)) for k, host in enumerate(hosts)]


def alone(host, *flags, workdir=RUN, devices=4):
    words = ["-m", "experiments.two_moons", "--workdir", workdir, *FLAGS.split(), *flags]
    return host.start(*words, devices=devices)


def objects(server):
    """The names of all objects in the patient."""
    status, _, body = server.forward("GET", "/storage/v1/b/bucket/o?maxResults=1000", b"", {})
    assert status == 200
    return [item["name"] for item in json.loads(body).get("items", ())]


def quoted(name):
    return urllib.parse.quote(name, safe="")


def content(server, name):
    path = f"/storage/v1/b/bucket/o/{quoted(name)}?alt=media"
    status, _, body = server.forward("GET", path, b"", {})
    assert status == 200, (status, name)
    return body


def rows(server, run="run"):
    found = [json.loads(line) for line in content(server, f"{run}/metrics.jsonl").splitlines()]
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))  # none twice
    return found


def steps(server, run="run"):
    parts = [name.split("/") for name in objects(server) if name.endswith("/commit_success.txt")]
    return sorted(int(p[2]) for p in parts if p[:2] == [run, "checkpoints"] and len(p) == 4)


def wait_for_step(server, step, hosts, processes):
    deadline = time.monotonic() + SECONDS
    while not any(found >= step for found in steps(server)):
        said = "".join(host.log.read_text() for host in hosts)
        assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, said
        time.sleep(0.05)


@pytest.fixture
def store(server, monkeypatch):
    """The bucket in this process."""
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    patient.register(20.0)
    fsspec.filesystem("gs").clear_instance_cache()
    yield server
    patient.Patient.clear_instance_cache()
