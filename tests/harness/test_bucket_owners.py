"""Who may write in a run folder of a bucket, and what becomes of the others."""

import signal

import jax.numpy as jnp
import pytest
from bucket_runs import (
    RUN,
    alone,
    content,
    hosts,
    objects,
    rows,
    server,
    steps,
    store,
    wait_for_step,
)
from etils import epath

from fmjax import training
from fmjax.harness import places
from fmjax.harness.config import RunConfig
from fmjax.harness.places import patient
from fmjax.harness.run import Run
from fmjax.training import checkpoints

__all__ = ["hosts", "server", "store"]
ENDLESS = ("--num-steps", "1000000", "--checkpoint-every", "100")


@pytest.mark.slow
def test_a_second_start_that_is_refused_does_not_end_the_first(server, hosts):
    """On the same host, and with other flags on another one."""
    first = alone(hosts[0], *ENDLESS)
    wait_for_step(server, 100, hosts[:1], [first])
    before = content(server, "run/owner.json")
    hosts[0].finish(alone(hosts[0], *ENDLESS), 2)
    assert f"another is running in {RUN}" in hosts[0].log.read_text()
    hosts[1].finish(alone(hosts[1], *ENDLESS, "--noise", "0.1"), 2)
    assert "noise: folder has 0.05, got 0.1" in hosts[1].log.read_text()
    assert content(server, "run/owner.json") == before
    wait_for_step(server, steps(server)[-1] + 200, hosts[:1], [first])
    first.send_signal(signal.SIGTERM)
    hosts[0].finish(first, 128 + signal.SIGTERM)
    rows(server)


def test_what_is_not_sent_yet_is_not_removed_by_another_command(store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    address = epath.Path(RUN) / "drawn"
    with places.at_hand(address) as folder:
        (folder / "a.png").write_bytes(b"a")
        with pytest.raises(ValueError, match="another is running in gs://bucket/run/drawn"):
            with places.at_hand(address):
                pass
        assert (folder / "a.png").exists()
    assert content(store, "run/drawn/a.png") == b"a"
    with places.at_hand(address) as folder:  # it has been let go of
        assert (folder / "a.png").read_bytes() == b"a"


def test_a_save_does_not_begin_in_the_folder_of_another(store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    state = training.TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, ())
    with (
        pytest.raises(ValueError, match="Another run has begun"),
        Run("tiny", RunConfig(workdir=epath.Path(RUN), num_steps=100)) as run,
    ):
        run.restore(state)
        run.begin()
        patient.write(f"{RUN}/owner.json", b'{"token": "of another", "host": "elsewhere"}')
        run._place._fence.lately = 0.0  # it was looked at a moment ago
        run.save(state._replace(step=jnp.int32(10)))
    assert not any("/checkpoints/10" in name for name in objects(store))


@pytest.mark.slow
def test_a_predecessor_that_lives_on_completes_nothing(server, hosts):
    flags = ("--num-steps", "1000000", "--checkpoint-every", "20")
    first = alone(hosts[0], *flags)
    wait_for_step(server, 20, hosts[:1], [first])
    first.send_signal(signal.SIGSTOP)  # a host that was thought dead
    second = alone(hosts[1], *flags)
    wait_for_step(server, steps(server)[-1] + 60, hosts[1:], [second])
    second.send_signal(signal.SIGTERM)
    hosts[1].finish(second, 128 + signal.SIGTERM)
    before, saved = {name: content(server, name) for name in objects(server)}, steps(server)
    first.send_signal(signal.SIGCONT)
    hosts[0].finish(first, 2, seconds=60)
    assert f"Another run has begun in {RUN}" in hosts[0].log.read_text()
    after = {name: content(server, name) for name in objects(server)}
    assert steps(server) == saved
    kept = {name for name in before if "/checkpoints/" not in name}
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}
    rows(server)


@pytest.mark.slow
def test_what_a_dead_run_had_not_sent_is_gone(store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = RunConfig(workdir=epath.Path(RUN), num_steps=100)
    state = training.TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, ())
    with Run("tiny", config) as run:
        run.restore(state)
        run.log(10, {"loss": 1.0})
        run.begin()
        run.save(state._replace(step=jnp.int32(10)), wait=True)
    (run.folder / "metrics.jsonl").write_text('{"step": 10, "loss": 9.0, "seconds": 0.0}\n')
    (run.folder / "samples" / "old.png").write_bytes(b"")
    with Run("tiny", config) as run:
        assert int(run.restore(state).step) == 10
        assert [row["loss"] for row in run.metrics()] == [1.0]
        assert not (run.folder / "samples" / "old.png").exists()


def test_a_start_that_fails_leaves_no_object(store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = RunConfig(workdir=epath.Path(RUN), num_steps=100)
    with pytest.raises(RuntimeError), Run("tiny", config) as run:
        run.restore(training.TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, ()))
        raise RuntimeError("before the first step")
    assert objects(store) == []
    assert not run.folder.exists()


@pytest.mark.slow
def test_two_runs_can_not_both_complete_a_checkpoint(store, monkeypatch, tmp_path):
    state = training.TrainState(jnp.int32(0), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}, ())
    config = RunConfig(workdir=epath.Path(RUN), num_steps=100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match="Another run has begun"), Run("tiny", config) as run:
        run.restore(state)
        run.begin()
        run.save(state._replace(step=jnp.int32(10)), wait=True)
        patient.write(f"{RUN}/owner.json", b'{"token": "of another", "host": "elsewhere"}')
        run.log(20, {"loss": 1.0})
        with pytest.raises(checkpoints.stored.CheckpointSaveError, match="on elsewhere"):
            run.save(state._replace(step=jnp.int32(20)), wait=True)
        assert steps(store) == [10]
        run._place.check()
