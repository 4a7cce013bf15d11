"""Drawing from a finished run and exporting it: what sample k is, going on, what is refused."""

import dataclasses
import functools
import json

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import untrained
from PIL import Image

import fmjax as fm
from experiments import digits, two_moons
from fmjax import models, weights
from fmjax.data import pixels
from fmjax.evaluation import export, sample
from fmjax.harness import keys, store
from fmjax.harness.read import read
from fmjax.tasks.images import UNetConfig
from fmjax.tasks.points import MLPConfig

pytestmark = pytest.mark.slow  # all draw from runs
UNET = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A conditional run of digits, a plain one and one of two moons."""
    folder = tmp_path_factory.mktemp("runs")
    config = digits.Config(workdir=folder / "known", model=UNET, conditional=True, guidance=1.0)
    untrained(config, digits.make_task)
    plain = dataclasses.replace(config, workdir=folder / "plain", conditional=False)
    untrained(plain, digits.make_task)
    moons = two_moons.Config(workdir=folder / "moons", model=MLPConfig(features=(8,)))
    untrained(moons, two_moons.make_task)
    return folder


def drawn(run, tmp_path, name, **flags):
    flags = {"num": 20, "batch_size": 8, "solver": "Heun", "num_steps": 4, "format": "npz"} | flags
    out = sample.main(sample.Config(run, out=tmp_path / f"{name}.npz", **flags))
    with np.load(out) as arrays:
        return dict(arrays)


def test_sample_k_is_of_the_seed_and_k_alone(runs, tmp_path):
    """Equal steps: equal pixels for any batch size and number, and as computed by hand."""
    first = drawn(runs / "known", tmp_path, "a", guidance=3.0, labels=(3, 7), seed=5)
    np.testing.assert_array_equal(first["labels"], np.array([3, 7])[np.arange(20) % 2])
    for k, flags in enumerate(({"batch_size": 16}, {"num": 9}, {"num": 8, "batch_size": 40})):
        flags = {"guidance": 3.0, "labels": (3, 7), "seed": 5} | flags
        other = drawn(runs / "known", tmp_path, f"b{k}", **flags)
        num = len(other["images"])
        near = np.abs(other["images"].astype(int) - first["images"][:num]) == 0
        assert near.mean() > 0.999  # rounding crosses a level once in a while

    model = read(runs / "known")
    network = models.UNet(**dataclasses.asdict(UNET), num_classes=10)
    noise = [jax.random.fold_in(keys.key(5, "drawn"), k) for k in range(20)]
    x0 = jnp.stack([jax.random.normal(key, (8, 8, 1)) for key in noise])
    apply = functools.partial(network.apply, model.params)
    guided = fm.classifier_free_guidance(
        lambda t, x: apply(t, x, jnp.array([3, 7] * 10)), lambda t, x: apply(t, x), 3.0
    )
    x1 = jax.jit(lambda x0: fm.sample(guided, x0, solver=diffrax.Heun(), num_steps=4))(x0)
    assert (np.asarray(pixels.quantize(x1, 17)) == first["images"]).mean() > 0.999
    another = drawn(runs / "known", tmp_path, "c", guidance=3.0, labels=(3, 7), seed=6)
    assert (another["images"] == first["images"]).mean() < 0.9


def test_a_stored_batch_serves_a_larger_number(runs, tmp_path):
    """The rows past the first command's number are of the classes that the second asks for."""
    flags = {"labels": (3, 7), "seed": 11}
    drawn(runs / "known", tmp_path, "few", num=9, **flags)
    many = drawn(runs / "known", tmp_path, "many", num=20, **flags)
    fresh = drawn(runs / "known", tmp_path, "fresh", num=20, batch_size=24, **flags)
    np.testing.assert_array_equal(many["labels"], fresh["labels"])
    assert (many["images"] == fresh["images"]).mean() > 0.999


