"""Run folders in a bucket, which a server on this machine stands for."""

import json
import re
import signal
import threading
import time
import urllib.parse

import jax.numpy as jnp
import numpy as np
import pytest
from bucket_runs import (
    RUN,
    alone,
    content,
    hosts,
    objects,
    pod,
    pod_flags,
    quoted,
    rows,
    server,
    steps,
    store,
    wait_for_step,
)
from etils import epath
from gcsfs.retry import HttpError

from experiments import two_moons
from fmjax import training
from fmjax.evaluation import sample
from fmjax.harness import command, places
from fmjax.harness.config import RunConfig, check_flags
from fmjax.harness.places import patient, scratch
from fmjax.harness.run import Run
from fmjax.training import checkpoints

__all__ = ["hosts", "server", "store"]


@pytest.mark.slow
def test_a_pod_whose_run_folder_is_in_a_bucket(server, hosts, tmp_path):
    endless = ("--num-steps", "1000000", "--checkpoint-every", "20")
    processes = pod(hosts, *endless)
    wait_for_step(server, 20, hosts, processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    killed_after = steps(server)[-1]
    processes = pod(hosts, *endless)
    wait_for_step(server, killed_after + 20, hosts, processes)
    processes[1].send_signal(signal.SIGTERM)
    for host, process in zip(hosts, processes, strict=True):
        host.finish(process, 128 + signal.SIGTERM)
    stopped = steps(server)[-1]
    assert len(rows(server)) == stopped
    num = str(stopped + 10)
    hosts[1].finish(
        alone(hosts[1], "--num-steps", num, "--checkpoint-every", "20")
    )  # process 0 now
    got = [row["loss"] for row in rows(server)]
    whole = ("--num-steps", num, "--checkpoint-every", "20")
    hosts[0].finish(alone(hosts[0], *whole, workdir=str(tmp_path / "whole")))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    np.testing.assert_allclose(got, [json.loads(line)["loss"] for line in lines], rtol=1e-5)
    _evaluated_by_two_and_by_one(server, hosts)
    for host in hosts:
        assert not list((host.folder / "work").iterdir())  # no folder named gs:


def _evaluated_by_two_and_by_one(server, hosts):
    words = ["-m", "fmjax.cli", "evaluate", RUN, "--seeds", "0", "1"]
    several = [*words, *pod_flags()]
    processes = [
        host.start(*several, "--cluster.process-id", str(k)) for k, host in enumerate(hosts)
    ]
    for host, process in zip(hosts, processes, strict=True):
        host.finish(process)
    names = [name for name in objects(server) if name.startswith("run/evaluation/")]
    by_two = json.loads(content(server, "run/evaluation/evaluation.json"))
    assert "run/evaluation/density.png" in names and "run/evaluation/computed_1.jsonl" in names
    for name in names:
        server.forward("DELETE", f"/storage/v1/b/bucket/o/{quoted(name)}", b"", {})
    hosts[1].finish(hosts[1].start(*words))
    by_one = json.loads(content(server, "run/evaluation/evaluation.json"))
    for part in ("likelihood", "quality"):
        for name, value in by_one[part].items():
            if isinstance(value, float) and "seconds" not in name:
                np.testing.assert_allclose(by_two[part][name], value, rtol=1e-6, err_msg=name)
    assert by_one["likelihood"]["num_points"] == by_two["likelihood"]["num_points"] > 100
    hosts[0].finish(hosts[0].start("-m", "fmjax.cli", "sample", RUN, "--num", "16"))
    assert any(name.startswith("run/drawn/") and name.endswith(".png") for name in objects(server))
    exported = hosts[0].folder / "run.safetensors"
    hosts[0].finish(hosts[0].start("-m", "fmjax.cli", "export", RUN, str(exported)))
    hosts[0].finish(hosts[0].start("-m", "fmjax.cli", "export", RUN, "gs://bucket/run.safetensors"))
    assert content(server, "run.safetensors") == exported.read_bytes()


@pytest.mark.slow
def test_disks_of_their_own_are_named(hosts):
    began = time.monotonic()
    processes = pod(hosts, "--num-steps", "10", workdir="run")
    for host, process in zip(hosts, processes, strict=True):
        host.finish(process, 2, seconds=120)
    assert time.monotonic() - began < 60 + 20  # imports included
    said = hosts[0].log.read_text()
    assert "All processes must see one run folder" in said
    assert "is not there for process 1" in said and "gs://BUCKET/FOLDER" in said
    for host in hosts:
        assert not list((host.folder / "work").iterdir())


@pytest.mark.parametrize(
    ("workdir", "said"),
    [
        ("s3://bucket/run", "must be a local folder or gs://BUCKET/FOLDER"),
        ("gs://bucket", "must name a folder, gs://BUCKET/FOLDER; got gs://bucket"),
        ("gs://bucket/a#1", "letters, digits and . _ - = + alone"),
    ],
)
def test_what_orbax_can_not_write_to_is_refused(workdir, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_flags(two_moons.Config(workdir=epath.Path(workdir)))


def test_a_local_path_is_no_address():
    with pytest.raises(ValueError, match=re.escape("--out must be a local path; got gs:/bucket/a")):
        command.parse(sample.Config, "sample", "", ["runs/a", "--out", "gs://bucket/a"])


def test_a_scheme_in_capitals_is_refused():
    with pytest.raises(ValueError, match="begins with gs://, in small letters; got GS://bucket/a"):
        command.parse(sample.Config, "sample", "", ["GS://bucket/a"])


def test_a_bucket_needs_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install 'fmjax\[gcs\]'"):
        places.check_name("--workdir", RUN)


@pytest.mark.parametrize(
    ("fault", "said"),
    [("403", "access is denied (403 says the proxy)"), (None, "there is no bucket other")],
)
def test_a_bucket_that_can_not_be_written_is_one_line(server, monkeypatch, fault, said):
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    server.fault = fault
    patient.register(1.0)
    name = "gs://bucket/run" if fault else "gs://other/run"
    with pytest.raises(ValueError, match=re.escape(said)):
        patient.check(epath.Path(name))


def test_without_credentials_nothing_is_begun(monkeypatch):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.setenv("NO_GCE_CHECK", "true")  # a quarter of a minute without a network
    patient.register(1.0)
    with pytest.raises(ValueError, match="there are no credentials"):
        patient.check(epath.Path(RUN))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_outage_is_waited_for_and_spoken_of(store, monkeypatch, capsys, fault):
    monkeypatch.setattr(patient, "SILENT_SECONDS", 1.0)
    path = epath.Path("gs://bucket/word")
    store.fault = fault
    threading.Timer(3, lambda: setattr(store, "fault", None)).start()
    began = time.monotonic()
    patient.write(path, b"here")
    assert time.monotonic() - began > 2.9
    assert patient.read(path) == b"here" == content(store, "word")
    began, ended = capsys.readouterr().err.strip().split("\n\n")
    assert began.startswith("The bucket does not answer (")
    assert began.endswith("it is asked again, for 20 s at most.")
    assert re.fullmatch("The bucket answers again, after [3-9] s.", ended)


def test_patience_ends(store):
    patient.register(2.0)
    store.fault = "503"
    began = time.monotonic()
    with pytest.raises(HttpError, match="503 says the proxy"):
        patient.read("gs://bucket/word")
    assert time.monotonic() - began < 10
    since, error = patient.Patient.failing
    assert since >= began and "503" in str(error)
    store.fault = None
    with pytest.raises(FileNotFoundError):  # an answer
        patient.read("gs://bucket/word")
    assert patient.Patient.failing is None


def test_what_changes_goes_up_and_what_grows_only_now_and_then(store, tmp_path):
    folder = tmp_path / "here"
    (folder / "samples").mkdir(parents=True)
    (folder / "compiled").mkdir()
    sender = scratch.Sender(epath.Path(RUN), folder)
    (folder / "metrics.jsonl").write_text("1\n")
    (folder / "samples" / "a.png").write_bytes(b"picture")
    (folder / "compiled" / "program").write_bytes(b"stays here")
    (folder / "half.tmp").write_bytes(b"half")
    sender._send(every=30.0)
    assert objects(store) == ["run/metrics.jsonl", "run/samples/a.png"]
    num = len(store.requests)
    sender._send(every=30.0)
    assert len(store.requests) == num  # nothing has changed
    (folder / "metrics.jsonl").write_text("1\n2\n")
    sender._send(every=30.0)
    assert content(store, "run/metrics.jsonl") == b"1\n"  # not yet
    sender.flush()
    assert content(store, "run/metrics.jsonl") == b"1\n2\n"
    other = tmp_path / "there"
    (other / "samples").mkdir(parents=True)
    (other / "samples" / "never_sent.png").write_bytes(b"")
    num = len(store.requests)
    scratch.lay_out(epath.Path(RUN), other, whole=True)
    assert len(store.requests) - num <= 3  # a listing, and each of two files
    assert (other / "samples" / "a.png").read_bytes() == b"picture"
    assert not (other / "samples" / "never_sent.png").exists()
    scratch.lay_out(epath.Path(RUN), other, whole=False)  # as a run that goes on
    assert [path.name for path in other.rglob("*") if path.is_file()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_marked_by_an_object(store):
    def state(step):
        return training.TrainState(jnp.int32(step), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, ())

    with checkpoints.open_manager(f"{RUN}/checkpoints") as manager:
        for step in (1, 2):
            checkpoints.save(manager, state(step), {}, wait=True)
        record = next(name for name in objects(store) if name.endswith("/2/record/metadata"))
        patient.write(f"gs://bucket/{record}", b"{}")
        found, damaged = checkpoints.restore_latest_good(manager, state(0))
        assert int(found.step) == 1 and [one.step for one in damaged] == [2]
        assert b"hash" in content(store, "run/checkpoints/2.damaged")
        assert manager.latest_step() == 1
        checkpoints.save(manager, state(2), {}, wait=True)
    with checkpoints.open_manager(f"{RUN}/checkpoints") as manager:
        assert int(checkpoints.restore(manager, state(0)).step) == 2


@pytest.mark.slow
def test_a_checkpoint_costs_ten_requests_of_ours_at_most(store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arrays = {f"w{k}": jnp.ones(3) for k in range(41)}
    config = RunConfig(workdir=epath.Path(RUN), num_steps=100)
    with Run("tiny", config) as run:
        state = run.restore(training.TrainState(jnp.int32(0), arrays, arrays, ()))
        run.begin()
        for step in (10, 20, 30, 40):
            before = len(store.requests)
            run.log(step, {"loss": 1.0})
            run.keep_window(step, [[1.0, 1.0]])
            run.preview(step, np.zeros((4, 4, 3), np.uint8))
            run.save(state._replace(step=jnp.int32(step)), wait=True)
            asked = [urllib.parse.unquote(path) for _, path in store.requests[before:]]
            ours = [path for path in asked if "checkpoints" not in path]
            sent = [path for path in ours if "upload" in path]
            assert len(sent) >= 4 and len(ours) <= 10, ours
            assert "preview" in "".join(objects(store))
    held = json.loads(content(store, "run/window.json"))
    assert held["40"] == [[1.0, 1.0]]
    events = [name for name in objects(store) if name.startswith("run/tensorboard/")]
    assert len(events) == 5  # each once
