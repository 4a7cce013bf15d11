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
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from experiments import cifar10, digits, images, mnist, plots, two_moons
from experiments.images import UNetConfig, choose_kernels, load
from fmjax import data, models
from fmjax.harness import loop, step
from fmjax.harness.config import flags
from fmjax.harness.run import Run
from fmjax.training import checkpoints

ROOT = pathlib.Path(__file__).parents[2]
SHARED = pathlib.Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared/tensorflow_datasets"))
TINY = UNetConfig(channels=8, channel_multipliers=(1,), num_res_blocks=1)
SMALL = dict(
    model=TINY, num_steps=3, batch_size=16, log_every=1, num_samples=4, eval_examples=10,
    eval_batch_size=8, eval_probes=1, eval_tolerance=1e-2, sample_tolerance=1e-2,
)  # fmt: skip
MOONS = dict(batch_size=64, log_every=1, num_samples=50, eval_examples=64)


def moons(workdir, **kwargs):
    model = two_moons.MLPConfig(features=(16,))
    return two_moons.Config(workdir=workdir, **({"model": model} | MOONS | kwargs))


def final_state(workdir):
    with checkpoints.open_manager(workdir / "checkpoints") as manager:
        step = checkpoints.latest_step(manager)
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        state = manager.restore(step, args=args)["state"]
    return step, jax.tree.map(np.asarray, state)


def check_folder(folder, summary, steps):
    for name in ("config.json", "metrics.jsonl", "loss.png", "summary.json"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tensorboard").glob("events*"))
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {"loss", "gradient_norm", "learning_rate", "images_per_second"} <= rows[0].keys()
    config = json.loads((folder / "config.json").read_text())
    assert config["global_batch"] == 16 and config["device_count"] == 8
    assert {"jax", "flax", "optax", "diffrax"} <= config["versions"].keys()
    picture = np.asarray(Image.open(folder / "samples" / f"step_{steps:08d}.png"))
    assert picture.std() > 1  # not blank


def check_image_summary(summary):
    assert 0 < summary["bits_per_dim"] < 20  # untrained, but in its unit
    assert "Hutchinson" in summary["bits_per_dim_method"]
    assert summary["num_evaluations"] % 6 == 1  # Tsit5: one, and six a step
    assert summary["images_per_second"] > 0 and summary["wall_seconds"] > 0


@pytest.mark.slow
def test_digits_leaves_a_complete_folder(tmp_path):
    folder = tmp_path / "a run with spaces, ü"
    digits.main(digits.Config(workdir=folder, **SMALL))
    summary = json.loads((folder / "summary.json").read_text())
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
    module.main(module.Config(**settings))
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
    digits.main(digits.Config(workdir=tmp_path / "run", kernels="cpu", **flags))
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "Training with the cpu kernels (--kernels cpu)." and called


@pytest.mark.slow
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    two_moons.main(moons(tmp_path / "once", num_steps=12, checkpoint_every=4))
    two_moons.main(moons(tmp_path / "twice", num_steps=6, checkpoint_every=4))
    two_moons.main(moons(tmp_path / "twice", num_steps=12, checkpoint_every=4))
    (step_a, a), (step_b, b) = final_state(tmp_path / "once"), final_state(tmp_path / "twice")
    assert step_a == step_b == 12
    jax.tree.map(np.testing.assert_array_equal, a, b)
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("once", "twice")
    ]
    assert len(curves[0]) == 12 and curves[0] == curves[1]


