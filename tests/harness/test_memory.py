"""A device whose memory is full: one line, with what other flags would need."""

import dataclasses
import re
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import pytest
import tiny
from commands import end, one_line

from fmjax import harness
from fmjax.harness import memory, step

FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nAnd a second line."


@dataclasses.dataclass(frozen=True)
class Config(tiny.Config):
    batch_size: int = 32
    remat: bool = False
    precision: str = "float32"


def full(*args):
    raise jax.errors.JaxRuntimeError(FULL)


def told(capsys, folder, *flags, make_task=tiny.make_task, config=Config):
    """The line of a run whose first step does not fit."""

    def main(config):
        harness.train(config, make_task)

    code, said = end(capsys, main, "--workdir", str(folder), *flags, config=config)
    assert code == 2 and not folder.exists()
    return one_line(said.rpartition("step/s]\n")[2])  # after the progress bar


@pytest.mark.slow
@pytest.mark.parametrize("place", ["init_state", "jit_steps"])
def test_the_line_says_what_two_other_flags_would_need(tmp_path, capsys, monkeypatch, place):
    monkeypatch.setattr(step, place, full if place == "init_state" else lambda *args: full)
    said = told(capsys, tmp_path / "run")
    assert re.search(
        "error: A step must fit into a device's memory; got --batch-size 32 in 1 part on 8 x cpu: "
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes. --remat would need "
        r"[\d.e-]+ GiB on each, --accumulate 4 would need [\d.e-]+ GiB on each; --fsdp 8, "
        "--precision bfloat16 also lower the need; a smaller --batch-size fits too.",
        said,
    )


def test_the_line_comes_when_nothing_could_be_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "jit_steps", lambda *args: full)
    monkeypatch.setattr(memory, "needed", full)
    said = told(capsys, tmp_path / "run", "--num-devices", "1")
    want = "--remat, --accumulate 4, --precision bfloat16 lower the need; a smaller"
    assert f"99 bytes. {want}" in said


@pytest.mark.slow
def test_the_line_comes_in_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step, "jit_steps", lambda *args: full)
    monkeypatch.setattr(memory, "SECONDS", 0.2)
    monkeypatch.setattr(memory, "needed", lambda *args: time.sleep(60))
    monkeypatch.setattr(memory.atexit, "register", lambda *args: None)  # of these tests' process
    began = time.monotonic()
    assert "--remat" in told(capsys, tmp_path / "run") and time.monotonic() - began < 30


def test_other_errors_of_the_device_are_as_they_were(tmp_path, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(step, "jit_steps", lambda *args: broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        harness.train(Config(workdir=tmp_path / "run"), tiny.make_task)


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (dict(num_devices=1), ["--accumulate 4"]),
        (dict(num_devices=1, accumulate=4), ["--accumulate 16"]),
        (dict(num_devices=1, accumulate=16), ["--accumulate 32"]),
        (dict(num_devices=1, batch_size=6), ["--accumulate 6"]),
        (dict(num_devices=1, accumulate=32), []),
        (dict(num_devices=2), ["--accumulate 4", "--fsdp 2"]),
        (dict(num_devices=8, fsdp=8), ["--accumulate 4"]),
    ],
)
def test_alternatives_are_what_a_task_has_flags_for(flags, want):
    config = tiny.Config(**{"batch_size": 32} | flags)
    task = tiny.make_task(config)
    assert list(memory.alternatives(config, task)) == want
    own = task._replace(step=lambda *args: task.step(*args))
    assert list(memory.alternatives(config, own)) == [w for w in want if "accumulate" not in w]
    config = Config(**{"batch_size": 32, "remat": True, "precision": "bfloat16"} | flags)
    assert list(memory.alternatives(config, task)) == want
    config = dataclasses.replace(config, remat=False, precision="float32")
    found = memory.alternatives(config, task)
    assert list(found) == ["--remat", *want, "--precision bfloat16"]
    assert found["--remat"] == dataclasses.replace(config, remat=True)


def too_large(config):
    """A task whose loss takes 2^47 bytes for each example."""

    def loss(params, key, drawn):
        x = jnp.sum(drawn.x1, axis=-1) + params
        wide = jnp.sin(x[:, None] * jnp.arange(2.0**13)[None])[:, :, None] * jnp.ones((1, 1, 2**32))
        return x + 0 * jax.lax.stop_gradient(jnp.sort(wide, axis=1)[:, 0, 0])

    init, take = harness.from_loss(
        lambda key, batch: batch, loss, harness.optimizer(config), lambda key: jnp.zeros(())
    )
    return tiny.make_task(config)._replace(init=init, step=take)


@pytest.mark.slow
def test_a_device_that_is_really_full(tmp_path, capsys):
    flags = ("--num-devices", "1", "--batch-size", "8")
    said = told(capsys, tmp_path / "run", *flags, make_task=too_large, config=tiny.Config)
    config = tiny.Config(num_devices=1, batch_size=8)
    one = memory.needed(config, too_large(config)) / 2**30
    assert float(re.search(r"--accumulate 4 would need ([\d.e+]+) GiB", said)[1]) < 0.5 * one


@pytest.mark.slow
def test_needed_holds_the_state_besides_what_is_between():
    """Parameters, average and two moments of a wide linear velocity, and a gradient or two."""
    config = tiny.Config(num_devices=1, batch_size=8, dim=256)
    state = 4 * 4 * (256 * 256 + 5 * 256)
    assert 1.2 * state < memory.needed(config, tiny.make_task(config)) < 2 * state


@pytest.mark.slow
def test_a_process_ends_while_xla_compiles():
    """XLA would abort it, with another exit code."""
    code = """
        import sys, threading, time, jax, jax.numpy as jnp
        from fmjax.harness import memory
        def endless(x):
            for k in range(4000):
                x = x + 1e-9 * jnp.sin(x[:, None] * jnp.arange(8.0 + k % 50)).sum(1)
            return x
        lowered = jax.jit(endless).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
        memory.needed = lambda *args: lowered.compile()
        memory.alternatives = lambda *args: {"--remat": None}
        memory.SECONDS = 2.0
        print(memory._advice(None, lambda config: None))
        sys.exit(2)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == "--remat lowers the need; a smaller --batch-size fits too.\n"
