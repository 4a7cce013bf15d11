"""Conditional image runs: labels reach the network, are dropped one by one, and guide."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import parts
from PIL import Image

from experiments import digits
from fmjax import weights
from fmjax.evaluation import evaluate, export, sample
from fmjax.harness import loop, train
from fmjax.harness.task import guided
from fmjax.tasks import image_data, image_figures, images
from fmjax.tasks.image_data import Images, Pictures
from fmjax.tasks.images import UNetConfig

KEY = jax.random.key(0)
TINY = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)


def config(**flags):
    return digits.Config(**({"workdir": "unused", "conditional": True, "guidance": 1.0} | flags))


def test_rows_and_their_labels_stay_together():
    pictures, rows = Pictures(config()), np.array([[7, 3, 1400], [0, 9, 7]])
    dataset = image_data.load(config(), "train")
    batches = loop.gather(pictures.batch, rows)
    np.testing.assert_array_equal(batches.images, dataset.images[rows])
    np.testing.assert_array_equal(batches.labels, dataset.labels[rows])
    held_out = image_data.load(config(), "test")
    of_others = loop.gather(pictures.held_out_batch, rows % 100)
    np.testing.assert_array_equal(of_others.images, held_out.images[rows % 100])
    assert loop.gather(Pictures(config(conditional=False)).batch, rows).labels is None


@pytest.mark.parametrize(
    "batch", [lambda rows: np.zeros(5), lambda rows: {}, lambda rows: (np.zeros((6, 1)), 1.0)]
)
def test_a_batch_of_another_number_of_examples_is_refused(batch):
    with pytest.raises(ValueError, match=r"batch must return arrays \[num, ...\] of the 6 rows"):
        loop.gather(batch, np.zeros((2, 3), int))


@pytest.mark.slow
def test_labels_change_nothing_else_that_is_drawn():
    """The same noise, times and pixels; a tenth of the labels is the null class, 10."""
    dataset = image_data.load(config(), "train[:1000]")
    draw = {known: parts(digits, config(conditional=known))[0] for known in (True, False)}
    plain, none = draw[False](KEY, Images(dataset.images, None))
    sample, labels = draw[True](KEY, Images(dataset.images, dataset.labels))
    for a, b in zip(sample, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    dropped = np.asarray(labels != dataset.labels)
    assert none is None and (np.asarray(labels)[dropped] == 10).all()
    assert abs(dropped.mean() - 0.1) < 5 * (0.09 / 1000) ** 0.5


@pytest.mark.slow
def test_the_velocity_of_labels_and_of_guidance():
    model = images.make_network(config(model=TINY), 10)
    x, labels, t = jax.random.normal(KEY, (3, 8, 8, 1)), jnp.array([1, 4, 9]), jnp.asarray(0.3)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(KEY, leaf.shape), model.init(KEY, t, x)
    )
    velocity_of = functools.partial(images.velocity_of, model)
    plain = velocity_of(params)(t, x)
    known = velocity_of(params, labels)(t, x)
    np.testing.assert_allclose(plain, model.apply(params, t, x, jnp.full(3, 10)), atol=1e-5)
    np.testing.assert_allclose(known, model.apply(params, t, x, labels), atol=1e-5)
    assert np.abs(known - plain).max() > 1e-2
    want = plain + 3 * (known - plain)
    task = digits.make_task(config(model=TINY))  # the same network, behind the task
    np.testing.assert_allclose(guided(task, params, labels, 3.0)(t, x), want, atol=1e-4)
    np.testing.assert_allclose(guided(task, params, labels, 1.0)(t, x), known, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"conditional": False, "guidance": 2.0}, "got 2.0 without --conditional"),
        ({"label_dropout": 0.0, "guidance": 2.0}, "and --label-dropout 0"),
        ({"label_dropout": 1.5}, r"--label-dropout must be in \[0, 1\]; got 1.5"),
        ({"label_dropout": float("nan")}, "--label-dropout must be zero or more; got nan"),
        ({"guidance": -1.0}, "--guidance must be zero or more; got -1.0"),
    ],
)
def test_flags_that_can_not_work(flags, message):
    with pytest.raises(ValueError, match=message):
        train(config(**flags), digits.make_task)


@pytest.mark.slow
def test_a_run_from_start_to_end(tmp_path):
    """Its picture has a row for each class, real images on the left; resumed it is the run that
    nobody interrupted."""
    small = config(
        model=TINY, num_steps=4, checkpoint_every=2, batch_size=32, num_samples=30, guidance=2.0,
        log_every=1, eval_examples=40, eval_batch_size=20, sample_tolerance=1e-1,
        eval_tolerance=1e-1,
    )  # fmt: skip
    whole = train(dataclasses.replace(small, workdir=tmp_path / "whole"), digits.make_task)
    halves = dataclasses.replace(small, workdir=tmp_path / "halves")
    train(dataclasses.replace(halves, num_steps=2), digits.make_task)
    resumed = train(halves, digits.make_task)
    names = ("bits_per_dim", "loss", "num_evaluations")
    assert [whole[name] for name in names] == [resumed[name] for name in names]
    assert "guidance 2" in whole["sampler"]
    assert "given their classes" in whole["bits_per_dim_method"]
    picture = Image.open(tmp_path / "whole" / whole["samples"])
    side = 3 * 68 + 4  # 8 pixels eight times as large, gaps of 4
    assert picture.size == (side + 32 + side, 10 * 68 + 4)
    real = image_data.load(small, "train")
    first = real.images[np.flatnonzero(real.labels == 7)[0]]  # of the eighth row
    shown = np.asarray(picture.convert("RGB"))[7 * 68 + 4 : 8 * 68 : 8, 4:68:8, 0]
    np.testing.assert_array_equal(shown, np.round(first[..., 0] * (255 / 16)))
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
    train(run, digits.make_task)
    evaluation = evaluate.Config(tmp_path / "run", batch_size=8)
    pictures(tmp_path / "own", 42)
    with pytest.raises(ValueError, match="resume on its own data; .* differs in num_examples"):
        train(dataclasses.replace(run, num_steps=4), digits.make_task)
    with pytest.raises(ValueError, match="data must be those .* trained on; .* in num_examples"):
        evaluate.main(evaluation)
    (tmp_path / "own").rename(tmp_path / "away")
    out = sample.main(
        sample.Config(tmp_path / "run", num=8, batch_size=8, num_steps=2, labels=(1,))
    )
    assert out.is_file()
    export.main(export.Config(tmp_path / "run", tmp_path / "new" / "a.safetensors"))
    _, record = weights.load_safetensors(tmp_path / "new" / "a.safetensors")
    assert record["data"]["event_shape"] == [8, 8, 3] and record["num_classes"] == 2
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        evaluate.main(evaluation)


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
        image_data.load(config(dataset=dataset), "train")
    with pytest.raises(ValueError, match="--image-size is for --dataset folder:PATH"):
        image_data.load(config(dataset="mnist", image_size=8), "train")


@pytest.mark.parametrize(
    ("flags", "scale"),
    [
        ({"guidance": None}, 2.0),
        ({"guidance": 0.0}, 0.0),  # of no class at all
        ({"guidance": 1.5}, 1.5),
        ({"label_dropout": 0.0, "guidance": None}, 1.0),
        ({"conditional": False, "guidance": None}, 1.0),
    ],
)
def test_samples_are_guided_where_guidance_was_learnt(flags, scale):
    images.check_conditions(config(**flags))
    assert image_figures.guidance_of(config(**flags)) == scale


def test_one_class_is_no_condition(tmp_path):
    file = tmp_path / "plain.npz"
    np.savez(file, images=np.zeros((20, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="several classes; .* has 1. Give --no-conditional"):
        images.open_images(config(dataset=f"npz:{file}"))