@pytest.mark.long
def test_a_killed_run_goes_on_exactly(tmp_path):
    def command(name):
        settings = "--num-steps 3000 --checkpoint-every 500 --log-every 100 --model.features 16"
        return [sys.executable, "-m", "experiments.two_moons", "--workdir", str(tmp_path / name),
                *settings.split(), "--num-samples", "50", "--eval-examples", "64"]  # fmt: skip

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
def test_pmap_gives_the_numbers_of_jit(tmp_path):
    for parallel in ("jit", "pmap"):
        # Pairing within each device's part would give other numbers.
        flags = dict(num_steps=20, parallel=parallel, coupling="minibatch_ot")
        two_moons.main(moons(tmp_path / parallel, **flags))
    a, b = (final_state(tmp_path / name)[1] for name in ("jit", "pmap"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        # Sums over the devices are taken in another order.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_another_configuration_is_refused(tmp_path):
    two_moons.main(moons(tmp_path, num_steps=2))
    with pytest.raises(ValueError, match="folder has 0.002, got 0.1\n.* --workdir"):
        two_moons.main(moons(tmp_path, num_steps=2, learning_rate=0.1))


def nan_loss(n):
    return n * jnp.nan


def nan_gradient(n):
    return n + jnp.sqrt(0 * n)  # the value is finite, the slope of sqrt at 0 times 0 is not


def train_until_broken(folder, broken, **settings):
    """Adam moves n by 1e-3 a step, so the fourth step is the first below -2.5e-3."""
    config = moons(folder, checkpoint_every=2, **({"num_steps": 10} | settings))
    tx = step.make_optimizer(dataclasses.replace(config, learning_rate=1e-3))

    def loss_fn(params, key, x):
        n = params["n"]
        return jax.lax.cond(n < -2.5e-3, broken, lambda n: n, n) + 0 * x.sum()

    with Run("nan", config) as run:
        state = step.init_state(config, lambda key: {"n": jnp.zeros(())}, jax.random.key(0), tx)
        steps = step.make_steps(config, lambda key, x: x, loss_fn, tx, state)
        x1 = np.arange(128.0).reshape(64, 2)
        return loop.train(run, state, steps, jax.random.key(0), 64, lambda rows: x1[rows])


@pytest.mark.parametrize("broken", [nan_loss, nan_gradient])
@pytest.mark.parametrize("steps_per_dispatch", [1, 2])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path, broken, steps_per_dispatch):
    with pytest.raises(FloatingPointError, match="step 4 .*the last good one is step 2"):
        train_until_broken(tmp_path, broken, steps_per_dispatch=steps_per_dispatch)
    assert final_state(tmp_path)[0] == 2  # the good one; the fourth step's was not saved
    dump = np.load(tmp_path / "not_finite_step_00000004.npz", allow_pickle=False)
    batches = data.batches(64, 64, seed=0, start_step=3)
    np.testing.assert_array_equal(dump["rows"], next(batches))
    np.testing.assert_array_equal(dump["batch"][:, 0], 2.0 * dump["rows"])
    assert dump["step"] == 4 and dump["checkpoint"] == 2


def test_up_to_n_such_steps_are_left_out(tmp_path):
    """From the fourth on every step is bad: n stays where three steps brought it."""
    state, _ = train_until_broken(tmp_path / "skips", nan_loss, num_steps=8, max_skipped_steps=5)
    np.testing.assert_allclose(state.params["n"], -3e-3, rtol=1e-3)
    assert int(state.step) == 8
    with pytest.raises(FloatingPointError, match="step 8 "):
        train_until_broken(tmp_path / "stops", nan_loss, num_steps=9, max_skipped_steps=4)
    # They count over restarts: five have been left out already.
    with pytest.raises(FloatingPointError, match="step 9 "):
        train_until_broken(tmp_path / "skips", nan_loss, num_steps=9, max_skipped_steps=5)


def test_an_infinite_loss_with_a_finite_gradient_is_left_out_too(tmp_path):
    def broken(n):
        return n + jnp.inf

    state, _ = train_until_broken(tmp_path, broken, num_steps=5, max_skipped_steps=2)
    np.testing.assert_allclose(state.params["n"], -3e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("value", "entry", "kept"), [(1.0, 1e3, True), (np.inf, 1e3, False), (1.0, 1e25, False)]
)
def test_a_bad_loss_or_a_norm_that_overflows_spoils_the_gradient(value, entry, kept):
    """1e25 squared is no float32: Adam's second moment would stay infinite for good."""
    gradient = {"w": jnp.full(3, entry)}
    spoilt, _ = step._spoil().update(gradient, optax.EmptyState(), value=jnp.asarray(value))
    expected = gradient["w"] if kept else np.full(3, np.nan)
    np.testing.assert_array_equal(spoilt["w"], expected)


def test_a_signal_during_the_last_save_still_ends_the_run(tmp_path, monkeypatch):
    save = Run.save

    def told(run, state, *, wait=False):
        os.kill(os.getpid(), signal.SIGTERM)
        save(run, state, wait=wait)

    monkeypatch.setattr(Run, "save", told)
    with pytest.raises(SystemExit) as end:
        train_until_broken(tmp_path, lambda n: n, num_steps=1)
    assert end.value.code == 143 and final_state(tmp_path)[0] == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_several_steps_per_dispatch_and_fewer_devices_go_on_alike(tmp_path):
    """13 steps, cut at 5 and 10; the number of devices may change on the way."""
    flags = dict(checkpoint_every=5, steps_per_dispatch=5, num_devices=4, fsdp=2)
    two_moons.main(moons(tmp_path / "a", num_steps=8, **flags))
    two_moons.main(moons(tmp_path / "a", num_steps=13, checkpoint_every=5))
    two_moons.main(moons(tmp_path / "b", num_steps=13))
    a, b = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("a", "b")
    )
    assert len(a) == 13
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_steps_that_were_left_out_are_null_and_not_drawn(tmp_path):
    train_until_broken(tmp_path, nan_loss, num_steps=8, max_skipped_steps=5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["loss"] is None for row in rows] == 3 * [False] + 5 * [True]
    plots.save_loss_curve(rows, tmp_path / "loss.png")
    assert np.asarray(Image.open(tmp_path / "loss.png")).std() > 1


def test_the_skipping_flag_can_not_change_on_the_way(tmp_path):
    train_until_broken(tmp_path, nan_loss, num_steps=2)
    with pytest.raises(ValueError, match="max_skipped_steps: folder has 0, got 3"):
        train_until_broken(tmp_path, nan_loss, num_steps=2, max_skipped_steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "multiple of the number of devices"),
        ({"num_steps": 0}, "--num-steps must be positive"),
        ({"eval_examples": -1}, "--eval-examples must be positive"),
        ({"warmup_steps": -5}, "--warmup-steps must be zero or more"),
        ({"ema_decay": 1.5}, "--ema-decay"),
        ({"learning_rate": float("nan")}, "--learning-rate must be positive"),
        ({"num_devices": 9}, "--num-devices must be at most the 8"),
        ({"num_devices": 6, "batch_size": 64}, "multiple of the number of devices"),
        ({"fsdp": 3}, "fsdp must divide"),
        ({"fsdp": 2, "parallel": "pmap"}, "--parallel pmap replicates the state"),
        ({"steps_per_dispatch": 3}, "--checkpoint-every must be a multiple"),
        ({"max_skipped_steps": -1}, "--max-skipped-steps must be zero or more"),
    ],
)
def test_bad_flags_are_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        two_moons.main(moons(tmp_path / "run", **change))
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
        digits.main(digits.Config(**(SMALL | {"workdir": tmp_path / "run"} | change)))
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
    assert flags(config)["workdir"] == "runs/digits"
    assert load(config, "test").images.shape == (297, 8, 8, 1)
