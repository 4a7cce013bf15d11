"""The state whole or split, one device or eight, one step or several at a time: one curve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import fmjax as fm
from fmjax import models, training
from fmjax.training import sharding

KEY = jax.random.key(1)
BATCH_SIZE, NUM_STEPS = 32, 20
TX = training.adam(1e-3, warmup_steps=5, clip_norm=1.0)
MLP = models.MLP(features=(64, 64))
UNET = models.UNet(
    channels=16, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=()
)


def loss_fn(model, params, key, x1):
    key_x0, key_t = jax.random.split(key)
    x0 = jax.random.normal(key_x0, x1.shape)
    path_sample = fm.sample_path(fm.cond_ot(), x0, x1, fm.uniform(key_t, x1.shape[:1]))
    return jnp.mean(fm.cfm_loss(functools.partial(model.apply, params), path_sample))


def init(model, event_shape):
    x = jnp.zeros((1, *event_shape))
    return training.init_train_state(model.init(jax.random.key(0), jnp.zeros(()), x), TX)


def train(model, event_shape, num_devices, fsdp, steps_per_dispatch=1):
    """The losses and the final state."""
    mesh = sharding.make_mesh(jax.devices()[:num_devices], fsdp=fsdp)
    begin = functools.partial(init, model, event_shape)
    places = sharding.state_sharding(jax.eval_shape(begin), mesh)
    state = jax.jit(begin, out_shardings=places)()
    step = training.make_train_step(functools.partial(loss_fn, model), TX, ema_decay=0.9)
    step = sharding.jit_train_step(training.many_steps(step), mesh, state=places, batch_axis=1)
    rng, losses = np.random.default_rng(0), []
    for _ in range(NUM_STEPS // steps_per_dispatch):
        shape = (steps_per_dispatch, BATCH_SIZE, *event_shape)
        batch = rng.standard_normal(shape, dtype=np.float32)
        state, metrics = step(state, KEY, sharding.shard_batch(batch, mesh, axis=1))
        losses.extend(np.asarray(metrics.loss))
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place  # the step puts it back where it was
    return np.array(losses), state


@functools.cache
def trained(name, num_devices, fsdp):
    return train(*MODELS[name], num_devices, fsdp)


MODELS = {"mlp": (MLP, (2,)), "unet": (UNET, (8, 8, 1))}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "num_devices", "fsdp"),
    [
        slow("mlp", 8, 1),
        slow("mlp", 8, 8),
        slow("mlp", 8, 2),
        slow("mlp", 4, 4),
        slow("unet", 8, 8),
    ],
)
def test_the_loss_curve_is_that_of_one_device(name, num_devices, fsdp):
    losses, _ = trained(name, num_devices, fsdp)
    expected, _ = trained(name, 1, 1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert np.std(expected) > 1e-3  # another batch, another loss


@pytest.mark.slow
def test_several_steps_at_a_time_are_those_steps():
    losses, state = train(*MODELS["mlp"], 8, 4, steps_per_dispatch=5)
    expected, other = trained("mlp", 1, 1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert int(state.step) == NUM_STEPS


@pytest.mark.slow
def test_a_split_state_takes_its_share_of_memory():
    _, state = trained("unet", 8, 8)
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    # The small arrays, biases and norms, stay whole.
    assert whole / 8 <= held < whole / 5, held / whole
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema_params), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((64, 64), 1, ()),
        ((64, 64), 8, (None, "fsdp")),  # of equals the last
        ((128, 64), 8, ("fsdp",)),  # the longest
        ((3, 3, 16, 12), 8, (None, None, "fsdp")),  # 12 does not divide
        ((33, 65), 8, ()),
        ((1023,), 8, ()),
        ((1024,), 8, ("fsdp",)),
        ((8, 8), 8, ()),  # too small to be worth it
    ],
)
def test_the_rule_on_shapes(shape, fsdp, spec):
    mesh = sharding.make_mesh(fsdp=fsdp)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert sharding.state_sharding({"w": x}, mesh)["w"].spec == PartitionSpec(*spec)


def test_an_fsdp_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="fsdp must divide.*got 3 for 8"):
        sharding.make_mesh(fsdp=3)


@settings(max_examples=40, deadline=None)
@given(
    num_devices=st.sampled_from([1, 2, 4, 6, 8]),
    fsdp=st.sampled_from([1, 2, 4]),
    rows=st.integers(0, 40),
    width=st.integers(1, 3),
    dtype=st.sampled_from(["uint8", "float32", "int32"]),
)
def test_what_is_spread_comes_back_whole(num_devices, fsdp, rows, width, dtype):
    if num_devices % fsdp:
        fsdp = 1
    mesh = sharding.make_mesh(jax.devices()[:num_devices], fsdp=fsdp)
    x = np.arange(rows * width).reshape(rows, width).astype(dtype)
    spread = sharding.spread(x, mesh)
    np.testing.assert_array_equal(sharding.gathered(spread), x)
    assert sharding.gathered(spread).dtype == x.dtype
    held = {shard.data.shape[0] for shard in spread.addressable_shards}
    if rows % num_devices == 0:
        assert held == {rows // num_devices}
        np.testing.assert_array_equal(sharding.local_rows(rows, mesh), np.arange(rows))
        if rows:
            np.testing.assert_array_equal(sharding.shard_batch(x, mesh), x)
    elif rows > 0:
        with pytest.raises(ValueError, match="multiple of the number of devices"):
            sharding.shard_batch(x, mesh)
