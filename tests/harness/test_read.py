"""A run read back: its task, its parameters, a velocity under conditions and guidance."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from made_runs import params_at

import fmjax as fm
from fmjax import harness
from fmjax.harness.read import read, restore_params
from fmjax.training import checkpoints

X = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
LABELS = np.arange(7) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    harness.train(tiny.Config(workdir=folder, num_steps=5), tiny.make_task)
    return folder


def by_hand(params, labels, t=0.3):
    """x W + b t + c of the class."""
    return X @ params["w"] + t * params["b"] + params["c"][labels]


@pytest.mark.parametrize("name", ["ema_params", "params"])
def test_a_loaded_velocity_is_the_one_by_hand(folder, name):
    params = params_at(folder, 5, name)
    loaded = harness.load(folder, LABELS, average=name == "ema_params")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    np.testing.assert_allclose(loaded.velocity(0.3, X), by_hand(params, LABELS), atol=1e-5)
    other = loaded.task.velocity(loaded.params, LABELS[::-1])
    np.testing.assert_allclose(other(0.3, X), by_hand(params, LABELS[::-1]), atol=1e-5)
    none = harness.load(str(folder), average=name == "ema_params").velocity(0.3, X)
    np.testing.assert_allclose(none, by_hand(params, np.full(7, 3)), atol=1e-5)


def test_a_guided_velocity_is_the_one_by_hand(folder):
    params = params_at(folder, 5, "ema_params")
    known, none = by_hand(params, LABELS), by_hand(params, np.full(7, 3))
    velocity = harness.load(folder, LABELS, guidance=2.0).velocity
    np.testing.assert_allclose(velocity(0.3, X), none + 2 * (known - none), atol=1e-5)
    assert np.abs(known - none).max() > 0.1


def test_a_checkpoint_that_makes_room_while_it_is_read_is_no_error(tmp_path, monkeypatch):
    """As in the folder of a run that is training; what fails again is raised."""
    folder = tmp_path / "run"
    harness.train(tiny.Config(workdir=folder, num_steps=6, checkpoint_every=2), tiny.make_task)
    example, restore, gone = params_at(folder, 6, "ema_params"), checkpoints.restore_params, []

    def pruned(*args, **kwargs):
        if not gone:
            gone.append(6)
            shutil.rmtree(folder / "checkpoints" / "6")
            raise FileNotFoundError("checkpoints/6")
        return restore(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "restore_params", pruned)
    assert restore_params(folder, example)[1] == 4
    with pytest.raises(ValueError, match="w"):
        restore_params(folder, {"w": example["w"]})


def test_guidance_without_a_condition_is_refused(folder):
    with pytest.raises(ValueError, match="condition"):
        harness.load(folder, guidance=2.0)


def test_a_loaded_run_can_be_sampled_from(folder):
    task, params, velocity = harness.load(folder, LABELS, guidance=2.0)
    x0 = task.samples.source.sample(jax.random.key(0), 7)
    x1 = jax.jit(lambda x0: fm.sample(velocity, x0, num_steps=200))(x0)
    matrix, shift = params["w"], params["b"]
    classes = params["c"][3] + 2 * (params["c"][LABELS] - params["c"][3])
    x = np.asarray(x0, np.float64)
    for t in (np.arange(4000) + 0.5) / 4000:  # the midpoint rule, by hand
        half = x + (x @ matrix + t * shift + classes) / 8000
        x = x + (half @ matrix + t * shift + classes) / 4000
    np.testing.assert_allclose(x1, x, atol=1e-2, rtol=1e-2)


def test_a_run_knows_where_it_is_today_and_what_its_data_were(folder, tmp_path):
    moved = folder.rename(tmp_path / "moved")
    try:
        trained = read(moved, guidance=2.0)
        assert trained.config.workdir == moved and trained.config.known == {"num_examples": 60}
        assert (trained.name, trained.step, trained.guidance) == ("tiny", 5, 2.0)
        assert dataclasses.replace(trained.config, workdir=None, known=None) == tiny.Config(
            num_steps=5
        )
    finally:
        moved.rename(folder)


def test_what_can_not_be_read(folder, tmp_path):
    record = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"make_task": "tiny:nothing"}, "names tiny:nothing as what made the run"),
        ({"make_task": "tiny:NUM"}, "must name a function; got tiny:NUM"),
        ({"config": record["config"] | {"more": 1}}, "lacks or adds 'more'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            harness.load(tmp_path)
    del record["make_task"]
    for text in ("", "[]", json.dumps(record)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="must be the JSON record of a run of this version"):
            harness.load(tmp_path)
    with pytest.raises(ValueError, match="must hold config.json; got .*nowhere, which does not"):
        harness.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must hold a checkpoint; got none"):
        restore_params(tmp_path, {})


def test_flags_that_a_run_did_not_know_have_their_defaults(folder, tmp_path):
    """A run of before a flag was there can be read; one of after it was dropped can't."""
    record = json.loads((folder / "config.json").read_text())
    del record["config"]["unrolled"], record["config"]["keep_every"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "checkpoints").symlink_to(folder / "checkpoints")
    trained = read(tmp_path)
    assert trained.config.unrolled is None and trained.config.keep_every is None
    assert jnp.isfinite(trained.params["w"]).all()
