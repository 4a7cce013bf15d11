"""Conditional image runs: labels reach the network, are dropped one by one, and guide."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import digits, images
from experiments.images import Images, UNetConfig
from fmjax.harness import loop

KEY = jax.random.key(0)
TINY = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)


def config(**flags):
    return digits.Config(**({"workdir": "unused", "conditional": True} | flags))


def test_rows_and_their_labels_stay_together():
    dataset = images.load(config(), "train")
    rows = np.array([[7, 3, 1400], [0, 9, 7]])
    batches = loop.gather(images.make_batch(config(), dataset), rows)
    np.testing.assert_array_equal(batches.images, dataset.images[rows])
    np.testing.assert_array_equal(batches.labels, dataset.labels[rows])
    assert loop.gather(images.make_batch(config(conditional=False), dataset), rows).labels is None


@pytest.mark.parametrize(
    "batch", [lambda rows: np.zeros(5), lambda rows: {}, lambda rows: (np.zeros((6, 1)), 1.0)]
)
def test_a_batch_of_another_number_of_examples_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch must return arrays \[num, ...\] of the 6 rows"):
        loop.gather(batch, np.zeros((2, 3), int))


def test_labels_change_nothing_else_that_is_drawn():
    """The same noise, times and pixels; a tenth of the labels is the null class, 10."""
    dataset = images.load(config(), "train[:1000]")
    draw = {known: images.make_draw(config(conditional=known), 17, 10) for known in (True, False)}
    plain, none = draw[False](KEY, Images(dataset.images, None))
    sample, labels = draw[True](KEY, Images(dataset.images, dataset.labels))
    for a, b in zip(sample, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    dropped = np.asarray(labels != dataset.labels)
    assert none is None and (np.asarray(labels)[dropped] == 10).all()
    assert abs(dropped.mean() - 0.1) < 5 * (0.09 / 1000) ** 0.5


def test_the_velocity_of_labels_and_of_guidance():
    model = images.make_model(config(model=TINY), 10)
    x, labels, t = jax.random.normal(KEY, (3, 8, 8, 1)), jnp.array([1, 4, 9]), jnp.asarray(0.3)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), model.init(KEY, t, x)
    )
    plain = images.make_velocity(model, params)(t, x)
    known = images.make_velocity(model, params, labels)(t, x)
    np.testing.assert_allclose(plain, model.apply(params, t, x, jnp.full(3, 10)), atol=1e-5)
    np.testing.assert_allclose(known, model.apply(params, t, x, labels), atol=1e-5)
    assert np.abs(known - plain).max() > 1e-2
    guided = images.make_velocity(model, params, labels, 3.0)(t, x)
    np.testing.assert_allclose(guided, plain + 3 * (known - plain), atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditional": False, "guidance": 2.0}, "got 2.0 without --conditional"),
        ({"label_dropout": 0.0, "guidance": 2.0}, "and --label-dropout 0"),
        ({"label_dropout": 1.5}, r"--label-dropout must be in \[0, 1\]; got 1.5"),
        ({"label_dropout": float("nan")}, r"--label-dropout must be in \[0, 1\]; got nan"),
        ({"guidance": -1.0}, "--guidance must be zero or more; got -1.0"),
    ],
)
def test_flags_that_can_not_work(flags, message):
    with pytest.raises(ValueError, match=message):
        images.run_experiment("digits", config(**flags))


@pytest.mark.slow
def test_a_run_from_start_to_end(tmp_path):
    """Its picture has a row for each class; resumed it is the run that nobody interrupted."""
    small = config(
        model=TINY, num_steps=4, checkpoint_every=2, batch_size=32, num_samples=30, guidance=2.0,
        eval_examples=40, eval_batch_size=20, sample_tolerance=1e-1, eval_tolerance=1e-1,
    )  # fmt: skip
    whole = images.run_experiment("digits", dataclasses.replace(small, workdir=tmp_path / "whole"))
    parts = dataclasses.replace(small, workdir=tmp_path / "parts")
    images.run_experiment("digits", dataclasses.replace(parts, num_steps=2))
    resumed = images.run_experiment("digits", parts)
    names = ("bits_per_dim", "loss", "num_evaluations")
    assert [whole[name] for name in names] == [resumed[name] for name in names]
    assert "guidance 2" in whole["sampler"]
    assert "given their classes" in whole["bits_per_dim_method"]
    picture = Image.open(tmp_path / "whole" / whole["samples"])
    assert picture.size == (3 * 68 + 4, 10 * 68 + 4)  # 8 pixels eight times as large, gaps of 4
    flags = json.loads((tmp_path / "whole" / "config.json").read_text())["config"]
    assert flags["conditional"] and flags["label_dropout"] == 0.1
