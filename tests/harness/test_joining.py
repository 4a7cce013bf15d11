"""Who joins a pod: what JAX detects, what the environment says, what is refused."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from fmjax.harness.pods import cluster, detect, peers
from fmjax.harness.pods.cluster import ClusterConfig

ROOT = pathlib.Path(__file__).parents[2]
OURS = re.compile("SLURM|OMPI|TPU|MEGASCALE|JOB_COMPLETION|KUBERNETES|JAX_COORD")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "8"}
SLURM |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}  # of Open MPI 4
GKE = {"TPU_WORKER_HOSTNAMES": "h0,h1,h2", "TPU_WORKER_ID": "2"}
ENDPOINTS = {"agent-worker-number": "1", "worker-network-endpoints": "a:b:10.0.0.1,a:b:10.0.0.2"}
WARNED = r"TPU_WORKER_HOSTNAMES=h0,h1,h2 names several hosts.*waits for all"


@pytest.fixture
def environ(monkeypatch):
    """Sets an environment in which nothing else speaks of a pod, and keeps what is joined."""
    calls = []

    def among(variables):
        for name in [name for name in os.environ if OURS.search(name)]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return calls

    monkeypatch.setattr(peers, "_NUMBER", [])
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **options: calls.append((args, options))
    )
    return among


def on_tpus(monkeypatch, metadata=None):
    """As on a Cloud TPU host, whose metadata server answers or, without metadata, does not."""

    def get(key):
        if metadata is None:
            raise OSError("no metadata server\nat all")
        return metadata.get(key, ""), 200 if key in metadata else 404

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get)


def in_kubernetes(monkeypatch, parallelism):
    """As with jax[k8s] in a pod of an indexed job, or in none where that is an error."""

    def count():
        if isinstance(parallelism, Exception):
            raise parallelism
        return parallelism

    monkeypatch.setattr(clusters.K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(clusters.K8sCluster, "get_process_count", count)


def test_nothing_is_joined_by_a_process_that_is_alone(environ):
    for variables in (
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in sbatch, without srun
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # in the shell that salloc gives
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        OMPI | URI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a notebook's container
    ):
        calls = environ(variables)
        cluster.join(ClusterConfig())
        assert calls == [] and peers.name() == "", variables


def test_what_jax_detects_is_joined_without_a_flag(environ, monkeypatch):
    for variables, pod in ((SLURM, (8, 3)), (OMPI | URI, (4, 2))):
        calls = environ(variables)
        assert detect.find() == pod
        cluster.join(ClusterConfig(heartbeat_seconds=17))
        options = {"heartbeat_timeout_seconds": 17, "shutdown_timeout_seconds": 60}
        assert calls.pop() == ((None, None, None), options)
        assert peers.name() == f"process {pod[1]} on {socket.gethostname()}: "
    in_kubernetes(monkeypatch, 5)
    calls = environ({"JOB_COMPLETION_INDEX": "0"})
    assert detect.find() == (5, 0)
    cluster.join(ClusterConfig())
    assert len(calls) == 1 and peers.name() == ""
    in_kubernetes(monkeypatch, 1)  # the job says that there is no other
    assert detect.find() is None


def test_a_tpu_slice_is_joined_without_a_flag(environ, monkeypatch):
    environ(GKE)
    on_tpus(monkeypatch, {"tpu-env": ""})  # GKE's hosts are told by the environment
    assert detect.find() == (3, 2)
    environ(GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"})
    assert detect.find() == (6, 5)
    environ({})
    on_tpus(monkeypatch, ENDPOINTS | {"tpu-env": ""})
    assert detect.find() == (2, 1)
    on_tpus(monkeypatch, ENDPOINTS | {"tpu-env": "", "worker-network-endpoints": "h"})
    assert detect.find() is None  # one host


@pytest.mark.parametrize(
    ("variables", "named", "hint"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX=0", r"pip install 'jax\[k8s\]'"),
        (OMPI, "OMPI_COMM_WORLD_SIZE=4", r"\$OMPI_COMM_WORLD_RANK"),  # Open MPI 5
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"},
            "SLURM_STEP_NUM_TASKS=8",
            "srun's own variables",
        ),
        (GKE, "TPU_WORKER_HOSTNAMES=h0,h1,h2", r"pip install 'jax\[tpu\]'"),
        ({"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2", "Give --cluster.coordinator"),
    ],
)
def test_processes_that_jax_does_not_detect_are_named_and_refused(environ, variables, named, hint):
    calls = environ(variables)
    with pytest.raises(ValueError, match=f"must join it.* got {re.escape(named)} on .*{hint}") as e:
        cluster.join(ClusterConfig())
    assert socket.gethostname() in str(e.value) and "\n" not in str(e.value) and calls == []
    cluster.join(ClusterConfig(join="no"))  # a sweep's processes, says the user
    assert calls == []
    cluster.join(ClusterConfig(join="yes"))
    assert len(calls) == 1


def test_a_detection_that_fails_refuses_only_what_is_several(environ, monkeypatch, capsys):
    calls = environ({"JOB_COMPLETION_INDEX": "1"})
    in_kubernetes(monkeypatch, RuntimeError("Kubernetes API Error: 403 - Forbidden\nand more"))
    with pytest.raises(ValueError, match="can't ask what pod it is: .* 403 - Forbidden. In Kub"):
        cluster.join(ClusterConfig())
    environ({})
    on_tpus(monkeypatch)
    capsys.readouterr()
    cluster.join(ClusterConfig())
    assert (
        calls == [] and "no metadata server. This process trains alone." in capsys.readouterr()[1]
    )


def test_no_is_no_but_the_hosts_of_a_slice_are_warned(environ, capsys):
    calls = environ(SLURM)
    cluster.join(ClusterConfig(join="no"))
    assert capsys.readouterr().err == ""
    environ(GKE)
    cluster.join(ClusterConfig(join="no"))
    assert re.search(WARNED, capsys.readouterr().err) and calls == []


def start(environ, *flags):
    """One process of a pod; it ends before it trains, since its batch does not fit its devices."""
    kept = {name: value for name, value in os.environ.items() if not OURS.search(name)}
    kept |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | environ
    command = [sys.executable, "-m", "experiments.two_moons", "--batch-size", "3", *flags]
    return subprocess.Popen(command, cwd=ROOT, env=kept, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "ompi"])
def test_real_processes_join_by_what_jax_detects(kind):
    """Two of one device each: their batch of 3 does not divide by 2, as one process's would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"JAX_COORDINATOR_PORT": str(free.getsockname()[1])}
    pod = []
    for number in "01":
        slurm = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": number}
        slurm |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": number, "SLURM_JOB_ID": "7"}
        ompi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": number}
        ompi |= {"OMPI_COMM_WORLD_LOCAL_RANK": number}
        ompi |= {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
        pod.append(start(port | {"slurm": slurm, "ompi": ompi}[kind]))
    said = [process.communicate(timeout=120)[1] for process in pod]
    assert [process.returncode for process in pod] == [2, 2], said
    errors = [line for text in said for line in text.splitlines() if "error: " in line]
    assert errors[0].startswith("error: The batch size") and "2 devices" in errors[0], said
    assert errors[1] == f"process 1 on {socket.gethostname()}: {errors[0]}", said


def test_flags_of_a_pod_are_not_left_unread():
    config = ClusterConfig("no", "localhost:1234", 2, 0)
    with pytest.raises(ValueError, match="--cluster.join no joins no pod, which the three flags"):
        cluster.join(config)


def test_process_0_says_that_it_waits_and_what_stood_in_the_way(environ, monkeypatch, capsys):
    def fail(*args, **kwargs):
        time.sleep(0.3)
        raise RuntimeError("Address already in use")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(cluster, "_SILENT_SECONDS", 0.1)
    with pytest.raises(ValueError, match="localhost:1234 can't be joined: Address already in use"):
        cluster.join(ClusterConfig("auto", "localhost:1234", 3, 0))
    assert capsys.readouterr().err == "Waiting for 2 other process(es) to join at localhost:1234.\n"


@pytest.mark.slow
def test_a_real_process_that_is_not_joined_ends_in_one_line():
    process = start(OMPI)
    said = process.communicate(timeout=120)[1].splitlines()
    assert process.returncode == 2 and len(said) == 1
    name = f"process 2 on {socket.gethostname()}: error: "
    assert said[0].startswith(name) and "got OMPI_COMM_WORLD_SIZE=4" in said[0]


def test_what_a_lost_process_sounds_like():
    gloo = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo AllGather failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection "
        "closed by peer [127.0.0.1]:39856"
    )
    said = "Gloo AllGather failed: Connection closed by peer [127.0.0.1]:39856."
    assert peers.lost(gloo) == said
    try:
        raise ValueError("a save failed") from gloo
    except ValueError as error:
        assert peers.lost(error) == said
    assert peers.lost(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")) is None
    assert peers.lost(ConnectionError("Connection closed by peer")) is None  # of the data's server
    assert peers.lost(None) is None
    assert peers.GONE == 128 + signal.SIGABRT
    peers.end_if_one_is_gone(gloo)  # alone: it returns
