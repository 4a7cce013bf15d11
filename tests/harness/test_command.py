"""How commands end: one line and exit code 2 for what can be expected, a traceback for a bug."""

import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import Config, end, one_line

import fmjax as fm
from experiments import digits, toy_table, two_moons
from fmjax.evaluation import encoder, evaluate, export
from fmjax.harness import command, train
from fmjax.harness.pods.cluster import ProcessZeroError
from fmjax.harness.run import Run
from fmjax.tasks.points import MLPConfig

ROOT = pathlib.Path(__file__).parents[2]


def raising(error):
    def main(config):
        raise error

    return main


def main_of(module):
    """What a command does with its flags; of an experiment, what `harness.main` does."""
    if hasattr(module, "make_task"):
        return lambda config: train(config, module.make_task)
    return module.main


@pytest.mark.parametrize(
    ("module", "flags", "said"),
    [
        (two_moons, "--model.features 0", "--model.features must be positive; got 0."),
        (two_moons, "--model.features", "--model.features must have at least one value"),
        (two_moons, "--num-steps -3", "--num-steps must be positive; got -3."),
        (two_moons, "--learning-rate nan", "--learning-rate must be positive; got nan."),
        (two_moons, "--seed 4294967296", "--seed must be in 0..4294967295; got 4294967296."),
        (two_moons, "--seed 3 --num-steps 2 --seed=4", "given once; got --seed twice in: --seed 3"),
        (digits, "--flip --no-flip", "given once; got --flip twice"),
        (digits, "--model.conv-resample --model.no-conv-resample", "--model.conv-resample twice"),
        (digits, "--num_steps 2 --num-steps 2", "given once; got --num-steps twice"),
        (digits, "--dataset ./", "got ./: that is a folder. Write folder:./"),
        (digits, "--model.num-heads 0", "--model.num-heads must be positive; got 0."),
        (digits, "--model.channel-multipliers 1 1 1 1 1", "must be divisible by 16"),
        (digits, "--workdir /dev/null/run", "/dev/null/run: Not a directory"),
        (evaluate, "--run runs/a --seeds 1", "fmjax evaluate runs/a --seeds 1"),
        (evaluate, "--seeds 1 2 --run=runs/a", "fmjax evaluate runs/a --seeds 1 2"),
        (evaluate, "--run", "fmjax evaluate FOLDER"),
        (evaluate, "", "takes one folder: fmjax evaluate FOLDER; got none."),
        (evaluate, "a b", "takes one folder: fmjax evaluate FOLDER; got a b."),
        (evaluate, "no/such/folder", "got no/such/folder, which does not exist. Train first:"),
        (evaluate, "pyproject.toml", "must hold config.json; got pyproject.toml, which is a file."),
        (evaluate, "tests", "must hold config.json; got tests, which does not."),
        (toy_table, "--seeds 1", "--seeds must be different numbers, at least 2; got 1."),
        (toy_table, "--sigma inf", "--sigma must be positive; got inf."),
        (encoder, "--learning-rate 0", "--learning-rate must be positive; got 0.0."),
        (encoder, "--workdir /dev/null/e", "must be one that can be written; got /dev/null/e: Not"),
        (toy_table, "--workdir /dev/null/t", "must be one that can be written; got /dev/null/t:"),
    ],
)  # fmt: skip
def test_expected_errors_are_one_line(capsys, monkeypatch, module, flags, said):
    monkeypatch.chdir(ROOT)
    args = flags.split()
    if module in (two_moons, digits) and "--workdir" not in args:
        args += ["--workdir", "no/such/run"]
    name = "fmjax evaluate" if module is evaluate else module.__name__
    code, got = end(capsys, main_of(module), *args, config=module.Config, name=name)
    assert code == 2 and said in one_line(got)
    assert not (ROOT / "no").exists()


@pytest.mark.parametrize("config", [Config, two_moons.Config])
@pytest.mark.parametrize("args", [("--num-stps", "3"), ("--num-steps", "x")])
def test_what_tyro_refuses(capsys, args, config):
    code, said = end(capsys, print, *args, config=config)
    assert code == 2 and "Traceback" not in said and "--num-steps" in said


def failed_solve(config):
    solve = jax.jit(lambda x: fm.sample(lambda t, x: jnp.where(t > 0.5, jnp.nan, -x), x))
    jax.block_until_ready(solve(jnp.ones((2, 2))))


def no_steps(config):
    """A ValueError of fmjax's that comes through JAX's frames."""
    jax.jit(lambda x: fm.sample(lambda t, x: -x, x, num_steps=0))(jnp.ones((2, 2)))


FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes."


