"""The mean in parts: the values and gradients of the undivided mean, where its keys and rows go."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models
from fmjax.training import accumulation, sharding
from fmjax.training.accumulation import mean_in_parts

KEY = jax.random.key(4)
ONE = sharding.make_mesh(jax.devices()[:1])
X = np.random.default_rng(0).standard_normal((32, 3), dtype=np.float32)


@pytest.fixture(params=["loop", "unrolled"])
def way(request, monkeypatch):
    """The parts as on an accelerator, and as on a CPU."""
    monkeypatch.setattr(accumulation, "_unrolled", lambda mesh: request.param == "unrolled")


def squares(params, key, batch):
    x, y = batch["x"], batch["y"]
    return (x @ params["w"] + params["b"] - y) ** 2


@pytest.mark.parametrize("num_parts", [1, 2, 8])
def test_loss_and_gradient_are_those_of_the_mean(num_parts, way):
    """Of least squares, in closed form."""
    w, b, y = np.float32([1, -2, 0.5]), np.float32(0.3), np.arange(32) % 5
    rest = X.astype(np.float64) @ w + b - y
    loss_fn = mean_in_parts(squares, num_parts, ONE)
    grad = jax.jit(jax.value_and_grad(loss_fn))
    loss, found = grad({"w": jnp.asarray(w), "b": jnp.asarray(b)}, KEY, {"x": X, "y": y})
    np.testing.assert_allclose(loss, np.mean(rest**2), rtol=1e-6)
    np.testing.assert_allclose(found["w"], 2 * X.T @ rest / 32, rtol=1e-5)
    np.testing.assert_allclose(found["b"], 2 * np.mean(rest), rtol=1e-5)
    plain = jax.jit(loss_fn)({"w": w, "b": b}, KEY, {"x": X, "y": y})  # without its gradient
    np.testing.assert_allclose(plain, np.mean(rest**2), rtol=1e-6)


def test_each_part_has_its_rows_and_a_key_of_its_own(way):
    def losses(params, key, x):
        return params * x * jax.random.uniform(key)

    x = np.arange(12, dtype=np.float32) ** 2
    loss, slope = jax.value_and_grad(mean_in_parts(losses, 3, ONE))(jnp.float32(2), KEY, x)
    draws = [float(jax.random.uniform(jax.random.fold_in(KEY, p))) for p in range(3)]
    want = np.mean([draws[p] * np.mean(x[p::3]) for p in range(3)])
    np.testing.assert_allclose([loss, slope], [2 * want, want], rtol=1e-6)


def test_sums_of_half_precision_are_single(way):
    """In bfloat16, 256 + 1 is 256, and the mean 8."""
    loss_fn = mean_in_parts(lambda params, key, x: params * x, 32, ONE)
    x = jnp.ones(32, jnp.bfloat16).at[0].set(256)
    slope = jax.grad(loss_fn)(jnp.bfloat16(1), KEY, x)
    assert slope.dtype == jnp.bfloat16 and slope == jnp.bfloat16(287 / 32)


def test_keys_may_be_among_what_is_drawn():
    def losses(params, key, drawn):
        return params * jax.vmap(jax.random.uniform)(drawn)

    drawn = jax.random.split(KEY, 8)
    slope = jax.grad(mean_in_parts(losses, 4, ONE))(jnp.float32(1), KEY, drawn)
    np.testing.assert_allclose(slope, np.mean(jax.vmap(jax.random.uniform)(drawn)), rtol=1e-6)


@pytest.mark.parametrize(("num_parts", "num_devices"), [(5, 1), (8, 8)])
def test_a_batch_that_can_not_be_divided_is_refused(num_parts, num_devices):
    mesh = sharding.make_mesh(jax.devices()[:num_devices])
    loss_fn = mean_in_parts(lambda params, key, x: params * x, num_parts, mesh)
    said = f"multiple of parts x devices; got 32 examples for {num_parts} parts on {num_devices}"
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(loss_fn, jnp.float32(1), KEY, X[:, 0])


def compiled(num_parts, num_devices, size=4096):
    """Value and gradient of an MLP's loss, on the devices."""
    mesh, mlp = sharding.make_mesh(jax.devices()[:num_devices]), models.MLP(features=(256, 256))

    def losses(params, key, x):
        return jnp.sum(mlp.apply(params, jnp.zeros(()), x) ** 2, axis=-1)

    params = jax.eval_shape(mlp.init, KEY, jnp.zeros(()), jnp.zeros((1, 3)))
    shardings = (
        sharding.replicated(mesh),
        sharding.replicated(mesh),
        sharding.batch_sharding(mesh),
    )
    grad = jax.value_and_grad(mean_in_parts(losses, num_parts, mesh))
    batch = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    return jax.jit(grad, in_shardings=shardings).lower(params, KEY, batch).compile()


@pytest.mark.slow
def test_four_parts_take_less_than_half_of_the_memory(way):
    one, four = (compiled(n, 1).memory_analysis().temp_size_in_bytes for n in (1, 4))
    assert four < 0.5 * one, (four, one)


@pytest.mark.slow
def test_gradients_of_parts_are_not_kept(way):
    """On several devices, whose sums of small parts are all there is to hold."""
    two, four = (compiled(n, 8, size=64).memory_analysis().temp_size_in_bytes for n in (2, 4))
    assert four < 1.1 * two, (four, two)


@pytest.mark.slow
def test_parts_stay_on_their_devices(way):
    """Nothing but sums goes from one device to another, as without parts."""
    for num_parts in (1, 4):
        text = compiled(num_parts, 8, size=64).as_text()
        kinds = r"\b(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
        assert set(re.findall(kinds, text)) == {"all-reduce"}
