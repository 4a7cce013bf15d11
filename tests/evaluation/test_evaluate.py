"""Evaluation of run folders: the figures, resuming, and what is refused."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import untrained
from PIL import Image

import fmjax as fm
from experiments import digits, two_moons
from fmjax import data, metrics, models
from fmjax.data import pixels
from fmjax.evaluation import classifier, densities, evaluate, images, judging, protocol, report
from fmjax.harness import keys, store
from fmjax.harness.read import from_flags, read, read_config
from fmjax.tasks import image_data
from fmjax.tasks.images import UNetConfig
from fmjax.tasks.points import MLPConfig

pytestmark = pytest.mark.slow  # all evaluate runs
ROOT = pathlib.Path(__file__).parents[2]
PLAIN = {"conditional": False, "guidance": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of digits, one of two moons and an encoder, all untrained."""
    folder = tmp_path_factory.mktemp("runs")
    unet = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)
    untrained(digits.Config(workdir=folder / "digits", model=unet, **PLAIN), digits.make_task)
    known = digits.Config(workdir=folder / "conditional", model=unet)
    untrained(known, digits.make_task)
    mlp = MLPConfig(features=(32, 32))
    moons = two_moons.Config(workdir=folder / "two_moons", model=mlp)
    untrained(moons, two_moons.make_task)
    network = classifier.Classifier(num_classes=10, num_levels=17, strides=(2, 2), widths=(8, 8))
    weights = classifier.to_bytes(
        jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8))
    )
    (folder / "encoder").mkdir()
    record = {"name": "an untrained one", "dataset": "digits", "config": {}}
    record |= {"network": classifier.network(network), "image_shape": (8, 8, 1)}
    record |= {"sha256": hashlib.sha256(weights).hexdigest()}
    classifier.write(folder / "encoder", weights, record)
    return folder


# What a 2-D run takes as it is.
PLANE = {
    name: field.default
    for name, field in evaluate.Config.__dataclass_fields__.items()
    if name in protocol.IMAGE_FLAGS
}


def config(folders, run, **kwargs):
    judge = judging.JudgeConfig(
        encoder=folders / "encoder", reference_dir=folders / "reference", num_splits=4
    )
    small = dict(
        judge=judge, batch_size=40, num_samples=100, eval_examples=60, num_draws=2, seeds=(0, 1),
        tolerance=1e-2, curve_examples=100, curve_evaluations=(4,), curve_tolerances=(0.1,),
    )  # fmt: skip
    return evaluate.Config(run=run, **(small | kwargs))


def figures(result):
    """What must not change from one run to the next."""
    result = json.loads(json.dumps(result))
    assert result["rows"].pop()[0] == "seconds"

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("seconds", "started")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip(result)


@pytest.fixture(scope="module")
def evaluated(folders):
    """The digits run, evaluated once, in a copy of its folder."""
    run = shutil.copytree(folders / "digits", folders / "digits copy, ü")
    return run, evaluate.main(config(folders, run))


def test_images(evaluated):
    run, result = evaluated
    folder = run / "evaluation"
    assert json.loads((folder / "evaluation.json").read_text()) == json.loads(json.dumps(result))
    assert (folder / "evaluation.md").read_text() == report.table(result)
    assert [row[0] for row in result["rows"]][-2:] == ["evaluations per sample", "seconds"]
    for name in ("curve.png", "samples.png"):
        assert np.asarray(Image.open(folder / name)).std() > 1
    one, two = result["likelihood"]["bounds"]
    assert one["bound"] == "uniform dequantisation, K = 1"
    assert two["bound"] == "uniform dequantisation, importance-weighted, K = 2"
    assert two["bits_per_dim"] < one["bits_per_dim"]
    quality = result["quality"]
    assert quality["distance"] == "FD (encoder an untrained one)"
    assert quality["frechet_distance"]["mean"] > 0 and "FID" not in report.table(result)
    rows = result["curve"]
    names = {(row["solver"], row["num_steps"]) for row in rows}
    assert {("Euler", 4), ("Heun", 2), ("Midpoint", 2), ("Tsit5", None), ("Dopri5", None)} <= names
    assert rows[-1]["error_rms"] == 0  # the exact flow, from itself
    costs = {row["solver"]: row["num_evaluations"] for row in rows if row["num_steps"]}
    assert costs == {"Euler": 4.0, "Heun": 4.0, "Midpoint": 4.0}
    assert all(row["error_rms"] > 0 for row in rows[:-1])
    assert result["protocol"]["device_count"] == 8


