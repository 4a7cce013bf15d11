"""What a shared cluster does to a run: signals, kills, bad numbers, full disks, long weeks."""

import os
import pathlib
import random
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from made_runs import rows
from namespaces import in_a_namespace

from experiments import two_moons
from fmjax import harness
from fmjax.harness.read import read

ROOT = pathlib.Path(__file__).parents[2]
SMALL = "--model.features 16 --batch-size 64 --num-samples 0 --eval-examples 0 --frames 0 "
SMALL = f"{SMALL} --side 8".split()
SECONDS = 400  # far more than it takes


def command(folder, *flags):
    usual = {"--steps-per-dispatch": "1", "--preview-every": "0"}
    more = [word for flag in usual.items() if flag[0] not in flags for word in flag]
    words = [sys.executable, "-m", "experiments.two_moons", "--workdir", str(folder)]
    return [*words, *SMALL, *more, *flags]


def start(folder, *flags, **environ):
    """One process, on one device, its output in a file beside the folder."""
    with open(f"{folder}.log", "a") as log:
        return subprocess.Popen(
            command(folder, *flags), cwd=ROOT, env=os.environ | environ, stdout=log, stderr=log
        )


def log_of(folder):
    return pathlib.Path(f"{folder}.log").read_text()


def wait_until(condition, process, folder):
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log_of(folder)
        time.sleep(0.01)


def finish(process, folder, code=0):
    assert process.wait(SECONDS) == code, log_of(folder)


def parameters(folder):
    last, average = (read(folder, average=flag) for flag in (False, True))
    return last.step, (last.params, average.params)


def assert_same_run(folder, other, num_steps, log_every):
    """The last parameters to the bit, and every line of the metrics once."""
    (step, a), (_, b) = parameters(folder), parameters(other)
    assert step == num_steps
    jax.tree.map(np.testing.assert_array_equal, a, b)
    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(log_every, num_steps + 1, log_every))
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(other)]


@pytest.mark.slow
def test_signals_end_the_step_save_it_and_the_run_goes_on_exactly(tmp_path):
    flags = ("--num-steps", "1500", "--checkpoint-every", "100000", "--log-every", "10")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(tmp_path / "told", *flags)
        done = len(rows(tmp_path / "told"))
        wait_until(lambda: len(rows(tmp_path / "told")) > done + 3, process, tmp_path / "told")  # noqa: B023
        process.send_signal(number)
        finish(process, tmp_path / "told", code)
        step = parameters(tmp_path / "told")[0]
        assert step < 1500, "the run was over before the signal came: more steps"
        assert f"{number.name} came" in log_of(tmp_path / "told")
        assert f"saved at step {step}" in log_of(tmp_path / "told")
    for name in ("told", "untouched"):
        finish(start(tmp_path / name, *flags), tmp_path / name)
    assert_same_run(tmp_path / "told", tmp_path / "untouched", 1500, 10)


def saved(folder):
    """The step of the latest whole checkpoint, 0 without one."""
    return max((int(p.name) for p in folder.glob("checkpoints/*") if p.name.isdigit()), default=0)


@pytest.mark.long
def test_20_kills_at_random_moments_change_no_bit(tmp_path):
    """Half of them anywhere from the start on, half among the steps and saves."""
    flags = ("--num-steps", "16000", "--checkpoint-every", "10", "--log-every", "5")
    folder, moments = tmp_path / "killed", random.Random(0)
    progress, in_writing = 0, 0
    for kill in range(20):
        before = saved(folder)
        logged = max([before] + [row["step"] for row in rows(folder)])  # some after the last save
        process = start(folder, *flags)
        if kill % 2:

            def goes_on(logged=logged):
                return any(row["step"] > logged for row in rows(folder)[-1:])

            wait_until(goes_on, process, folder)
            time.sleep(moments.uniform(0, 3))
        else:
            time.sleep(moments.uniform(0, 15))
        assert process.poll() is None, "the run was over before the kill: more steps"
        process.kill()
        process.wait()
        progress += saved(folder) > before
        in_writing += any("tmp" in path.name for path in folder.glob("checkpoints/*"))
    print(f"{progress} of 20 kills after new checkpoints, {in_writing} in the middle of a write")
    assert progress >= 8 and in_writing >= 5  # else these moments prove little
    for name in ("killed", "untouched"):
        finish(start(tmp_path / name, *flags), tmp_path / name)
    assert_same_run(folder, tmp_path / "untouched", 16000, 5)


