"""What a run folder holds on the way: means over the log's window, previews, milestones."""

import contextlib
import io
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
import tiny
from made_runs import events, final_state, losses, params_at, rows
from PIL import Image

from fmjax import harness
from fmjax.harness import keys, start
from fmjax.harness.step import jit_held_out

STEPS = {"num_steps": 25, "checkpoint_every": 6}


def run(folder, **flags):
    return harness.train(tiny.Config(workdir=folder, **(STEPS | flags)), tiny.make_task)


def shown(folder):
    """The lines without what depends on the clock."""
    clocks = ("seconds", "examples_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows(folder)]


@contextlib.contextmanager
def before_batch(number, act):
    """Something happens before the batch of this number, counted from 0, is read."""
    tiny.BEFORE.append(lambda done: act() if done == number else None)
    try:
        yield
    finally:
        tiny.BEFORE.clear()


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise RuntimeError("the disk of the data is gone")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody interrupts, with a line every 10 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


def test_losses_are_means_over_the_steps_since_the_line_before(tmp_path, whole):
    run(tmp_path / "every", log_every=1)
    every = rows(tmp_path / "every")
    assert [row["step"] for row in rows(whole)] == [10, 20, 25]
    for name in ("loss", "gradient_norm"):
        single = [row[name] for row in every]
        means = [np.mean(single[a:b]) for a, b in ((0, 10), (10, 20), (20, 25))]
        np.testing.assert_allclose([row[name] for row in rows(whole)], means, rtol=1e-12)
    assert len(set(losses(tmp_path / "every"))) == 25
    for row in (rows(whole)[0], every[0]):
        assert row.keys() == {
            "step", "loss", "gradient_norm", "learning_rate", "examples_per_second", "seconds"
        }  # fmt: skip
        assert row["examples_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("steps_per_dispatch", [1, 3])
def test_a_run_that_was_stopped_anywhere_has_the_lines_of_one_that_never_was(
    tmp_path, whole, steps_per_dispatch
):
    """SIGTERM at step 7, a crash at 17, from which step 12 is the last checkpoint."""
    flags = {"steps_per_dispatch": steps_per_dispatch}
    folder, last = tmp_path / "run", {1: 7, 3: 9}[steps_per_dispatch]
    with pytest.raises(SystemExit) as end, before_batch((7 - 1) // steps_per_dispatch, sigterm):
        run(folder, **flags)
    assert end.value.code == 143 and final_state(folder)[0] == last
    kept = json.loads((folder / "window.json").read_text())
    assert len(kept[str(last)]) == last and rows(folder) == []
    with pytest.raises(RuntimeError), before_batch((17 - last - 1) // steps_per_dispatch, crash):
        run(folder, **flags)
    assert final_state(folder)[0] == 12
    run(folder, **flags)
    if steps_per_dispatch == 1:
        assert shown(folder) == shown(whole)
        jax.tree.map(np.testing.assert_array_equal, final_state(folder)[1], final_state(whole)[1])
    else:  # a scan of three steps rounds otherwise
        assert [row["step"] for row in rows(folder)] == [10, 20, 25]
        np.testing.assert_allclose(losses(folder), losses(whole), rtol=1e-5)
    assert len(json.loads((folder / "window.json").read_text())) <= 4


@pytest.mark.slow
def test_lines_after_the_checkpoint_that_a_run_resumes_from_are_dropped(tmp_path, whole):
    """Stopped at 22 with the last checkpoint at 18: the line of step 20 is written anew, once."""
    with pytest.raises(RuntimeError), before_batch(22, crash):
        run(tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [10, 20]
    run(tmp_path / "run")
    assert shown(tmp_path / "run") == shown(whole)


@pytest.mark.slow
def test_a_rate_that_nobody_knows_is_not_in_the_lines(tmp_path):
    """Plain SGD records none: no NaN, no null, and TensorBoard has no curve of it."""

    def make_task(config):
        init, step = harness.from_loss(
            tiny.draw, tiny.loss, optax.sgd(0.1), lambda key: tiny.init_params(2, key)
        )
        return tiny.make_task(config)._replace(init=init, step=step)

    harness.train(tiny.Config(workdir=tmp_path / "run"), make_task)
    assert all("learning_rate" not in row for row in rows(tmp_path / "run"))
    tags = {value.tag for event in events(tmp_path / "run") for value in event.summary.value}
    assert "train/loss" in tags and "train/learning_rate" not in tags


@pytest.mark.slow
def test_loggers_get_every_line_as_it_is_written(tmp_path):
    seen = []
    config = tiny.Config(workdir=tmp_path / "run", preview_every=8, **STEPS)
    harness.train(config, tiny.make_task, on_metrics=lambda step, row: seen.append((step, row)))
    written = [(row.pop("step"), row) for row in rows(tmp_path / "run")]
    assert [step for step, _ in seen] == [8, 10, 16, 20, 24, 25] == [step for step, _ in written]
    for (_, got), (_, row) in zip(seen, written, strict=True):
        assert got == {name: value for name, value in row.items() if name != "seconds"}


# Previews and held-out losses


@pytest.fixture(scope="module")
def previewed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("previewed") / "run"
    run(folder, checkpoint_every=8, keep_every=8, preview_every=8)
    return folder


def held_out_loss(params, seed=0):
    """By hand: the two whole batches of the 40 held-out points, drawn as in step 0."""
    found = []
    for k in range(2):
        batch = tiny.make_task(tiny.Config()).held_out(np.arange(16 * k, 16 * (k + 1)))
        key = jax.random.fold_in(jax.random.fold_in(keys.key(seed, "held out"), k), 0)
        key_draw, key_loss = jax.random.split(key)
        found.append(tiny.loss(params, key_loss, tiny.draw(key_draw, batch)).mean())
    return np.mean(found)


@pytest.mark.slow
def test_held_out_losses_are_those_of_the_parameters_at_that_step(previewed):
    found = {row["step"]: row["held_out_loss"] for row in rows(previewed) if "held_out_loss" in row}
    assert list(found) == [8, 16, 24, 25]  # the last step has one too
    for step, value in found.items():
        params = params_at(previewed, step, "params")
        np.testing.assert_allclose(value, held_out_loss(params), rtol=1e-5)
    summary = json.loads((previewed / "summary.json").read_text())
    assert summary["held_out_loss"] == found[25]


def test_fewer_held_out_examples_than_a_batch_come_by_turns():
    config = tiny.Config(num_devices=1)
    task = tiny.make_task(config)._replace(num_held_out=10)
    (numbers,) = start._held_out_rows(config, task)
    np.testing.assert_array_equal(numbers, np.arange(16) % 10)
    assert start._held_out_rows(config, task._replace(num_held_out=0)) == []
    many = start._held_out_rows(config, task._replace(num_held_out=1000))
    np.testing.assert_array_equal(np.concatenate(many), np.arange(4 * 16))  # four batches at most


def test_the_held_out_loss_does_not_depend_on_the_step_or_the_average():
    config = tiny.Config()
    task = tiny.make_task(config)
    state = harness.step.init_state(config, task.init, keys.key(0, "parameters"))
    loss = jit_held_out(config, task, state)
    batch, key = task.held_out(np.arange(16)), keys.key(0, "held out")
    first = float(loss(state, key, batch))
    later = state._replace(
        step=state.step + 7, ema_params=jax.tree.map(lambda x: x + 1, state.params)
    )
    assert float(loss(later, key, batch)) == first
    moved = state._replace(params=jax.tree.map(lambda x: x + 1, state.params))
    assert float(loss(moved, key, batch)) != first


def test_previews_leave_the_training_as_it_is_to_the_bit(previewed, whole):
    a, b = final_state(previewed)[1], final_state(whole)[1]
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not list((whole / "samples").glob("preview*"))


def test_a_preview_is_a_picture_of_the_average_in_samples_and_for_tensorboard(previewed):
    images = {
        event.step: value.image
        for event in events(previewed)
        for value in event.summary.value
        if value.tag == "preview"
    }
    assert list(images) == [8, 16, 24, 25]
    for step, image in images.items():
        want = tiny.picture(params_at(previewed, step, "ema_params"))
        file = previewed / "samples" / f"preview_{step:08d}.png"
        for shown in (Image.open(file), Image.open(io.BytesIO(image.encoded_image_string))):
            np.testing.assert_array_equal(np.asarray(shown.convert("RGB")), want)
        assert (image.height, image.width, image.colorspace) == (6, 5, 3)


def test_every_preview_gets_the_same_key_and_its_time_is_none_of_the_trainings(tmp_path):
    """So that pictures change by the parameters alone."""
    seen = []

    def make_task(config):
        def preview(trained, key):
            seen.append((trained.step, jax.random.key_data(key).tolist()))
            return tiny.picture(trained.params)

        return tiny.make_task(config)._replace(preview=preview, held_out=None)

    config = tiny.Config(workdir=tmp_path / "run", preview_every=8, seed=3, **STEPS)
    harness.train(config, make_task)
    key = jax.random.key_data(keys.key(3, "preview")).tolist()
    assert seen == [(step, key) for step in (8, 16, 24, 25)]
    assert all("held_out_loss" not in row for row in rows(tmp_path / "run"))


# Checkpoints


def steps_kept(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_milestones_stay_and_of_the_others_the_latest_three(tmp_path):
    run(tmp_path / "run", num_steps=48, checkpoint_every=4, keep_every=12)
    assert steps_kept(tmp_path / "run") == [12, 24, 36, 40, 44, 48]
    run(tmp_path / "plain", num_steps=24, checkpoint_every=4)
    assert steps_kept(tmp_path / "plain") == [16, 20, 24]
    # The flag may come later: what is there stays.
    run(tmp_path / "plain", num_steps=40, checkpoint_every=4, keep_every=20)
    assert steps_kept(tmp_path / "plain") == [20, 32, 36, 40]