def test_the_bound_is_that_of_a_direct_solve(folders, evaluated):
    """The stored log-weights, against a solve with the keys as the module states them."""
    run, result = evaluated
    model = read(run)
    dataset = image_data.load(digits.Config(workdir=run), "test")
    key = jax.random.fold_in(keys.key(0, "likelihood"), 0)
    x = pixels.dequantize(jax.random.fold_in(key, 1), dataset.images[:40], 17)
    # Each probe's integral is a part of the state, of whose error the steps are made.
    divergence = fm.hutchinson_estimates(jax.random.fold_in(key, 0), 2)
    controller = diffrax.PIDController(rtol=1e-2, atol=1e-2)
    solve = functools.partial(
        fm.integrate_log_prob,
        model.velocity(model.params),
        divergence=divergence,
        stepsize_controller=controller,
    )
    log_p = jnp.mean(jax.jit(solve)(x).log_prob, axis=0)
    want = fm.bits_per_dim(log_p, (8, 8, 1), num_levels=17).mean()
    np.testing.assert_allclose(
        result["likelihood"]["solver_error"]["bits_per_dim"], want, rtol=1e-4
    )


@pytest.mark.long
def test_a_second_run_gives_the_same_numbers(folders, evaluated):
    _, result = evaluated
    run = shutil.copytree(folders / "digits", folders / "another")
    assert figures(evaluate.main(config(folders, run))) == figures(result)


def test_nothing_is_computed_twice(folders, evaluated):
    run, result = evaluated
    again = evaluate.main(config(folders, run))
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(result)) | {
        "protocol": result["protocol"] | {"started": again["protocol"]["started"]}
    }
    other = evaluate.main(config(folders, run, seeds=(0, 2)))  # the first seed's samples are there
    assert 0 < other["batches_computed"] - result["batches_computed"] <= 6
    assert (
        other["quality"]["frechet_distance"]["per_seed"][0]
        == (result["quality"]["frechet_distance"]["per_seed"][0])
    )


def test_a_killed_evaluation_goes_on(folders, evaluated):
    _, result = evaluated
    run = shutil.copytree(folders / "digits", folders / "killed")
    settings = config(folders, run)
    flags = [f"--judge.{k.replace('_', '-')}={v}" for k, v in vars(settings.judge).items()
             if k in ("encoder", "reference_dir", "num_splits")]  # fmt: skip
    for name in ("batch_size", "num_samples", "eval_examples", "num_draws", "tolerance"):
        flags.append(f"--{name.replace('_', '-')}={getattr(settings, name)}")
    flags += ["--curve-examples=100", "--seeds", "0", "1", "--curve-evaluations", "4"]
    flags += ["--curve-tolerances", "0.1"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "experiments.evaluate", str(run), *flags]
    kills = 0
    for wanted in (3, 9):  # in the likelihood, then among the samples
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while store.num_computed(run / "evaluation") < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (run / "evaluation" / "evaluation.json").exists()
    assert kills == 2
    before = store.num_computed(run / "evaluation")
    resumed = evaluate.main(settings)
    lines = (run / "evaluation/computed.jsonl").read_text().splitlines()
    assert len(set(lines)) == len(lines) == resumed["batches_computed"]  # nothing twice
    # A kill between a batch's file and its line in the log loses the line alone.
    lost = result["batches_computed"] - len(lines)
    assert 9 <= before < len(lines) and 0 <= lost <= kills
    assert figures(resumed) == figures(result)


