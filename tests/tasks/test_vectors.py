"""Tables: standardised, conditional, their densities and samples in the original units."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import vectors as experiment
from fmjax import inference
from fmjax.evaluation import evaluate, sample
from fmjax.harness import train
from fmjax.harness.read import read
from fmjax.tasks import points, vectors

SIZES = dict(
    num_steps=2, batch_size=64, num_samples=50, eval_examples=50, preview_every=0,
    model=points.MLPConfig(features=(8,)),
)  # fmt: skip


@pytest.fixture
def table(tmp_path):
    """y = 1000 + 5 z + 3 c and w = 0.01 z', given c: means and spreads far from 0 and 1."""
    rng = np.random.default_rng(0)
    c, z = rng.normal(20.0, 2.0, 400), rng.standard_normal((400, 2))
    rows = np.column_stack([1000 + 5 * z[:, 0] + 3 * c, 0.01 * z[:, 1], c])
    path = tmp_path / "lab.csv"
    np.savetxt(path, rows, delimiter=",", header="y,w,c", comments="")
    return path


def config(table, **flags):
    return experiment.Config(**(SIZES | {"data": table, "workdir": table.parent / "run"} | flags))


def still(monkeypatch):
    """A velocity of zero: standardised rows are standard normal."""
    monkeypatch.setattr(
        vectors, "velocity_of", lambda model, params, condition=None: lambda t, x: 0 * x
    )


def test_rows_are_standardised_and_conditions_are_told(table):
    rows = vectors.open_vectors(config(table, condition=("c",)))
    assert rows.names == ("y", "w") and rows.condition_names == ("c",)
    np.testing.assert_allclose(rows.train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rows.train.x.std(0), 1, atol=1e-5)
    value = rows.train.condition["value"]
    np.testing.assert_allclose([value.mean(), value.std()], [0, 1], atol=1e-5)
    assert (rows.train.condition["known"] == 1).all() and len(rows.held_out.x) >= 20


@pytest.mark.slow
def test_densities_are_in_the_original_units(table, monkeypatch):
    """Of a flow that stays where it is: the product of normals with the columns' moments."""
    still(monkeypatch)
    flags = config(table, columns=("y", "w"))
    experiment_task = experiment.make_task(flags)
    summary = train(flags, experiment.make_task)
    trained = read(flags.folder)
    rows = vectors.open_vectors(flags)
    mean, std = rows.standardizer
    x = inference.unstandardize(rows.standardizer, rows.held_out.x)
    want = -0.5 * (((x - mean) / std) ** 2).sum(1) - np.log(std).sum() - np.log(2 * np.pi)
    np.testing.assert_allclose(vectors.log_prob(trained, x), want, rtol=1e-4)
    np.testing.assert_allclose(summary["log_likelihood"], want[:50].mean(), rtol=1e-4)
    assert experiment_task.samples.num_classes is None
    table.unlink()  # samples know their units from the run folder
    wanted = sample.Config(flags.folder, num=400, batch_size=400, num_steps=1, solver="Euler",
                           format="npz", out=flags.folder / "a.npz")  # fmt: skip
    drawn = np.load(sample.main(wanted))["x"]
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.2 * std.max())
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.2)


def test_a_part_of_the_conditions_is_dropped_one_by_one(table):
    flags = config(table, condition=("c",), condition_dropout=0.25)
    rows = vectors.open_vectors(flags)
    told = vectors.drop_condition(flags, jax.random.key(0), rows.train.condition)
    dropped = np.asarray(told["known"]) == 0
    assert 0.15 < dropped.mean() < 0.35
    assert (np.asarray(told["value"])[dropped] == 0).all()
    np.testing.assert_array_equal(
        np.asarray(told["value"])[~dropped], rows.train.condition["value"][~dropped]
    )


@pytest.mark.slow
def test_from_training_to_evaluation_and_samples_under_a_condition(table):
    flags = config(table, condition=("c",), condition_dropout=0.1, preview_every=1)
    train(flags, experiment.make_task)
    assert (flags.folder / "samples" / "preview_00000002.png").is_file()
    settings = evaluate.Config(flags.folder, batch_size=16, seeds=(0, 1))
    found = evaluate.main(settings)
    assert found["likelihood"]["num_points"] == found["quality"]["num_samples"] > 10
    out = {}
    for name, given, guidance in (("a", (20.0,), 1.0), ("b", (26.0,), 1.0), ("c", (20.0,), 3.0)):
        wanted = sample.Config(
            flags.folder, num=24, batch_size=8, num_steps=2, solver="Heun", format="npz",
            given=given, guidance=guidance, out=table.parent / f"{name}.npz",
        )  # fmt: skip
        out[name] = np.load(sample.main(wanted))["x"]
    told = np.load(table.parent / "b.npz")["conditions"]
    np.testing.assert_allclose(told, np.full((24, 1), 26.0), rtol=1e-5)
    assert "given c" in (flags.folder / "evaluation" / "evaluation.md").read_text()
    assert out["a"].shape == (24, 2) and 900 < out["a"][:, 0].mean() < 1200  # in its own units
    assert (out["a"] != out["b"]).any() and (out["a"] != out["c"]).any()
    with pytest.raises(ValueError, match="--given takes one finite number for each of c; got 1"):
        sample.main(dataclasses.replace(wanted, given=(1.0, 2.0), out=table.parent / "d.npz"))


@pytest.mark.slow
def test_another_table_is_refused(table):
    """Other units, other conditions, other rows that are held out: each is another table."""
    flags = config(table, condition=("c",))
    train(flags, experiment.make_task)
    text = table.read_text()
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    for changed in (4 * rows, rows[::-1], np.column_stack([rows[:, :2], rows[::-1, 2]])):
        np.savetxt(table, changed, delimiter=",", header="y,w,c", comments="")
        with pytest.raises(ValueError, match="differs? in .*sha256"):
            train(dataclasses.replace(flags, num_steps=3), experiment.make_task)
        with pytest.raises(ValueError, match="differ in .*sha256"):
            evaluate.main(evaluate.Config(flags.folder, batch_size=16))
    table.write_text(text)
    train(dataclasses.replace(flags, num_steps=3), experiment.make_task)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"condition": ("nothing",)}, "nothing"),
        ({"condition": ("c",), "condition_dropout": 1.5}, r"--condition-dropout must be in \[0"),
        ({"condition_dropout": 0.5}, "--condition-dropout needs --condition"),
        ({"batch_size": 512}, "--batch-size must be at most"),
    ],
)
def test_what_can_not_work_is_refused_before_training(table, flags, message):
    with pytest.raises(ValueError, match=message):
        train(config(table, **flags), experiment.make_task)
    assert not (table.parent / "run").exists()
