"""The console command: its help, what it refuses, and a module of the user's own."""

import importlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from made_runs import params_at

import fmjax as fm
from fmjax import cli, harness
from fmjax.harness import keys

ROOT = pathlib.Path(__file__).parents[2]


def fmjax(folder, *words):
    """`fmjax WORDS` in a folder; this repository is installed, so to speak, but not its tests."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "fmjax.cli", *map(str, words)],
        cwd=folder, env=environ, capture_output=True, text=True,
    )  # fmt: skip


def test_every_command_is_a_module_with_flags():
    for name, module in cli.COMMANDS.items():
        found = importlib.import_module(module)
        assert callable(found.main) and found.__doc__
        assert name == "prepare" or found.Config
        assert f"fmjax {name}" in cli.__doc__


def called(monkeypatch, capsys, *words):
    """The exit code, and what was said on stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["fmjax", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",)])
def test_help_names_the_commands(monkeypatch, capsys, words):
    code, out, _ = called(monkeypatch, capsys, *words)
    assert code == 0
    for name in cli.COMMANDS:
        assert f"fmjax {name}" in out


def test_version(monkeypatch, capsys):
    assert called(monkeypatch, capsys, "--version") == (0, f"{fm.__version__}\n", "")


@pytest.mark.parametrize("word", ["trian", "--trace", "EVALUATE"])
def test_an_unknown_command_is_one_line(monkeypatch, capsys, word):
    code, _, said = called(monkeypatch, capsys, word)
    assert code == 2 and said.count("\n") == 1
    assert f"has the commands evaluate, sample, export, prepare; got {word}" in said


def test_a_package_that_is_missing_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "sample", "module_that_needs")

    def import_module(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(importlib, "import_module", import_module)
    code, _, said = called(monkeypatch, capsys, "sample", "runs/a")
    assert code == 2 and "needs tyro, which is not installed. pip install 'fmjax[train]'" in said

    def broken(name):
        raise ModuleNotFoundError("No module named 'fmjax.nothing'", name="fmjax.nothing")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):  # a bug of this package is not the user's
        called(monkeypatch, capsys, "sample", "runs/a")


@pytest.mark.parametrize("name", ["evaluate", "sample", "export"])
def test_every_command_says_how_it_is_called(monkeypatch, capsys, name):
    code, _, said = called(monkeypatch, capsys, name)
    what = "FOLDER FILE" if name == "export" else "FOLDER"
    assert code == 2 and f": fmjax {name} {what}; got none." in said
    code, out, _ = called(monkeypatch, capsys, name, "--help")
    assert code == 0 and f"fmjax {name}" in out and "--average" in out


@pytest.mark.slow
def test_a_module_in_the_working_folder_is_found(tmp_path):
    """`fmjax sample RUN` imports what made the run from where the user stands."""
    shutil.copy(ROOT / "tests" / "tiny.py", tmp_path)
    harness.train(tiny.Config(workdir=tmp_path / "run", num_steps=5), tiny.make_task)
    words = "run --num 8 --solver Euler --num-steps 1 --guidance 2 --format npz --out a.npz".split()
    done = fmjax(tmp_path, "sample", *words)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "a.npz") as arrays:
        x1, labels = arrays["x"], arrays["labels"]
    np.testing.assert_array_equal(labels, np.arange(8) % 3)
    # One step of Euler's from t = 0: x0 + u(0, x0), with u = x W + c, guided.
    params = params_at(tmp_path / "run", 5, "ema_params")
    key = keys.key(0, "drawn")
    one = harness.load(tmp_path / "run").task.samples.source.sample
    x0 = np.concatenate([one(jax.random.fold_in(key, k), 1) for k in range(8)])
    c = params["c"][3] + 2 * (params["c"][labels] - params["c"][3])
    np.testing.assert_allclose(x1, x0 + x0 @ params["w"] + c, atol=1e-5)
    elsewhere = fmjax(ROOT, "sample", tmp_path / "run")
    assert elsewhere.returncode == 2 and elsewhere.stderr.count("\n") == 1
    assert "names tiny:Config as what made the run, which can't be imported" in elsewhere.stderr