def test_the_plane(folders):
    run = folders / "two_moons"
    result = evaluate.main(config(folders, run, **PLANE))
    assert "num_draws" not in result["protocol"]["flags"]  # flags that don't count are left out
    likelihood = result["likelihood"]
    assert abs(likelihood["density_integral"] - 1) < 0.01  # a sum over cells of width 0.02
    assert abs(likelihood["solver_error"]["difference"]) < 1e-3
    model = read(run)
    held_out = jnp.asarray(two_moons.moons(2000, 0.05, 0, 2))
    log_p = np.asarray(jax.jit(lambda x: fm.log_prob(model.velocity(model.params), x))(held_out))
    np.testing.assert_allclose(likelihood["nats_per_point"], log_p.mean(), rtol=1e-4)
    np.testing.assert_allclose(
        likelihood["standard_error"], log_p.std(ddof=1) / np.sqrt(2000), rtol=1e-3
    )
    w2 = result["quality"]["wasserstein2"]
    fresh = result["quality"]["wasserstein2_of_fresh_data"]
    assert w2["mean"] > fresh["mean"] > 0
    other = [two_moons.moons(2000, 0.05, 0, 3, k) for k in range(2)]  # one for each seed
    want = [metrics.wasserstein2(x, np.asarray(held_out)) for x in other]
    np.testing.assert_allclose(fresh["per_seed"], want, rtol=1e-6)
    assert w2["standard_deviation_over_seeds"] == pytest.approx(np.std(w2["per_seed"], ddof=1))
    for name in ("density.png", "curve.png"):
        assert np.asarray(Image.open(run / "evaluation" / name)).std() > 1


def test_last_parameters_are_others_than_the_average(folders):
    average, last = (read(folders / "digits", average=a) for a in (True, False))
    assert average.digest != last.digest and average.step == last.step == 30
    assert average.config.model == last.config.model
    settings = config(folders, folders / "digits")
    keys = [protocol.identity(model, settings) for model in (average, last)]
    assert keys[0] != keys[1]  # no stored batch of one is taken for the other's
    other = dataclasses.replace(settings, batch_size=80)  # a batch shares its adaptive step
    assert protocol.identity(average, other) != keys[0]


