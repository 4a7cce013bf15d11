"""Evaluation of a task without an evaluation of its own, and one with it."""

import json

import jax
import numpy as np
import pytest
import tiny
from made_runs import params_at

from fmjax import harness
from fmjax.evaluation import evaluate, export, sample
from fmjax.harness import keys

pytestmark = pytest.mark.slow  # all evaluate or draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    harness.train(tiny.Config(workdir=folder, num_steps=5), tiny.make_task)
    return folder


@pytest.mark.parametrize("average", [True, False])
def test_without_an_evaluation_the_held_out_loss_is_measured(folder, average):
    """Of whole batches, drawn as in step 0, with its error over them; by hand."""
    flags = evaluate.Config(folder, batch_size=8, seeds=(4,), average=average)
    result = evaluate.main(flags)
    params = params_at(folder, 5, "ema_params" if average else "params")
    values, task = [], tiny.make_task(tiny.Config())
    for k, start in enumerate(range(0, 40, 8)):  # the keys of a run's previews
        key = jax.random.fold_in(jax.random.fold_in(keys.key(4, "held out"), k), 0)
        key_draw, key_loss = jax.random.split(key)
        batch = task.held_out(np.arange(start, start + 8))
        values.append(float(tiny.loss(params, key_loss, tiny.draw(key_draw, batch)).mean()))
    np.testing.assert_allclose(result["held_out_loss"], np.mean(values), rtol=1e-5)
    error = np.std(values, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(result["held_out_loss_standard_error"], error, rtol=1e-4)
    kept = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert kept["held_out_loss"] == result["held_out_loss"]
    ((name, figure, how),) = kept["rows"]
    assert name == "held-out loss" and "±" in figure
    assert how == "40 held-out examples in batches of 8"
    assert f"| {name} | {figure} | {how} |" in (folder / "evaluation/evaluation.md").read_text()


def test_what_there_is_nothing_to_measure_with(folder, monkeypatch):
    monkeypatch.setattr(tiny, "HELD_OUT", 0)
    with pytest.raises(ValueError, match="needs Task.evaluate, or held-out examples"):
        evaluate.main(evaluate.Config(folder, batch_size=8))


def test_a_tasks_own_evaluation_makes_the_table(folder, monkeypatch):
    make_task = tiny.make_task

    def with_evaluation(config):
        def measure(trained, into, flags):
            assert (into, trained.step, flags.seeds) == (folder / "evaluation", 5, (0, 1, 2))
            rows = [("my figure", "17", "counted")]
            return {"protocol": evaluate.protocol.record(flags, trained), "rows": rows}

        return make_task(config)._replace(evaluate=measure)

    monkeypatch.setattr(tiny, "make_task", with_evaluation)
    evaluate.main(evaluate.Config(folder, batch_size=8))
    table = (folder / "evaluation" / "evaluation.md").read_text()
    assert "tiny, step 5" in table and "| my figure | 17 | counted |" in table


def test_a_run_is_evaluated_on_its_own_data(folder, monkeypatch):
    """Else what it learnt by heart could be among what is held out."""
    make_task, record = tiny.make_task, json.loads((folder / "config.json").read_text())

    def of_other_data(config):
        return make_task(config)._replace(data=lambda: {"num_examples": 60, "sha256": "other"})

    monkeypatch.setattr(tiny, "make_task", of_other_data)
    known = {"num_examples": 60, "sha256": "first"}
    (folder / "config.json").write_text(json.dumps(record | {"data": known}))
    with pytest.raises(ValueError, match="differ in sha256: was first, is other. Bring them back"):
        evaluate.main(evaluate.Config(folder, batch_size=8))
    (folder / "config.json").write_text(json.dumps(record))


def test_samples_of_a_task_of_ones_own(folder, tmp_path, monkeypatch):
    flags = {"num": 6, "batch_size": 8, "solver": "Heun", "num_steps": 2}
    out = sample.main(sample.Config(folder, format="npz", out=tmp_path / "a.npz", **flags))
    with np.load(out) as arrays:
        assert arrays["x"].shape == (6, 2) and arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    for format in ("grid", "png"):
        with pytest.raises(ValueError, match=f"--format {format} needs .* Take --format npz"):
            sample.main(sample.Config(folder, format=format, **flags))
    make_task = tiny.make_task
    monkeypatch.setattr(tiny, "make_task", lambda config: make_task(config)._replace(samples=None))
    with pytest.raises(ValueError, match="Samples need Task.samples; the task of .*run has none"):
        sample.main(sample.Config(folder, format="npz", out=tmp_path / "b.npz", **flags))
    export.main(export.Config(folder, tmp_path / "a.safetensors"))  # parameters it has
