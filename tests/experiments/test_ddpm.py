"""DDPM on the digits: its loss, its velocity, its samplers by hand, and a table from tiny runs."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import parts, untrained
from oracles import jit, x64  # noqa: F401

import fmjax as fm
from experiments import ddpm, digits
from experiments.benchmarks import ddpm as beside
from experiments.benchmarks import ddpm_report
from fmjax import data
from fmjax.data import pixels
from fmjax.evaluation import judging
from fmjax.evaluation import sample as drawing
from fmjax.evaluation.classifier import Classifier, network, to_bytes
from fmjax.files import hash_bytes
from fmjax.harness import train
from fmjax.tasks.image_data import Images
from fmjax.tasks.images import UNetConfig

MEAN, STD = 2.0, 0.5
TINY = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)


def best_noise(params, t, x, labels=None):
    """What the best network predicts along `vp` for data N(2 + label, 0.5^2)."""
    mean = MEAN if labels is None else MEAN + labels.astype(x.dtype)[:, None]
    alpha, sigma = ddpm.PATH.alpha(t), ddpm.PATH.sigma(t)
    return sigma * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)


velocity_of = functools.partial(ddpm.velocity_of, types.SimpleNamespace(apply=best_noise))


@pytest.mark.parametrize("labels", [None, np.array([0, 3, -1])])
@pytest.mark.usefixtures("x64")
def test_the_velocity_is_that_of_the_flow_to_a_gaussian(labels):
    """From where `vp` begins, alpha / sigma = 0.0066, to the data, where DDPM's own is infinite."""
    x = jnp.array([[-1.0], [0.5], [3.0]])
    mean = MEAN if labels is None else MEAN + labels[:, None]
    velocity = jit(velocity_of({}, labels))
    for t in (0.007, 0.3, 0.9, 1.0):
        slope = (t * STD**2 - (1 - t)) / (t**2 * STD**2 + (1 - t) ** 2)
        exact = mean + slope * (x - t * mean)
        np.testing.assert_allclose(velocity(jnp.array(t), x), exact, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ddim_is_its_update_by_hand():
    x0 = jax.random.normal(jax.random.key(0), (5, 1))
    x, ts = x0, jnp.linspace(0.0, 1.0, 8)
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        noise = best_noise({}, t, x)
        x1 = (x - ddpm.PATH.sigma(t) * noise) / ddpm.PATH.alpha(t)
        x = ddpm.PATH.alpha(s) * x1 + ddpm.PATH.sigma(s) * noise
    drawn, num_evaluations = jit(lambda x0: beside.ddim(7)(velocity_of({}), None, x0))(x0)
    np.testing.assert_allclose(drawn, x, rtol=1e-9)
    assert num_evaluations == 7


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ancestral_steps_after_two_changes_are_those_of_the_prediction_itself():
    num, key, x0 = 6, jax.random.key(1), jax.random.normal(jax.random.key(0), (5, 1))
    along = fm.from_x0(ddpm.PATH, lambda t, x: best_noise({}, t, x), floor=0.0)
    drift = fm.ancestral_drift(ddpm.PATH, along, num)
    diffusion = fm.ancestral_diffusion(ddpm.PATH, num)
    direct = jit(lambda x0: fm.sample_sde(key, drift, diffusion, x0, num_steps=num))(x0)
    drawn, num_evaluations = jit(lambda x0: beside.ancestral(num)(velocity_of({}), key, x0))(x0)
    np.testing.assert_allclose(drawn, direct, rtol=1e-7)
    assert num_evaluations == num


def test_both_networks_and_their_trainings_are_the_same():
    theirs = {field.name: field.default for field in dataclasses.fields(digits.Config)}
    for field in dataclasses.fields(ddpm.Config):
        assert field.default == theirs[field.name], field.name


@pytest.fixture
def drawn(tmp_path):
    """A batch of images, the experiment's loss, and what its `draw` makes of them."""
    draw, loss = parts(ddpm, ddpm.Config(workdir=tmp_path, model=TINY, label_dropout=0.5))
    images = data.load_digits("train")
    batch = Images(images.images[:64], images.labels[:64])
    return batch, loss, *draw(jax.random.key(0), batch)


def test_the_target_is_the_noise_in_the_points(drawn):
    """Without it and its weight they are the images, to the pixel value."""
    batch, _, sample, labels = drawn
    alpha, sigma = (f(sample.t)[:, None, None, None] for f in ddpm.PATH)
    kept = np.asarray(sample.t > 0.5)  # alpha is above 0.28
    assert 20 < kept.sum() < 50
    x1 = ((sample.x_t - sigma * sample.u_t) / alpha)[kept]
    np.testing.assert_array_equal(pixels.quantize(x1, 17), batch.images[kept])
    assert abs(float(jnp.var(sample.u_t)) - 1) < 0.1  # of 4,096 normal numbers, ± 0.02
    told = np.asarray(labels)
    assert set(told[told != batch.labels]) == {10} and 15 < (told == 10).sum() < 50


@pytest.mark.slow
def test_the_loss_of_a_network_of_zero_is_the_square_of_the_noise(drawn, tmp_path):
    _, loss, sample, labels = drawn
    task = ddpm.make_task(ddpm.Config(workdir=tmp_path, model=TINY))
    shapes = jax.eval_shape(task.init, jax.random.key(0)).params
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    found = jit(loss)(zero, jax.random.key(1), (sample, labels))
    np.testing.assert_allclose(found, jnp.mean(sample.u_t**2, (1, 2, 3)), rtol=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An encoder that has learnt nothing."""
    folder = tmp_path_factory.mktemp("encoder")
    model = Classifier(10, 17, (1, 2, 1, 2), widths=(8,) * 4, num_features=8)
    weights = to_bytes(model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8)))
    (folder / "encoder.safetensors").write_bytes(weights)
    record = {"name": "an untrained one", "dataset": "digits", "config": {}}
    record |= {"network": network(model), "image_shape": (8, 8, 1), "sha256": hash_bytes(weights)}
    (folder / "encoder.json").write_text(json.dumps(record))
    return folder


@pytest.mark.slow
def test_a_tiny_run_is_drawn_from_as_any_other(tmp_path):
    flags = dict(model=TINY, num_steps=3, batch_size=16, num_samples=10, eval_examples=10)
    flags |= dict(eval_batch_size=8, eval_tolerance=1e-2, sample_tolerance=1e-2, guidance=1.0)
    summary = train(ddpm.Config(workdir=tmp_path / "run", **flags), ddpm.make_task)
    assert 0 < summary["bits_per_dim"] < 30 and summary["num_evaluations"] % 6 == 1
    assert 0.5 < summary["loss"] < 1.5  # untrained, of unit noise
    flags = dict(out=tmp_path / "x.npz", num=4, format="npz")
    out = drawing.main(drawing.Config(tmp_path / "run", **flags))
    with np.load(out) as arrays:
        assert arrays["images"].shape == (4, 8, 8, 1) and arrays["images"].std() > 1


@pytest.mark.slow
def test_the_table_of_tiny_runs(tmp_path, encoder):
    """Every sampler on both networks, with its evaluations; trained runs are taken as they are."""
    for name, module in {"digits": digits, "ddpm": ddpm}.items():
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{name}_s{seed}"
            untrained(module.Config(workdir=folder, model=TINY, seed=seed), module.make_task)
            figures = {"bits_per_dim": 2.0 + seed, "bits_per_dim_standard_error": 0.1}
            summary = figures | {"bits_per_dim_method": "none"}
            (folder / "summary.json").write_text(json.dumps(summary))
    judge = judging.JudgeConfig(encoder=encoder, reference_dir=tmp_path, num_splits=2)
    config = beside.Config(
        workdir=tmp_path / "runs", seeds=(0, 1), steps=(2,), ancestral_steps=(3,), num_samples=40,
        judge=judge, repetitions=1, record=tmp_path / "ddpm.json", picture=tmp_path / "ddpm.png",
    )  # fmt: skip
    record = beside.main(config)
    assert json.loads((tmp_path / "ddpm.json").read_text())["samples"] == record["samples"]
    assert (tmp_path / "ddpm.png").stat().st_size > 1000
    rows = {(row["sampler"], row["network"]): row for row in record["samples"]}
    assert len(rows) == len(record["samples"]) == 8
    for name in ("flow matching", "DDPM"):
        assert rows["Euler, 2 equal steps", name]["evaluations"] == [2, 2]
        assert rows["DDIM, 2 steps", name]["evaluations"] == [2, 2]
        assert rows["ancestral, 3 steps", name]["evaluations"] == [3, 3]
        assert rows["Tsit5, tolerance 0.001", name]["evaluations"][0] % 6 == 1
    for row in record["samples"]:
        assert len(row["fd"]) == 2 and row["fd"][0] != row["fd"][1] and min(row["fd"]) > 0
    assert "| flow matching | velocity, `cond_ot` | 2.500 ± 0.707 |" in ddpm_report.table(record)
    again = beside.main(dataclasses.replace(config, record=None, picture=None))
    assert again["samples"] == record["samples"]
    assert len((tmp_path / "runs/drawn/computed.jsonl").read_text().splitlines()) == 16  # once each
