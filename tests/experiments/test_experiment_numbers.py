"""The figures that experiments report, and what their flags draw, against independent ones."""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from made_runs import parts

import fmjax as fm
from experiments import cifar10, digits, mnist, two_moons
from fmjax import data, models, training
from fmjax.data import pixels
from fmjax.harness import train
from fmjax.harness.run import Run
from fmjax.harness.task import Trained
from fmjax.tasks.choices import PATHS
from fmjax.tasks.image_data import Images, load
from fmjax.tasks.image_figures import measure_bits_per_dim
from fmjax.tasks.images import UNetConfig, init_params, make_network
from fmjax.tasks.points import MLPConfig
from fmjax.training import checkpoints

KEY = jax.random.key(7)


def still(params, labels):
    """A velocity that is zero: its flow leaves the standard normal where it is."""
    return lambda t, x: jnp.zeros_like(x)


def config(module=digits, **kwargs):
    plain = dict(conditional=False, guidance=1.0, eval_examples=42, eval_batch_size=16)
    return module.Config(**({"workdir": "unused", "dataset": "digits"} | plain | kwargs))


def draw(images, module=digits, **kwargs):
    """What an experiment draws of pixel values: a path sample."""
    return parts(module, config(module, **kwargs))[0](KEY, Images(images, None))[0]