def resident(process):
    """The resident set in MiB, or None once the process is gone."""
    try:
        text = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return None
    sizes = [int(line.split()[1]) / 1024 for line in text.splitlines() if "VmRSS" in line]
    return sizes[0] if sizes else None


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("steps_per_dispatch", "preview_every", "share"),
    [("1", "0", 0.05), ("10", "0", 0.05), ("10", "100", 0.15)],  # pictures come and go
)
def test_memory_stays_constant_over_10000_steps(tmp_path, steps_per_dispatch, preview_every, share):
    """Within 5 % of what it is after step 1,000, in a run that finds its programs compiled.

    What compiling takes the allocator gives back at a moment of its own.
    """
    folder, sizes = tmp_path / "soak", {}
    flags = ("--num-steps", "10000", "--checkpoint-every", "500", "--log-every", "10")
    flags += ("--steps-per-dispatch", steps_per_dispatch, "--preview-every", preview_every)
    process = start(folder, *flags)
    wait_until(lambda: rows(folder), process, folder)
    process.send_signal(signal.SIGTERM)
    finish(process, folder, code=143)
    process = start(folder, *flags)
    while process.poll() is None and max(sizes, default=0) < 9900:
        if (done := rows(folder)) and (size := resident(process)):
            sizes[done[-1]["step"]] = size
        time.sleep(0.1)
    finish(process, folder)
    later = {step: size for step, size in sizes.items() if step >= 1000}
    first, *_, last = later.values()
    print(f"resident: {first:.1f} MiB at step {min(later)}, {last:.1f} at step {max(later)}, "
          f"{min(later.values()):.1f} to {max(later.values()):.1f} between")  # fmt: skip
    assert min(later) < 2000 and max(later) >= 9000
    assert all(abs(size / first - 1) < share for size in later.values())


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_training(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    mount = f"mount -t tmpfs -o ro none '{folder}/checkpoints'"
    done = in_a_namespace(f"{mount} && exec {shlex.join(command(folder, '--num-steps', '5'))}")
    assert done.returncode != 0 and "must be one that can be written" in done.stderr
    assert "Read-only file system" in done.stderr and "step/s" not in done.stderr
    assert not (folder / "config.json").exists()


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    """A disk of 3 MiB, which fills up among the checkpoints; with more room the run goes on."""
    folder = tmp_path / "disk" / "run"
    folder.parent.mkdir()
    run = shlex.join(command(folder, "--num-steps", "400", "--checkpoint-every", "10"))
    run = run.replace("--model.features 16", "--model.features 256 256")
    disk = shlex.quote(str(folder.parent))
    done = in_a_namespace(
        f"mount -t tmpfs -o size=3m none {disk} && ({run}; echo code $?; "
        f"ls {disk}/run/checkpoints; mount -o remount,size=300m {disk}; exec {run})"
    )
    first, stopped, rest = done.stdout.partition("code 2\n")
    assert stopped and "Run folder" not in first, done.stdout + done.stderr
    assert "No space left on device" in done.stderr and "last good one is step" in done.stderr
    assert done.returncode == 0 and '"step": 400' in rest, done.stderr


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be one that can be written"):
        config = two_moons.Config(workdir=tmp_path / "file" / "run", num_steps=1)
        harness.train(config, two_moons.make_task)
