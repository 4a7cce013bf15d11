"""--accumulate: a step's batch in parts, the same draws and the same run."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from commands import end, one_line
from made_runs import final_state, losses

import fmjax as fm
from experiments import two_moons
from fmjax import harness
from fmjax.harness import step
from fmjax.harness.read import read
from fmjax.tasks.points import MLPConfig
from fmjax.training import sharding

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 300  # far more than it takes
KEY = jax.random.key(5)
MOONS = functools.partial(
    two_moons.Config,
    batch_size=64,
    log_every=1,
    num_samples=0,
    eval_examples=0,
    preview_every=0,
    steps_per_dispatch=1,
    num_steps=20,
    model=MLPConfig(features=(32,)),
    coupling="minibatch_ot",
)


def paired(key, x1):
    """Pairs over the whole batch, which parts would pair otherwise."""
    key_x0, key_pair = jax.random.split(key)
    x0 = fm.minibatch_ot(key_pair, jax.random.normal(key_x0, x1.shape), x1)
    return x0, x1


def apart(params, key, drawn):
    x0, x1 = drawn
    return jnp.sum((x1 - x0 - params[None]) ** 2 * jnp.sum(x0 * x1, -1, keepdims=True), -1)


@pytest.mark.slow
@pytest.mark.parametrize("num_parts", [2, 8])
def test_what_is_drawn_is_drawn_over_the_whole_batch(num_parts):
    """Descent by the mean of 2 (p - x1 + x0) <x0, x1> over the pairs of the step's own key."""
    init, take = harness.from_loss(paired, apart, optax.sgd(1.0), lambda key: jnp.zeros(2))
    x1 = tiny.points()[:16]
    mesh = sharding.make_mesh(jax.devices()[:1])
    state, metrics = jax.jit(take.in_parts(num_parts, mesh))(init(KEY), KEY, x1)
    key_draw, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    x0, _ = paired(key_draw, x1)
    weight = np.sum(x0 * x1, -1, keepdims=True)
    np.testing.assert_allclose(state.params, np.mean(2 * (x1 - x0) * weight, 0), rtol=1e-5)
    np.testing.assert_allclose(metrics.loss, np.mean(np.sum((x1 - x0) ** 2 * weight, -1)), 1e-5)


def trained(folder, **flags):
    harness.train(MOONS(workdir=folder, **flags), two_moons.make_task)
    return np.array(losses(folder)), final_state(folder)[1]


def assert_same_run(one, other):
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)  # other sums, over 20 steps
    assert np.std(other[0]) > 1e-2
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_parts_make_the_same_run_on_any_devices(tmp_path, capsys):
    want = trained(tmp_path / "one", num_devices=1)
    for number, flags in enumerate(
        [
            dict(accumulate=4, num_devices=1),
            dict(accumulate=8, fsdp=8),
            dict(accumulate=4, fsdp=2, steps_per_dispatch=5),
        ]
    ):
        assert_same_run(trained(tmp_path / str(number), **flags), want)
    assert "batch 64 in 8 parts, 20 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumes_in_other_parts(tmp_path):
    want = trained(tmp_path / "one")
    trained(tmp_path / "two", accumulate=8, num_steps=10)
    assert_same_run(trained(tmp_path / "two", accumulate=2), want)


def start_pod(folder, *flags):
    """Two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tiny", "--workdir", str(folder), *flags]
    command += ["--cluster.coordinator", address, "--cluster.num-processes", "2"]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": path}
    return [
        subprocess.Popen(
            [*command, "--cluster.process-id", str(i)],
            cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_take_the_parts_that_one_takes(tmp_path):
    """With a key for each part, which the loss draws from: the same rows are in the same part."""
    flags = dict(batch_size=48, accumulate=3, num_steps=15, log_every=1)
    words = [w for name, n in flags.items() for w in (f"--{name.replace('_', '-')}", str(n))]
    for process in start_pod(tmp_path / "pod", *words, "--fsdp", "8"):
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
    harness.train(tiny.Config(workdir=tmp_path / "one", num_devices=1, **flags), tiny.make_task)
    runs = [
        (np.array(losses(path)), read(path, average=False).params)
        for path in (tmp_path / "pod", tmp_path / "one")
    ]
    assert_same_run(*runs)
    flags = flags | {"accumulate": 1}
    harness.train(tiny.Config(workdir=tmp_path / "none", num_devices=1, **flags), tiny.make_task)
    assert np.max(np.abs(losses(tmp_path / "none") - runs[0][0])) > 1e-3  # other noise


@pytest.mark.slow
def test_held_out_losses_are_those_of_the_whole_batch():
    config = tiny.Config(batch_size=32, accumulate=2)
    task = tiny.make_task(config)
    init, take = harness.from_loss(
        tiny.draw,
        lambda params, key, drawn: fm.cfm_loss(tiny.velocity(params, drawn[1]), drawn[0]),
        harness.optimizer(config),
        lambda key: tiny.init_params(2, key),
    )
    task, batch = task._replace(init=init, step=take), task.batch(np.arange(32))
    state = step.init_state(config, init, KEY)
    want, got = (
        step.jit_held_out(config, t, state)(state, KEY, batch)
        for t in (task, step.in_parts(config, task))
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_batch_that_can_not_be_divided_is_refused_before_all_else(capsys, tmp_path):
    def main(config):
        harness.train(config, lambda config: pytest.fail("too late"))

    args = ["--workdir", str(tmp_path / "run"), "--batch-size", "40", "--accumulate", "3"]
    code, said = end(capsys, main, *args, config=tiny.Config)
    assert code == 2 and not (tmp_path / "run").exists()
    assert "for 3 parts on 8 devices. Take 24 or 48." in one_line(said)
    args = ["--workdir", str(tmp_path / "run"), "--accumulate", "0"]
    code, said = end(capsys, main, *args, config=tiny.Config)
    assert code == 2 and "--accumulate must be positive; got 0." in one_line(said)


def test_a_task_with_a_step_of_its_own_can_not_be_divided(capsys, tmp_path):
    def main(config):
        task = tiny.make_task(config)
        harness.train(config, lambda config: task._replace(step=lambda *args: task.step(*args)))

    args = ["--workdir", str(tmp_path / "run"), "--accumulate", "2"]
    code, said = end(capsys, main, *args, config=tiny.Config)
    assert code == 2 and not (tmp_path / "run").exists()
    assert "harness.from_loss makes; this one has a step of its own" in said.splitlines()[-1]
