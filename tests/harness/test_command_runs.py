"""Commands that train: Ctrl-C at any moment, one example, a damaged checkpoint, a linked folder."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import on_a_full_disk
import pytest
from commands import end, one_line

import fmjax as fm
from experiments import two_moons
from fmjax import harness
from fmjax.harness import run, step

ROOT = pathlib.Path(__file__).parents[2]
MOONS = "--batch-size 64 --model.features 16 --log-every 1 --num-steps 2 --frames 0 --side 8 "
MOONS = f"{MOONS} --steps-per-dispatch 1".split()
NOTHING = ["--num-samples", "0", "--eval-examples", "0"]  # is drawn or measured


def main(config):
    harness.train(config, two_moons.make_task)


@pytest.mark.slow
def test_one_held_out_point_in_a_linked_folder_with_spaces(capsys, tmp_path, monkeypatch):
    """No standard error of one; `--traceback` is not recorded, and may come and go."""
    for name in ("integrate", "integrate_log_prob", "log_prob"):  # no solve is compiled
        monkeypatch.setattr(fm, name, getattr(on_a_full_disk, name))
    (folder := tmp_path / "a folder, ü").mkdir()
    (link := tmp_path / "link").symlink_to(folder)
    args = ["--workdir", str(link), *MOONS, "--num-samples", "20", "--eval-examples", "1"]
    for more in (["--traceback"], []):
        code, said = end(capsys, main, *args, *more, config=two_moons.Config)
        assert code == 0, said
    text = (folder / "summary.json").read_text()
    assert json.loads(text)["log_likelihood_standard_error"] is None and "NaN" not in text
    assert "traceback" not in (folder / "config.json").read_text()


@pytest.mark.slow
def test_a_damaged_checkpoint_and_other_flags_are_one_message(capsys, tmp_path):
    args = ["--workdir", str(tmp_path), *MOONS, *NOTHING]
    assert end(capsys, main, *args, config=two_moons.Config)[0] == 0
    code, said = end(capsys, main, *args, "--noise", "0.1", config=two_moons.Config)
    assert code == 2 and "noise: folder has 0.05, got 0.1" in said and "Traceback" not in said
    (tmp_path / "checkpoints" / "2" / "record" / "metadata").write_text("{}")
    code, said = end(capsys, main, *args, config=two_moons.Config)
    assert code == 2 and "damaged in" in one_line(said) and "step 2: " in said


def interrupting(function, count):
    """The function; before its count-th call comes Ctrl-C."""
    calls = []

    def told(*args):
        calls.append(args)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    return told


@pytest.mark.slow
def test_ctrl_c_before_and_in_training_and_in_writing(tmp_path, capsys, monkeypatch):
    """Each time the folder is usable; in training the step is ended and saved."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    args = ["--workdir", str(tmp_path), *MOONS, *NOTHING]
    jit_steps = step.jit_steps
    moments = (
        (step, "init_state", interrupting(step.init_state, 1), [], "Interrupted."),
        (run, "write_json", interrupting(run.write_json, 1), [], "Interrupted."),
        (step, "jit_steps", lambda *x: interrupting(jit_steps(*x), 1), ["1"], " 1/2 "),
        (run.Run, "finish", interrupting(run.Run.finish, 1), ["1", "2"], "Interrupted."),
    )
    try:
        for place, name, function, saved, said in moments:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, function)
                code, got = end(capsys, main, *args, config=two_moons.Config)
            assert code == 130 and said in got and "Traceback" not in got, got
            assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == saved
    finally:
        signal.signal(signal.SIGINT, previous)
    assert end(capsys, main, *args, config=two_moons.Config)[0] == 0
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == 2


@pytest.mark.slow
def test_ctrl_c_while_compiling_in_a_process_of_its_own(tmp_path):
    args = ["--workdir", str(tmp_path / "run"), *MOONS, *NOTHING]
    environ = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "nothing compiled yet")}
    # A process that is started in the background ignores SIGINT, and so would those that it starts.
    code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_module('experiments.two_moons', run_name='__main__', alter_sys=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code, *args],
        cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "lock").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in text, text
