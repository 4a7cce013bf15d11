"""Conditional image runs: labels reach the network, are dropped one by one, and guide."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import digits, evaluate, export, images, plots, sample
from experiments.images import Images, UNetConfig
from fmjax import weights
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


def pictures(folder, num, *, channels=3):
    """Class folders of pictures, PNG and JPEG mixed."""
    rng = np.random.default_rng(0)
    for k in range(num):
        path = folder / ("cat", "dog")[k % 2] / f"{k:03d}.{('png', 'jpg')[k // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(10, 12, channels), dtype=np.uint8)).save(path)


@pytest.mark.slow
def test_pictures_of_ones_own_from_training_to_a_file(tmp_path):
    """Trained by class, drawn and exported without the pictures; resumed on the same alone."""
    pictures(tmp_path / "own", 40)
    run = config(
        dataset=f"folder:{tmp_path / 'own'}", image_size=8, workdir=tmp_path / "run", model=TINY,
        num_steps=2, batch_size=8, num_samples=4, eval_examples=2, eval_batch_size=2,
        sample_tolerance=1e-1, eval_tolerance=1e-1,
    )  # fmt: skip
    images.run_experiment("digits", run)
    pictures(tmp_path / "own", 42)
    with pytest.raises(ValueError, match="resume on its own data; .* differs in num_examples"):
        images.run_experiment("digits", dataclasses.replace(run, num_steps=4))
    (tmp_path / "own").rename(tmp_path / "away")
    out = sample.main(
        sample.Config(tmp_path / "run", num=8, batch_size=8, num_steps=2, labels=(1,))
    )
    assert out.is_file()
    export.main(export.Config(tmp_path / "run", tmp_path / "new" / "a.safetensors"))
    _, record = weights.load_safetensors(tmp_path / "new" / "a.safetensors")
    assert record["data"]["event_shape"] == [8, 8, 3] and record["num_classes"] == 2
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        evaluate.main(evaluate.Config(tmp_path / "run", batch_size=8))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("folder:", "--dataset folder: must name a folder; got none"),
        ("npz:", "--dataset npz: must name a file; got none"),
        ("FILE", "that is a file. Arrays in an .npz file are npz:"),
        ("FOLDER", "that is a folder. Write folder:"),
    ],
)
def test_data_sets_that_are_none(tmp_path, dataset, message):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    dataset = {"FILE": str(tmp_path / "a.npz"), "FOLDER": str(tmp_path)}.get(dataset, dataset)
    with pytest.raises(ValueError, match=message):
        images.load(config(dataset=dataset), "train")
    with pytest.raises(ValueError, match="--image-size is for --dataset folder:PATH"):
        images.load(config(dataset="mnist", image_size=8), "train")


def test_a_grid_by_class_has_a_row_for_each():
    """In the order in which they come, filled up with white; other channels side by side."""
    labels = np.array([7, 3, 7, 7, 0])
    values = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    sheet, columns = plots.by_class(values, labels, 17)
    assert columns == 3
    assert sheet.ravel().tolist() == [0, 2, 3, 1, 16, 16, 4, 16, 16]