@pytest.mark.parametrize(
    ("main", "said"),
    [
        (no_steps, "error: num_steps must be at least 1.*; got 0"),
        (raising(FileNotFoundError("no archives")), "error: no archives\n"),
        (raising(OSError(28, "No space left on device", "a/file")), "No space left.*a/file"),
        (raising(FloatingPointError("The loss of step 4 is nan")), "The loss of step 4 is nan"),
        (raising(ProcessZeroError("Process 0 can't go on")), "Process 0 can't go on"),
        (raising(MemoryError()), "memory is full: an allocation failed. Take a smaller batch"),
        (raising(jax.errors.JaxRuntimeError(FULL)), "memory is full: .*99 bytes. Take a smaller"),
        (failed_solve, "error: The solve stopped .*velocity"),
    ],
)
def test_kinds_of_errors_that_are_expected(capfd, main, said):
    code, got = end(capfd, main)
    assert code == 2
    assert re.search(said, one_line(got))


def of_a_library(config):
    np.zeros(3).reshape(2)


@pytest.mark.parametrize(
    ("main", "kind"),
    [
        (raising(TypeError("a bug")), TypeError),
        (raising(AssertionError("a bug")), AssertionError),
        (raising(KeyError("a bug")), KeyError),
        (raising(jax.errors.JaxRuntimeError("INTERNAL: a bug")), RuntimeError),
        (of_a_library, ValueError),
    ],
)
def test_an_error_in_the_code_is_raised(main, kind):
    with pytest.raises(kind):
        command.run(main, Config, name="some", doc=None, args=[])


def test_signals_keep_their_exit_codes(capsys):
    code, said = end(capsys, raising(KeyboardInterrupt()))
    assert code == 130 and len(said.strip().splitlines()) == 1 and "Interrupted" in said
    assert end(capsys, raising(SystemExit(143))) == (143, "")


class CutOff:
    """Ctrl-C comes before the attribute that its `__del__` reads."""

    def __init__(self, wrong=AttributeError):
        self.wrong = wrong
        raise KeyboardInterrupt

    def __del__(self):
        raise self.wrong("the object has no attribute '_thread'")


def test_what_ctrl_c_leaves_half_made_says_nothing(capsys):
    code, said = end(capsys, lambda config: CutOff())
    assert code == 130 and said.strip().splitlines() == [said.strip()] and "Interrupted" in said
    _, said = end(capsys, lambda config: CutOff(OSError))  # anything else is heard
    assert "OSError: the object" in said


class InACallback:
    def __del__(self):
        raise KeyboardInterrupt


def test_ctrl_c_in_a_callback_is_not_lost(capsys):
    def main(config):
        InACallback()
        time.sleep(10)
        raise AssertionError("Ctrl-C was lost")

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, said = end(capsys, main)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert code == 130 and said.strip().splitlines() == [said.strip()] and "Interrupted" in said


def refuse(config):
    command._refuse_repetitions(["--a", "--a"])


def test_traceback_is_a_flag_of_every_command_and_no_field_of_its_config(capsys):
    code, said = end(capsys, refuse, "--traceback")
    assert code == 2 and said.startswith("Traceback") and "in _refuse_repetitions" in said
    assert said.splitlines()[-1].startswith("ValueError: A flag is given once")
    code, said = end(capsys, print, "--traceback", "--flip", "--flip")  # found before the flags are
    assert code == 2 and "_refuse_repetitions" in said
    seen = []
    assert end(capsys, seen.append, "there", "--traceback", "--num-steps", "4") == (0, "")
    assert seen == [Config(pathlib.Path("there"), num_steps=4)] and type(seen[0]) is Config
    with pytest.raises(SystemExit) as ended:
        command.run(print, digits.Config, name="experiments.digits", doc="Doc.", args=["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and "--traceback" in text and "--model.channels" in text


@pytest.mark.slow
def test_in_a_process_of_its_own():
    """What JAX says where it detects no pod, for which it must not have started yet."""
    run = [sys.executable, "-m", "experiments.digits", "--cluster.join", "yes"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--cluster.coordinator HOST:PORT" in one_line(done.stderr)


def test_main_called_from_python_raises(tmp_path):
    with pytest.raises(ValueError, match="--model.features must be positive"):
        train(two_moons.Config(model=MLPConfig(features=(0,))), two_moons.make_task)
    config = two_moons.Config(workdir=tmp_path)
    with pytest.raises(TypeError, match="a bug"), Run("two_moons", config):
        raise TypeError("a bug")


def test_a_command_of_two_positional_values_names_both(capsys):
    for args in ([], ["runs/a"], ["runs/a", "b.safetensors", "c"]):
        code, said = end(
            capsys, export.main, *args, config=export.Config, name="experiments.export"
        )
        assert code == 2
        said = one_line(said)
        assert "one folder and one file: python -m experiments.export FOLDER FILE" in said
