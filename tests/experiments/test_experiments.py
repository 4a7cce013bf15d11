"""The experiments, small: what they leave behind, that a run goes on exactly, bad flags."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import final_state, losses
from PIL import Image

from experiments import cifar10, digits, mnist, two_moons
from fmjax import models
from fmjax.harness import train
from fmjax.harness.config import flags
from fmjax.tasks import images
from fmjax.tasks.image_data import load
from fmjax.tasks.images import UNetConfig, choose_kernels
from fmjax.tasks.points import MLPConfig

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared/tensorflow_datasets"))
TINY = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)
SMALL = dict(
    model=TINY, num_steps=3, batch_size=16, log_every=1, num_samples=4, eval_examples=10,
    eval_batch_size=8, eval_probes=1, eval_tolerance=1e-2, sample_tolerance=1e-2, guidance=1.0,
)  # fmt: skip


def moons(workdir, **kwargs):
    """Seconds of two moons: nothing is drawn or measured at the end."""
    small = dict(model=MLPConfig(features=(16,)), batch_size=64, log_every=1, preview_every=0)
    small |= dict(steps_per_dispatch=1)
    small |= dict(num_samples=0, eval_examples=0, frames=0)
    return two_moons.Config(workdir=workdir, **(small | kwargs))


def train_moons(workdir, **kwargs):
    return train(moons(workdir, **kwargs), two_moons.make_task)


def check_folder(folder, summary, steps):
    for name in ("config.json", "metrics.jsonl", "loss.png", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {"loss", "gradient_norm", "learning_rate", "examples_per_second"} <= rows[0].keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["global_batch"] == 16 and config["device_count"] == 8
    assert {"jax", "flax", "optax", "diffrax"} <= config["versions"].keys()
    picture = np.asarray(Image.open(folder / "samples" / f"step_{steps:08d}.png"))
    assert picture.std() > 1  # not blank


def check_image_summary(summary):
    assert 0 < summary["bits_per_dim"] < 20  # untrained, but in its unit
    assert "Hutchinson" in summary["bits_per_dim_method"]
    assert summary["num_evaluations"] % 6 == 1  # Tsit5: one, and six a step
    assert summary["examples_per_second"] > 0 and summary["wall_seconds"] > 0


@pytest.mark.slow
def test_digits_leaves_a_complete_folder(tmp_path):
    folder = tmp_path / "a run with spaces, ü"
    done = train(digits.Config(workdir=folder, **SMALL), digits.make_task)
    summary = json.loads((folder / "summary.json").read_text())
    assert done == summary
    check_folder(folder, summary, 3)
    check_image_summary(summary)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "dataset", "splits"),
    [
        (cifar10, "cifar10", {"train_split": "train[:64]", "eval_split": "test[:16]"}),
        (mnist, "mnist", {"train_split": "test[:64]", "eval_split": "test[64:80]"}),
    ],
)
def test_real_images(tmp_path, module, dataset, splits):
    if not (SHARED / dataset).exists():
        pytest.skip(f"no prepared {dataset} in TFDS_DATA_DIR")
    settings = SMALL | splits | {"dataset": dataset, "data_dir": SHARED, "workdir": tmp_path}
    train(module.Config(**settings), module.make_task)
    check_image_summary(json.loads((tmp_path / "summary.json").read_text()))


def test_the_cifar10_default_is_the_published_network():
    config = dataclasses.asdict(cifar10.Config().model)
    built, named = models.UNet(**config), models.cifar10_unet()

    def count(model):
        x = jnp.zeros((1, 32, 32, 3))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(()), x)
        return sum(x.size for x in jax.tree.leaves(shapes))

    assert count(built) == count(named) == 35_746_307
    assert (built.dropout, built.head_channels) == (named.dropout, named.head_channels)


@pytest.mark.parametrize(
    ("asked", "devices", "num_steps", "kernels"),
    [
        ("auto", 1, 300, "cpu"),
        ("auto", 1, 299, "xla"),  # the longer compilation would not be paid back
        ("auto", None, 10**6, "xla"),  # over several devices a batch is cut, and so would they be
        ("xla", 1, 10**6, "xla"),
        ("cpu", None, 1, "cpu"),
    ],
)
def test_the_kernels_made_for_one_cpu_device_are_taken_where_they_pay(
    asked, devices, num_steps, kernels
):
    config = digits.Config(kernels=asked, num_devices=devices, num_steps=num_steps)
    assert choose_kernels(config) == kernels


@pytest.mark.slow
def test_the_first_line_says_the_kernels_and_training_calls_them(tmp_path, monkeypatch, capsys):
    called = []

    def conv(*args, **kwargs):
        called.append("conv")
        return jax.lax.conv_general_dilated(*args, **kwargs)

    monkeypatch.setitem(images.KERNELS, "cpu", images.KERNELS["xla"]._replace(conv=conv))
    flags = SMALL | dict(num_steps=1, num_devices=1)
    train(digits.Config(workdir=tmp_path / "run", kernels="cpu", **flags), digits.make_task)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.endswith("; cpu kernels (--kernels cpu)") and called


@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    train_moons(tmp_path / "once", num_steps=12, checkpoint_every=4)
    train_moons(tmp_path / "twice", num_steps=6, checkpoint_every=4)
    train_moons(tmp_path / "twice", num_steps=12, checkpoint_every=4)
    (step_a, a), (step_b, b) = final_state(tmp_path / "once"), final_state(tmp_path / "twice")
    assert step_a == step_b == 12
    jax.tree.map(np.testing.assert_array_equal, a, b)
    curves = [losses(tmp_path / name) for name in ("once", "twice")]
    assert len(curves[0]) == 12 and curves[0] == curves[1]


@pytest.mark.long
def test_a_killed_run_goes_on_exactly(tmp_path):
    def command(name):
        settings = "--num-steps 3000 --checkpoint-every 500 --log-every 100 --model.features 16 "
        settings += "--num-samples 0 --eval-examples 0 --frames 0 --steps-per-dispatch 1"
        return [sys.executable, "-m", "experiments.two_moons", "--workdir", str(tmp_path / name),
                *settings.split()]  # fmt: skip

    log = tmp_path / "killed" / "metrics.jsonl"
    with subprocess.Popen(command("killed"), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_text().count("\n") < 12:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "summary.json").exists()
    for name in ("killed", "untouched"):
        subprocess.run(command(name), cwd=ROOT, check=True, capture_output=True)
    (step_a, a), (step_b, b) = final_state(tmp_path / "killed"), final_state(tmp_path / "untouched")
    assert step_a == step_b == 3000
    jax.tree.map(np.testing.assert_array_equal, a, b)
    steps = [json.loads(line)["step"] for line in log.open()]
    assert steps == list(range(100, 3001, 100))  # none twice, none missing


@pytest.mark.slow
def test_pairs_are_those_of_the_global_batch_on_any_number_of_devices(tmp_path):
    """Pairing within each device's part would give other numbers."""
    for name, num in (("one", 1), ("eight", 8)):
        train_moons(tmp_path / name, num_steps=20, num_devices=num, coupling="minibatch_ot")
    a, b = (final_state(tmp_path / name)[1] for name in ("one", "eight"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Sums over the devices are taken in another order.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_another_configuration_is_refused(tmp_path):
    train_moons(tmp_path, num_steps=2)
    with pytest.raises(ValueError, match="folder has 0.002, got 0.1\n.* --workdir"):
        train_moons(tmp_path, num_steps=2, learning_rate=0.1)


@pytest.mark.slow
def test_several_steps_per_dispatch_and_fewer_devices_go_on_alike(tmp_path):
    """13 steps, cut at 5 and 10; the number of devices may change on the way."""
    flags = dict(checkpoint_every=5, steps_per_dispatch=5, num_devices=4, fsdp=2)
    train_moons(tmp_path / "a", num_steps=8, **flags)
    train_moons(tmp_path / "a", num_steps=13, checkpoint_every=5)
    train_moons(tmp_path / "b", num_steps=13)
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(a) == 13
    np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "multiple of the number of devices"),
        ({"num_steps": 0}, "--num-steps must be positive"),
        ({"eval_examples": -1}, "--eval-examples must be zero or more"),
        ({"warmup_steps": -5}, "--warmup-steps must be zero or more"),
        ({"ema_decay": 1.5}, "--ema-decay"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
        ({"num_devices": 9}, "--num-devices must be at most the 8"),
        ({"num_devices": 6, "batch_size": 64}, "multiple of the number of devices"),
        ({"fsdp": 3}, "fsdp must divide"),
        ({"steps_per_dispatch": 3}, "--checkpoint-every must be a multiple"),
        ({"max_skipped_steps": -1}, "--max-skipped-steps must be zero or more"),
    ],
)
def test_bad_flags_are_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_moons(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "cifer10"}, "cifar10"),
        ({"train_split": "validation"}, "train, test"),
        ({"model": UNetConfig(channel_multipliers=(1, 1, 1, 1, 1))}, "divisible"),
    ],
)
def test_bad_data_and_sizes_are_refused_before_training(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(digits.Config(**(SMALL | {"workdir": tmp_path / "run"} | change)), digits.make_task)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_flags_read_well_and_a_misspelt_one_is_refused_with_a_suggestion():
    command = [sys.executable, "-m", "experiments.digits"]
    options = dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    text = subprocess.run([*command, "--help"], **options).stdout
    shared = ("workdir", "seed", "num-steps", "batch-size", "checkpoint-every", "dataset")
    for flag in (*shared, "data-dir", "model.channels"):
        assert f"--{flag}" in text
    wrong = subprocess.run([*command, "--batchsize", "3"], **options)
    assert wrong.returncode != 0 and "--batch-size" in wrong.stdout + wrong.stderr


def test_flags_are_json_and_digits_are_the_embedded_default():
    config = digits.Config()
    assert flags(config)["workdir"] is None and "known" not in flags(config)
    assert flags(dataclasses.replace(config, workdir=pathlib.Path("a/b")))["workdir"] == "a/b"
    assert load(config, "test").images.shape == (297, 8, 8, 1)