@pytest.mark.slow
@pytest.mark.parametrize("levels", [17, 256])
def test_bits_per_dim_of_a_standard_normal(levels):
    images = np.random.default_rng(0).integers(0, levels, (50, 8, 8, 1), np.uint8)
    images[42:] = 0  # beyond eval_examples: they must not count
    dataset = data.ImageDataset(images, np.zeros(50, np.int32), 10, levels)
    pictures = types.SimpleNamespace(held_out=dataset)
    trained = Trained(None, "still", config(), 0, {})  # pyright: ignore
    got = measure_bits_per_dim(pictures, still, trained, KEY)  # pyright: ignore
    # -log2 of N(x; 0, 1) 2 / levels at x = 2 (v + u) / levels - 1, with E u = 1/2, E u^2 = 1/3.
    v = images[:42].astype(np.float64)
    square = 4 * (v**2 + v + 1 / 3) / levels**2 - 4 * (v + 0.5) / levels + 1
    nats = 0.5 * square + 0.5 * np.log(2 * np.pi) - np.log(2 / levels)
    expected = nats.mean((1, 2, 3)) / np.log(2)
    # One draw of u per pixel: its part in the mean of 2,688 pixels is below 1e-2 / sqrt(2688).
    np.testing.assert_allclose(got["bits_per_dim"], expected.mean(), atol=1e-3)
    standard_error = expected.std(ddof=1) / np.sqrt(42)
    np.testing.assert_allclose(got["bits_per_dim_standard_error"], standard_error, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_the_path_flag_and_the_images(path):
    images = load(config(), "train[:32]").images
    drawn = draw(images, path=path)
    x1 = fm.velocity_to_x1(PATHS[path], drawn.t, drawn.x_t, drawn.u_t)
    # Another path's formula would not give the images back.
    agree = np.asarray(pixels.quantize(x1, 17)) == images
    assert agree.mean() > 0.99  # all but where rounding crosses a level


def recovered(images, module=digits, **flags):
    drawn = draw(images, module, **flags)
    path = fm.cond_ot()
    return [f(path, drawn.t, drawn.x_t, drawn.u_t) for f in (fm.velocity_to_x0, fm.velocity_to_x1)]


@pytest.mark.slow
def test_the_coupling_flag():
    images = load(config(), "train[:32]").images
    for coupling, optimal in (("independent", False), ("minibatch_ot", True)):
        x0, x1 = (np.asarray(x).reshape(32, -1) for x in recovered(images, coupling=coupling))
        cost = ((x0[:, None] - x1[None]) ** 2).sum(-1)
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        assert (rows == columns).all() == optimal


def test_mirrored_digits_are_none():
    with pytest.raises(ValueError, match="--flip is not for digits"):
        digits.make_task(digits.Config(workdir=pathlib.Path("unused"), flip=True))


@pytest.mark.slow
@pytest.mark.parametrize("module", [mnist, cifar10])
def test_the_flip_flag(module):
    images = load(config(), "train[:64]").images
    for flip in (False, True):
        x1 = recovered(images, module, flip=flip)[1]
        x1 = np.asarray(pixels.quantize(x1, 17)).astype(int)
        straight = np.abs(x1 - images).mean((1, 2, 3)) < 0.1
        mirrored = np.abs(x1 - images[:, :, ::-1]).mean((1, 2, 3)) < 0.1
        assert (straight | mirrored).all()
        least, most = (16, 48) if flip else (0, 0)  # four standard deviations
        assert least <= mirrored.sum() <= most


@pytest.mark.slow
def test_the_times_flag():
    images = load(config(), "train[:1000]").images
    means = {
        times: float(draw(images, times=times).t.mean())
        for times in ("uniform", "logit_normal", "edm_skewed")
    }
    # E sigmoid(1.2 + 1.2 n) = 0.715; the standard error of 1000 draws is below 0.01.
    np.testing.assert_allclose(list(means.values()), [0.5, 0.5, 0.715], atol=0.04)


@pytest.mark.slow
def test_the_log_likelihood_is_that_of_the_ema_on_held_out_points(tmp_path):
    moons = two_moons.Config(
        workdir=tmp_path, num_steps=30, batch_size=64, num_samples=50, eval_examples=200,
        model=MLPConfig(features=(16,)), ema_decay=0.9, frames=0, side=16,
        steps_per_dispatch=1,
    )  # fmt: skip
    train(moons, two_moons.make_task)
    model, tx = models.MLP(features=(16,)), training.adam(1.0)
    params = jax.jit(model.init)(KEY, jnp.zeros(()), jnp.zeros((1, 2)))
    with checkpoints.open_manager(tmp_path / "checkpoints") as manager:
        state = checkpoints.restore(manager, training.init_train_state(params, tx))
    held_out = two_moons.moons(2048, 0.05, 0, 1)[:200]
    velocity = functools.partial(model.apply, state.ema_params)
    log_p = jax.jit(functools.partial(fm.log_prob, velocity))(jnp.asarray(held_out))
    summary = json.loads((tmp_path / "summary.json").read_text())
    np.testing.assert_allclose(summary["log_likelihood"], log_p.mean(), rtol=1e-4)
    trained_on = two_moons.moons(50_000, 0.05, 0, 0)
    assert not (held_out[:, None] == trained_on[None, :5000]).all(-1).any()


def test_fewer_steps_than_a_folder_holds_are_refused(tmp_path):
    tx = training.adam(1e-3)
    state = training.init_train_state({"w": jnp.zeros(())}, tx)
    moons = two_moons.Config(workdir=tmp_path, num_steps=30)
    with Run("moons", moons) as run:
        run.save(run.restore(state)._replace(step=jnp.asarray(30)), wait=True)
    with pytest.raises(ValueError, match="at least the 30 steps"):
        Run("moons", dataclasses.replace(moons, num_steps=20))


def test_a_folder_takes_one_process_at_a_time(tmp_path):
    first = digits.Config(workdir=tmp_path)
    with Run("digits", first):
        with pytest.raises(ValueError, match="another is running"):
            Run("digits", first)
    with Run("digits", first):  # and is free again afterwards
        pass


@pytest.mark.slow
def test_bfloat16_and_remat_leave_parameters_gradients_and_loss_float32():
    unet = UNetConfig(channels=16, channel_multipliers=(1,), num_res_blocks=1, dropout=0.1)
    images = load(config(), "train[:8]").images

    @jax.jit
    def init(key):
        params = init_params(make_network(config(model=unet), 10), (8, 8, 1), key)
        return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(key, x.shape), params)

    params = init(KEY)

    def loss_of(**flags):
        """As `params -> loss`, of the experiment under these flags."""
        draw, losses = parts(digits, config(model=unet, **flags))
        drawn = draw(KEY, Images(images, None))
        return lambda params: jnp.mean(losses(params, KEY, drawn))

    def measure(**flags):
        return jax.jit(jax.value_and_grad(loss_of(**flags)))(params)

    loss, gradient = measure()
    narrow = {"precision": "bfloat16", "remat": True}
    near, near_gradient = measure(**narrow)
    assert near.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(near_gradient)} == {jnp.dtype("float32")}
    distance = optax.tree.norm(optax.tree.sub(gradient, near_gradient)) / optax.tree.norm(gradient)
    # bfloat16 has 8 bits: about 0.4 % per operation, and it must have been used.
    assert abs(near / loss - 1) < 1e-2 and 1e-4 < distance < 5e-2
    text = str(jax.make_jaxpr(loss_of(**narrow))(params))
    assert "bf16[3,3,16,16]" in text  # the convolutions' filters

    again, same = measure(remat=True)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
