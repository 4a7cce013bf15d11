"""A full disk, whatever is about to be written: one line, nothing lost, and on from there."""

import errno
import json
import os
import shlex
import sys

import numpy as np
import pytest
from made_runs import events_of
from namespaces import ROOT, in_a_namespace

from fmjax.harness.events import Events
from fmjax.harness.records import DiskError, disk_failure, lock, write_text, writing
from fmjax.training.checkpoints import CheckpointSaveError

FULL = os.strerror(errno.ENOSPC)


@pytest.mark.slow
def test_a_full_disk_at_every_write_is_one_line_and_with_room_the_command_ends(tmp_path):
    disk, script = tmp_path / "disk", ROOT / "tests" / "on_a_full_disk.py"
    disk.mkdir()
    command = shlex.join([sys.executable, str(script), str(disk)])
    done = in_a_namespace(f"mount -t tmpfs -o size=8m none {shlex.quote(str(disk))} && {command}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    moments = {moment["what"]: moment for moment in map(json.loads, done.stdout.splitlines())}
    assert len(moments) == 15
    for what, moment in moments.items():
        *before, line = moment["said"].strip().splitlines()
        assert "Traceback" not in moment["said"] and line.startswith("error: "), moment
        assert all("batch/s" in bar or "step" in bar or not bar.strip() for bar in before), moment
        assert moment["code"] == 2 and FULL in line, moment
        nan = what == "not_finite"  # stops the run again
        assert moment["again"] == (2 if nan else 0), moment
        assert nan or "ake room there" in line and str(disk) in line
    for what in (
        "config.json",
        "tensorboard",
        "metrics.jsonl",
        "window.json",
        "the first checkpoint",
    ):
        assert "no step is saved" in moments[what]["said"]
    assert "the last good checkpoint is step 20" in moments["preview"]["said"]
    for what in ("loss.png", "samples", "animation", "summary.json"):
        assert "the last good checkpoint is step 40" in moments[what]["said"]
    for what in ("a batch", "density.png", "evaluation.json"):
        assert "what is computed stays" in moments[what]["said"]
    assert "The loss of step 2 is" in moments["not_finite"]["said"]


def full(path=None):
    return OSError(errno.ENOSPC, FULL, *([str(path)] if path else []))


def test_the_disk_is_found_behind_other_errors(tmp_path):
    def raised(error, cause=None, hidden=False):
        try:
            try:
                raise cause or full()
            except OSError:
                if hidden:
                    raise error from None
                raise error  # noqa: B904 (as zipfile does when it can't close an archive)
        except Exception as caught:
            return caught

    assert disk_failure(tmp_path, full()) == FULL
    assert disk_failure(tmp_path, full(tmp_path / "file")) == FULL
    assert disk_failure(tmp_path, full("/elsewhere")) is None
    assert disk_failure(tmp_path, raised(ValueError("Can't close the ZIP file"))) == FULL
    assert disk_failure(tmp_path, raised(ValueError("a flag"), hidden=True)) is None
    assert disk_failure(tmp_path, FileNotFoundError(errno.ENOENT, "no such file")) is None
    for told in (DiskError("told"), CheckpointSaveError("told")):  # with what is kept, already
        assert disk_failure(tmp_path, raised(told)) is None
        with pytest.raises(type(told), match="^told$"), writing(tmp_path, lambda: "kept"):
            raise raised(told)
    with pytest.raises(DiskError, match=f"{tmp_path} can't be written: {FULL}; kept. Make room"):
        with writing(tmp_path, lambda: "kept"):
            raise full()
    with pytest.raises(TypeError, match="^a bug$"), writing(tmp_path, lambda: "kept"):
        raise TypeError("a bug")


def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(full()))
    with pytest.raises(OSError, match=FULL):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be one that can be written; got .*/file/folder: "):
        lock(tmp_path / "file" / "folder")


def test_tensorboard_events_are_on_disk_at_once(tmp_path):
    events = Events(tmp_path / "a folder", 7)
    events.scalars(7, {"train/loss": 0.5, "train/gradient_norm": float("nan")})
    version, start, scalars = events_of(next((tmp_path / "a folder").glob("events.out.tfevents.*")))
    events.close()
    assert version.file_version == "brain.Event:2"
    assert start.step == 7 and start.session_log.status == 1  # a start: what came after is dropped
    loss, norm = scalars.summary.value
    assert (scalars.step, loss.tag, loss.simple_value) == (7, "train/loss", 0.5)
    assert norm.tag == "train/gradient_norm" and np.isnan(norm.simple_value)
