"""Steps whose loss or gradient is not finite: named, written down, left out where flags say so."""

import dataclasses
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_runs import final_state
from PIL import Image

from fmjax import data, harness, plotting
from fmjax.harness import loop, step
from fmjax.harness.run import Run
from fmjax.harness.task import Task


@dataclasses.dataclass(frozen=True)
class Config(harness.RunConfig):
    batch_size: int = 64
    log_every: int = 1
    learning_rate: float = 2e-3
    clip_norm: float | None = None


def nan_loss(n):
    return n * jnp.nan


def nan_gradient(n):
    return n + jnp.sqrt(0 * n)  # the value is finite, the slope of sqrt at 0 times 0 is not


def train_until_broken(folder, broken, **settings):
    """Adam moves n by 1e-3 a step, so the fourth step is the first below -2.5e-3."""
    config = Config(workdir=folder, checkpoint_every=2, **({"num_steps": 10} | settings))
    tx = harness.optimizer(dataclasses.replace(config, learning_rate=1e-3))

    def loss(params, key, x):
        n = params["n"]
        return jax.lax.cond(n < -2.5e-3, broken, lambda n: n, n)[None] + 0 * x.sum(axis=1)

    init, take = harness.from_loss(lambda key, x: x, loss, tx, lambda key: {"n": jnp.zeros(())})
    x1 = np.arange(128.0, dtype=np.float32).reshape(64, 2)
    task = Task(64, lambda rows: x1[rows], init, take, lambda params, condition: None)
    with Run("nan", config) as run:
        state = run.restore(step.init_state(config, task.init, jax.random.key(0)))
        steps = step.jit_steps(config, task.step, state)
        return loop.train(run, task, state, steps, jax.random.key(0))


@pytest.mark.parametrize("broken", [nan_loss, nan_gradient])
@pytest.mark.parametrize("steps_per_dispatch", [1, 2])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path, broken, steps_per_dispatch):
    with pytest.raises(FloatingPointError, match="step 4 .*the last good one is step 2"):
        train_until_broken(tmp_path, broken, steps_per_dispatch=steps_per_dispatch)
    assert final_state(tmp_path)[0] == 2  # the good one; the fourth step's was not saved
    dump = np.load(tmp_path / "not_finite_step_00000004.npz", allow_pickle=False)
    batches = data.batches(64, 64, seed=0, start_step=3)
    np.testing.assert_array_equal(dump["rows"], next(batches))
    np.testing.assert_array_equal(dump["batch"][:, 0], 2.0 * dump["rows"])
    assert dump["step"] == 4 and dump["checkpoint"] == 2


@pytest.mark.slow
def test_up_to_n_such_steps_are_left_out(tmp_path):
    """From the fourth on every step is bad: n stays where three steps brought it."""
    state, _ = train_until_broken(tmp_path / "skips", nan_loss, num_steps=8, max_skipped_steps=5)
    np.testing.assert_allclose(state.params["n"], -3e-3, rtol=1e-3)
    assert int(state.step) == 8
    with pytest.raises(FloatingPointError, match="step 8 "):
        train_until_broken(tmp_path / "stops", nan_loss, num_steps=9, max_skipped_steps=4)
    # They count over restarts: five have been left out already.
    with pytest.raises(FloatingPointError, match="step 9 "):
        train_until_broken(tmp_path / "skips", nan_loss, num_steps=9, max_skipped_steps=5)


def test_an_infinite_loss_with_a_finite_gradient_is_left_out_too(tmp_path):
    def broken(n):
        return n + jnp.inf

    state, _ = train_until_broken(tmp_path, broken, num_steps=5, max_skipped_steps=2)
    np.testing.assert_allclose(state.params["n"], -3e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "entry", "kept"), [(1.0, 1e3, True), (np.inf, 1e3, False), (1.0, 1e25, False)]
)
def test_a_bad_loss_or_a_norm_that_overflows_spoils_the_gradient(value, entry, kept):
    """1e25 squared is no float32: Adam's second moment would stay infinite for good."""
    gradient = {"w": jnp.full(3, entry)}
    spoilt, _ = step._spoil().update(gradient, optax.EmptyState(), value=jnp.asarray(value))
    expected = gradient["w"] if kept else np.full(3, np.nan)
    np.testing.assert_array_equal(spoilt["w"], expected)


def test_a_signal_during_the_last_save_still_ends_the_run(tmp_path, monkeypatch):
    save = Run.save

    def told(run, state, *, wait=False):
        os.kill(os.getpid(), signal.SIGTERM)
        save(run, state, wait=wait)

    monkeypatch.setattr(Run, "save", told)
    with pytest.raises(SystemExit) as end:
        train_until_broken(tmp_path, lambda n: n, num_steps=1)
    assert end.value.code == 143 and final_state(tmp_path)[0] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_steps_that_were_left_out_are_null_and_not_drawn(tmp_path):
    train_until_broken(tmp_path, nan_loss, num_steps=8, max_skipped_steps=5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["loss"] is None for row in rows] == 3 * [False] + 5 * [True]
    plotting.save(tmp_path / "loss.png", plotting.loss_curve(rows))
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 1


def test_the_skipping_flag_can_not_change_on_the_way(tmp_path):
    train_until_broken(tmp_path, nan_loss, num_steps=2)
    with pytest.raises(ValueError, match="max_skipped_steps: folder has 0, got 3"):
        train_until_broken(tmp_path, nan_loss, num_steps=2, max_skipped_steps=3)