def test_errors(folders, tmp_path):
    run = folders / "digits"
    with pytest.raises(ValueError, match="must hold config.json"):
        evaluate.main(config(folders, tmp_path))
    for bad, message in (
        ({"seeds": (0, 0)}, "--seeds must be different"),
        ({"seeds": ()}, "--seeds must be different"),
        ({"batch_size": 12}, "multiple of the number of devices"),
        ({"tolerance": 0.0}, "--tolerance must be positive"),
        ({"num_probes": 0}, "--num-probes must be positive"),
        ({"num_samples": 80}, "got --num-samples 80. Draw at least 87"),
        ({"curve_examples": 60}, "got --curve-examples 60"),
        ({"num_samples": 7}, "two samples in each; got --num-samples 7"),
        ({"curve_examples": -1}, "--curve-examples must be zero or more"),
        ({"curve_tolerances": ()}, "--curve-tolerances must have at least one value"),
        ({"curve_tolerances": (0.1, float("nan"))}, "--curve-tolerances must be positive"),
        ({"tolerance": float("inf")}, "--tolerance must be positive"),
        ({"seeds": (2**32,)}, "--seeds must be in 0..4294967295"),
        ({"curve_evaluations": (4, -8)}, "--curve-evaluations must be positive"),
        ({"eval_examples": 1}, "--eval-examples must be at least 2"),
        ({"judge": judging.JudgeConfig(num_splits=1)}, "--judge.num-splits must be at least 2"),
        ({"judge": judging.JudgeConfig(protocol="B")}, "without --judge.inception"),
        ({"judge": judging.JudgeConfig(inception=tmp_path / "x.pth")}, "x.pth"),
        ({"judge": judging.JudgeConfig(resnet=tmp_path / "x.npz")}, "x.npz"),
        ({"judge": judging.JudgeConfig(encoder=tmp_path / "none")}, "fmjax.evaluation.encoder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            evaluate.main(config(folders, run, **bad))
    assert store.num_computed(run / "evaluation") == 0  # all of it before any work
    with evaluate.lock(run / "evaluation"), pytest.raises(ValueError, match="one process's"):
        evaluate.main(config(folders, run))
    with pytest.raises(ValueError, match="are for image runs.*: --num-draws"):
        evaluate.main(config(folders, folders / "two_moons", **PLANE | {"num_draws": 2}))
    with pytest.raises(ValueError, match="at most the 2000 held-out points"):
        evaluate.main(config(folders, folders / "two_moons", **PLANE | {"curve_examples": 3000}))
    empty = shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    with pytest.raises(ValueError, match="must hold a checkpoint"):
        evaluate.main(config(folders, empty))
    record = json.loads((run / "config.json").read_text())
    for change, message in (
        ({"config_class": "unknown:Config"}, "unknown:Config as what made the run"),
        ({"make_task": "unknown:make_task"}, "unknown:make_task as what made the run"),
        ({"config": record["config"] | {"added": 1}}, "lacks or adds 'added'"),
    ):
        (empty / "config.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            evaluate.main(config(folders, empty))


def test_flags_come_back_as_they_were(folders):
    record, found = read_config(folders / "digits")
    assert record["experiment"] == "digits" and isinstance(found, digits.Config)
    assert record["make_task"] == "experiments.digits:make_task"
    assert isinstance(found.workdir, pathlib.Path) and found.model.channel_multipliers == (1,)
    assert found.known == record["data"] and found.known["event_shape"] == [8, 8, 1]
    found = dataclasses.replace(found, known=None)
    stored = json.loads(json.dumps(dataclasses.asdict(found), default=str))
    assert from_flags(digits.Config, stored) == found


def test_a_conditional_run_is_drawn_by_class_and_judged_by_it(folders):
    """Sample k is of class k mod 10, guided; likelihoods are given the classes, and unguided."""
    run = folders / "conditional"
    results = {w: evaluate.main(config(folders, run, guidance=w)) for w in (1.0, 3.0)}
    computed = store.num_computed(run / "evaluation")
    one, three = results.values()
    assert one["likelihood"]["bounds"] == three["likelihood"]["bounds"]
    assert "given their classes" in report.table(three)
    assert "guidance 3 |" in report.table(three)
    for result in results.values():
        for share in result["quality"]["class_accuracy"]["per_seed"]:
            assert 0 <= share <= 1 and round(100 * share) == pytest.approx(100 * share)
    assert one["quality"]["frechet_distance"] != three["quality"]["frechet_distance"]

    model = read(run)
    network = models.UNet(
        **dataclasses.asdict(UNetConfig(8, (1,), num_res_blocks=1)), num_classes=10
    )
    key = jax.random.fold_in(keys.key(0, "samples"), 0)
    x0, labels = jax.random.normal(key, (40, 8, 8, 1)), jnp.arange(40) % 10
    apply = functools.partial(network.apply, model.params)
    guided = fm.classifier_free_guidance(
        lambda t, x: apply(t, x, labels), lambda t, x: apply(t, x), 3.0
    )
    loose = diffrax.PIDController(rtol=1e-2, atol=1e-2)
    x1 = jax.jit(lambda x0: fm.sample(guided, x0, stepsize_controller=loose))(x0)
    want = np.asarray(pixels.quantize(x1, 17))
    found = [np.load(path)["x1"] for path in run.glob("evaluation/samples-*/seed_0_batch_0000.npz")]
    near = [np.mean(images == want) for images in found]
    assert len(found) == 2 and max(near) > 0.99 > min(near), near

    # Without its labels an image has another likelihood.
    held_out = image_data.load(model.config, "test[:60]")
    held_out = held_out._replace(labels=(held_out.labels + 1) % 10)
    how, batches = (
        images.likelihood_of(config(folders, run), held_out),
        store.Store(run, "wrong", {}),
    )
    other = densities.measure(how, model, held_out, batches, 0, conditional=True)
    assert other["bounds"] != one["likelihood"]["bounds"]
    assert store.num_computed(run / "evaluation") == computed


@pytest.mark.parametrize(("num", "size"), [(4, 4), (60, 40)])
def test_no_more_images_are_solved_than_there_are(folders, num, size):
    held_out = data.load_digits("test")._replace(images=np.zeros((num, 8, 8, 1), np.uint8))
    how = images.likelihood_of(config(folders, folders / "digits"), held_out)
    assert how.batch_size == size


@pytest.mark.parametrize("run", ["digits", "two_moons"])
def test_guidance_of_a_run_without_classes_is_refused(folders, run):
    flags = {} if run == "digits" else PLANE
    with pytest.raises(ValueError, match="Guidance needs a run that was trained with conditions"):
        evaluate.main(config(folders, folders / run, **(flags | {"guidance": 2.0})))
