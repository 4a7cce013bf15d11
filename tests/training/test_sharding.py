"""Many devices give the numbers of one, on either road."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from fmjax import training
from fmjax.training import sharding

KEY = jax.random.key(3)
NUM_STEPS, BATCH_SIZE = 20, 32
TX = training.adam(1e-2, warmup_steps=5, clip_norm=1.0)


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def drawing_loss(params, key, batch):
    """Draws noise over the whole batch, and pairs across it: both need global semantics."""
    key_noise, key_pair = jax.random.split(key)
    x, y = batch
    x = x + 0.3 * jax.random.normal(key_noise, x.shape)
    x = x[jax.random.permutation(key_pair, x.shape[0])]
    return jnp.mean((network(params, x) - y) ** 2)


def plain_loss(params, key, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


def init():
    key_w, key_v = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(key_w, (3, 16)), "v": jax.random.normal(key_v, (16,))}
    return training.init_train_state(params, TX)


def batches():
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        x = rng.standard_normal((BATCH_SIZE, 3), dtype=np.float32)
        yield x, np.sum(x**2, axis=-1)


def train_jit(loss_fn, num_devices):
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    step = sharding.jit_train_step(training.make_train_step(loss_fn, TX, ema_decay=0.9), mesh)
    state = jax.jit(init, out_shardings=sharding.replicated(mesh))()
    losses = []
    for batch in batches():
        state, metrics = step(state, KEY, sharding.shard_batch(batch, mesh))
        losses.append(metrics.loss)
    return jax.device_get((state, losses))


def train_pmap(loss_fn, num_devices):
    step = training.make_train_step(loss_fn, TX, ema_decay=0.9, axis_name="data")
    devices = jax.devices()[:num_devices]
    step = sharding.pmap_train_step(step, devices)
    place = sharding.replicated(sharding.make_mesh(devices))
    state, losses = jax.jit(init, out_shardings=place)(), []
    for batch in batches():
        state, metrics = step(state, KEY, batch)
        losses.append(metrics.loss)
    assert state.params["w"].shape == (3, 16)  # not stacked
    return jax.device_get((state, losses))


def assert_close(a, b):
    # Each leaf against its own size: sums over 8 shards round otherwise than one sum over all.
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=2e-6 * np.max(np.abs(y)))


@pytest.fixture(scope="module")
def plain_on_one_device():
    return train_jit(plain_loss, 1)


def test_the_mesh_has_one_auto_axis():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data",) and mesh.axis_types == (AxisType.Auto,)
    assert list(mesh.devices.flat) == jax.devices() and mesh.size == 8
    assert sharding.replicated(mesh).spec == PartitionSpec()
    assert sharding.batch_sharding(mesh).spec == PartitionSpec("data")


def test_jit_on_8_devices_equals_1_with_draws_inside_the_loss():
    one, eight = train_jit(drawing_loss, 1), train_jit(drawing_loss, 8)
    assert_close(eight, one)
    assert int(one[0].step) == NUM_STEPS


def test_pmap_on_8_devices_equals_1_and_the_jit_road(plain_on_one_device):
    eight = train_pmap(plain_loss, 8)
    assert_close(eight, plain_on_one_device)
    assert_close(eight, train_pmap(plain_loss, 1))
    assert_close(eight, train_jit(plain_loss, 8))


@pytest.mark.parametrize("road", ["jit", "pmap"])
def test_state_is_donated_and_stays_replicated(road):
    mesh, batch = sharding.make_mesh(), next(batches())
    if road == "jit":
        step = sharding.jit_train_step(training.make_train_step(plain_loss, TX), mesh)
        batch = sharding.shard_batch(batch, mesh)
    else:
        step = training.make_train_step(plain_loss, TX, axis_name="data")
        step = sharding.pmap_train_step(step)
    state = jax.jit(init, out_shardings=sharding.replicated(mesh))()
    for _ in range(3):
        old = state
        state, metrics = step(state, KEY, batch)
        # The old learning rate is not among them: the step does not read it.
        donated = (old.step, old.params, old.ema_params, optax.tree.get(old.opt_state, "nu"))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))
        for leaf in jax.tree.leaves((state, metrics)):
            assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8


@pytest.mark.parametrize("road", ["jit", "pmap"])
def test_the_step_is_traced_once(road):
    traces = []

    def counted(params, key, batch):
        traces.append(1)
        return plain_loss(params, key, batch)

    (train_jit if road == "jit" else train_pmap)(counted, 8)
    assert len(traces) == 1


def test_a_batch_is_split_in_order():
    mesh = sharding.make_mesh()
    x = np.arange(48).reshape(16, 3)
    batch = sharding.shard_batch({"x": x, "y": x[:, 0]}, mesh)
    np.testing.assert_array_equal(batch["x"], x)
    for i, shard in enumerate(batch["x"].addressable_shards):
        assert shard.device == jax.devices()[i]
        np.testing.assert_array_equal(shard.data, x[2 * i : 2 * i + 2])


def test_a_batch_that_does_not_divide_is_refused():
    sharding.check_batch_size(24, 8)
    with pytest.raises(
        ValueError, match="multiple of the number of devices; got 30 for 8.*24 or 32"
    ):
        sharding.check_batch_size(30, 8)
    with pytest.raises(ValueError, match="got 3 for 8 devices. Take 8, or"):
        sharding.check_batch_size(3, 8)
    with pytest.raises(ValueError, match="got 0 for 8"):
        sharding.check_batch_size(0, 8)
    x = np.zeros((12, 3))
    with pytest.raises(ValueError, match="got 12 for 8"):
        sharding.shard_batch(x, sharding.make_mesh())
    step = training.make_train_step(plain_loss, TX, axis_name="data")
    with pytest.raises(ValueError, match="got 12 for 8"):
        sharding.pmap_train_step(step)(init(), KEY, (x, x[:, 0]))
