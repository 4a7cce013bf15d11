"""The choice of an image experiment's network: what its flags make, and which are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import cifar10, digits, mnist
from fmjax import models
from fmjax.harness import load, train
from fmjax.tasks import images

TINY = images.DiTConfig(patch_size=2, width=16, depth=1, num_heads=2, num_time_tokens=1)
FLAGS = {"network": "dit", "dit": TINY, "batch_size": 16, "kernels": "xla"}


def test_the_flags_are_those_of_the_network():
    for module in (digits, mnist, cifar10):
        config = module.Config()
        assert config.network == "unet" and isinstance(images.make_network(config, 10), models.UNet)
        made = images.make_network(dataclasses.replace(config, network="dit"), 10)
        assert isinstance(made, models.DiT)
        for field in dataclasses.fields(config.dit):
            assert getattr(made, field.name) == getattr(config.dit, field.name)
            assert getattr(images.DiTConfig(), field.name) == getattr(models.DiT(), field.name) or (
                field.name in ("width", "depth")  # of a smaller one
            )
        assert made.num_classes == (10 if config.conditional else None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"width": 0}, "--dit.width must be positive; got 0"),
        ({"dropout": 1.0}, "--dit.dropout must be zero or more and below 1; got 1.0"),
        ({"time_scale": -1.0}, "--dit.time-scale must be positive"),
        ({"num_heads": 3}, r"--dit.width must be divisible by 4 times --dit.num-heads; got 16"),
        ({"patch_size": 3}, r"--dit.patch-size must divide the sides.*got 3 for 8x8.*1 2 4 8\."),
    ],
)
def test_a_transformer_that_can_not_be_is_refused(tmp_path, flags, message):
    config = digits.Config(**FLAGS | {"dit": dataclasses.replace(TINY, **flags)})
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(config, workdir=tmp_path / "run"), digits.make_task)
    assert not list(tmp_path.iterdir())


def test_the_flags_of_the_other_network_are_refused():
    small = images.UNetConfig(channels=8)
    for flags in ({"dit": TINY}, {"network": "dit", "model": small}):
        with pytest.raises(ValueError, match=r"--(dit|model)\.\* is for --network (dit|unet)"):
            digits.make_task(digits.Config(**flags))
    digits.make_task(digits.Config(model=small, kernels="xla"))


@pytest.mark.slow
def test_a_transformer_trains_and_its_run_is_read_again(tmp_path):
    """Under Muon with a decay: the loss falls, and the run folder knows which network it was."""
    config = digits.Config(
        **FLAGS,
        workdir=tmp_path,
        optimizer="muon",
        num_steps=30,
        num_devices=1,
        decay_steps=30,
        warmup_steps=5,
        checkpoint_every=30,
        log_every=10,
        preview_every=0,
        num_samples=0,
        eval_examples=0,
        cpu_threads=1,
        learning_rate=1e-2,
    )
    lines = []
    train(config, digits.make_task, on_metrics=lambda step, row: lines.append(row))
    losses = [row["loss"] for row in lines]
    assert losses[-1] < 0.85 * losses[0]
    np.testing.assert_allclose(lines[-1]["learning_rate"], 1e-2 / 25, rtol=1e-5)
    labels, x = jnp.asarray([3, 4]), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    _, params, velocity = load(tmp_path, labels)
    want = images.make_network(config, 10).apply(params, 0.5, x, labels)
    np.testing.assert_allclose(velocity(jnp.asarray(0.5), x), want, atol=1e-5)
    assert np.abs(np.asarray(want)).max() > 1e-2
