"""The launchers of experiments/pods: what they would start is what the experiment takes."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from experiments import cifar10
from fmjax.harness import command

PODS = pathlib.Path(__file__).parents[2] / "experiments" / "pods"
ARGS = {
    "tpu_slice.sh": ("slice", "us-west4-a", "bucket", "https://example.org/fmjax.git"),
    "slurm.sbatch": ("/shared/cifar10",),
    "two_machines.sh": ("host-a", "host-b", "/shared/cifar10"),
}


def started(name, tmp_path, code=0, args=None, **more):
    """What a launcher does: its exit code, and each call of a program that starts something."""
    calls = tmp_path / "calls"
    for program in ("gcloud", "srun", "scontrol", "ssh"):
        path = tmp_path / program
        failing = code if program == "srun" else 0
        if program == "ssh":  # process 0 alone
            failing = f'$(case "$*" in *process-id\\ 0*) echo {code};; *) echo 0;; esac)'
        path.write_text(f'#!/bin/sh\necho {program} "$*" >> {shlex.quote(str(calls))}\n'
                        f"exit {failing}\n")  # fmt: skip
        path.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    words = ["bash", PODS / name, *(args or ARGS[name])]
    done = subprocess.run(words, env=environ | more, timeout=60)
    return done.returncode, calls.read_text().splitlines()


def parsed(words):
    """The config of the words after `python -m experiments.cifar10`."""
    return command.parse(cifar10.Config, "experiments.cifar10", None, words)


def configs(calls):
    """Those of all calls that train."""
    after = [call.partition("-m experiments.cifar10 ")[2] for call in calls]
    return [parsed(shlex.split(words)) for words in after if words]


def jobset():
    return yaml.safe_load((PODS / "gke_jobset.yaml").read_text())


def test_each_launcher_is_short_commented_and_named_in_the_readme():
    page = (PODS.parent / "README.md").read_text()
    names = {path.name for path in PODS.iterdir()}
    assert names == {*ARGS, "gke_jobset.yaml"}
    for name in names:
        lines = (PODS / name).read_text().splitlines()
        assert 15 <= len(lines) <= 45 and sum(line.startswith("# ") for line in lines) >= 4, name
        assert f"pods/{name}" in page, name


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("name", ARGS)
def test_a_script_starts_what_the_experiment_takes(name, tmp_path):
    subprocess.run(["bash", "-n", PODS / name], check=True)
    code, calls = started(name, tmp_path)
    found = configs(calls)
    assert code == 0 and len(found) == (2 if name == "two_machines.sh" else 1), calls
    for config in found:
        assert config.precision == "bfloat16" and config.cluster.heartbeat_seconds < 100
    folder = "gs:/bucket/cifar10" if name == "tpu_slice.sh" else "/shared/cifar10"
    assert {re.sub("/+", "/", str(config.workdir)) for config in found} == {folder}


def test_the_two_machines_name_each_other(tmp_path):
    pod = sorted(
        configs(started("two_machines.sh", tmp_path)[1]), key=lambda c: c.cluster.process_id
    )
    clusters = [(c.cluster.coordinator, c.cluster.num_processes, c.cluster.process_id) for c in pod]
    assert clusters == [("host-a:12345", 2, 0), ("host-a:12345", 2, 1)]
    hosts = [call.split()[1] for call in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(hosts) == ["host-a", "host-b"]


def test_two_machines_end_with_what_either_says_and_take_users_and_spaces(tmp_path):
    args = ("me@host-a", "me@host-b", "/shared/my runs")
    code, calls = started("two_machines.sh", tmp_path, 134, args)
    assert code == 134 and len(calls) == 2
    for config in configs(calls):
        assert config.cluster.coordinator == "host-a:12345"
        assert str(config.workdir) == "/shared/my runs"


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (2, False), (143, True), (134, True), (137, True)]
)
def test_slurm_requeues_what_was_preempted_or_lost_a_process(tmp_path, code, again):
    returned, calls = started("slurm.sbatch", tmp_path, code)
    assert returned == code and ("scontrol requeue 77" in calls) is again


@pytest.mark.parametrize(("code", "again"), [(143, True), (134, False), (137, False)])
def test_slurm_does_not_requeue_a_crash_for_ever(tmp_path, code, again):
    _, calls = started("slurm.sbatch", tmp_path, code, SLURM_RESTART_COUNT="10")
    assert ("scontrol requeue 77" in calls) is again


def test_slurms_lines():
    text = (PODS / "slurm.sbatch").read_text()
    head, _, rest = text.partition("\nset ")
    lines = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.M)
    assert len(lines) == text.count("#SBATCH") and "#SBATCH" not in rest  # Slurm reads no further
    options = dict(lines)
    assert options["signal"] == "TERM@120" and options["requeue"] == "", options
    assert options["ntasks-per-node"] == options["gpus-per-node"], "one process per GPU"
    assert options["open-mode"] == "append"


def test_the_jobset_is_one_process_per_host_that_begins_again():
    spec = jobset()["spec"]
    (job,) = spec["replicatedJobs"]
    pod = job["template"]["spec"]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and pod["backoffLimit"] == 0
    assert pod["parallelism"] == pod["completions"] and pod["completionMode"] == "Indexed"
    (container,) = pod["template"]["spec"]["containers"]
    selector = pod["template"]["spec"]["nodeSelector"]
    rows, columns = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips * pod["completions"]
    words = [*container["command"], *container["args"]]
    assert words[:3] == ["python", "-m", "experiments.cifar10"]  # the process that gets SIGTERM
    assert parsed(words[3:]).batch_size % (rows * columns) == 0


def test_a_misspelt_flag_would_be_refused(capsys):
    with pytest.raises(SystemExit):
        parsed(["--cluster.heartbeat", "60"])
    assert "heartbeat-seconds" in capsys.readouterr().err