def test_points_are_drawn_too(runs, tmp_path):
    """As arrays and as a picture, from the noise of the same keys."""
    x = drawn(runs / "moons", tmp_path, "a", seed=3)["x"]
    noise = [jax.random.fold_in(keys.key(3, "drawn"), k) for k in range(20)]
    x0 = jnp.stack([jax.random.normal(key, (2,)) for key in noise])
    apply = functools.partial(models.MLP(features=(8,)).apply, read(runs / "moons").params)
    want = jax.jit(lambda x0: fm.sample(apply, x0, solver=diffrax.Heun(), num_steps=4))(x0)
    np.testing.assert_allclose(x, want, atol=1e-5)
    picture = sample.main(sample.Config(runs / "moons", num=16, batch_size=8, num_steps=1))
    assert np.asarray(Image.open(picture)).std() > 1


def test_an_interrupted_command_goes_on(runs, tmp_path, monkeypatch):
    flags = {"num": 24, "seed": 9}
    whole = drawn(runs / "plain", tmp_path, "whole", **flags)
    assert "labels" not in whole
    folder = runs / "plain" / "drawn"
    (newest,) = [f for f in folder.glob("batches-*") if len(list(f.glob("batch_*.npz"))) == 3]
    (newest / "batch_000001.npz").unlink()
    before = store.num_computed(folder)
    again = drawn(runs / "plain", tmp_path, "again", **flags)
    assert store.num_computed(folder) == before + 1
    np.testing.assert_array_equal(again["images"], whole["images"])


def test_a_grid_and_single_pictures(runs):
    """By class in rows; bare pictures hold the pixels of the arrays."""
    grid = sample.main(sample.Config(runs / "known", num=30, batch_size=8, num_steps=1))
    assert grid.parent == runs / "known" / "drawn"
    assert Image.open(grid).size == (3 * 68 + 4, 10 * 68 + 4)
    config = sample.Config(runs / "known", num=5, batch_size=8, num_steps=1, format="png")
    bare = sample.main(config)
    assert sorted(p.name for p in bare.iterdir()) == [f"{k:06d}.png" for k in range(5)]
    assert Image.open(bare / "000003.png").size == (8, 8)
    with pytest.raises(ValueError, match="is there and stays as it is. Give --out another name"):
        sample.main(config)


@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("known", {"labels": (3, 10)}, r"--labels must be in 0..9, .*got 3 10"),
        ("known", {"labels": (-1,)}, "--labels must be zero or more"),
        ("plain", {"labels": (3,)}, "--labels needs a run with --conditional"),
        ("plain", {"guidance": 2.0}, "Guidance needs a run that was trained with conditions"),
        ("known", {"solver": "Euler", "num_steps": None}, "--solver Euler has no error estimate"),
        ("known", {"num": 0}, "--num must be positive"),
        ("moons", {"format": "png"}, "--format png needs samples that can be shown as pictures"),
        ("nowhere", {}, "which does not exist"),
    ],
)
def test_what_can_not_be_drawn(runs, tmp_path, run, flags, message):
    with pytest.raises(ValueError, match=message):
        drawn(runs / run, tmp_path, "a", **flags)
    with pytest.raises(ValueError, match="--out must end in .npz for --format npz"):
        sample.main(sample.Config(runs / "known", format="npz", out=tmp_path / "a.png"))


def test_a_run_as_one_file(runs, tmp_path):
    """The average of the last checkpoint and the flags, enough to build the network again."""
    for name, shape, classes in (("known", [8, 8, 1], 10), ("moons", [2], None)):
        file = tmp_path / f"{name}.safetensors"
        export.main(export.Config(runs / name, file))
        params, record = weights.load_safetensors(file)
        model = read(runs / name)
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True):
            np.testing.assert_array_equal(a, b)
        assert record["parameters_sha256"] == model.digest and record["step"] == 30
        assert record["data"]["event_shape"] == shape and record["num_classes"] == classes
        flags = json.loads((runs / name / "config.json").read_text())["config"]
        assert record["config"] == flags
    network = models.UNet(**dataclasses.asdict(UNET), num_classes=10)
    params, _ = weights.load_safetensors(tmp_path / "known.safetensors")
    assert np.isfinite(
        network.apply(params, 0.5, np.zeros((2, 8, 8, 1), np.float32), np.array([1, 10]))
    ).all()
    with pytest.raises(ValueError, match="known.safetensors is there and stays as it is"):
        export.main(export.Config(runs / "known", tmp_path / "known.safetensors"))
    last = tmp_path / "last.safetensors"
    export.main(export.Config(runs / "known", last, average=False))
    assert weights.load_safetensors(last)[1]["parameters"] == "last"
