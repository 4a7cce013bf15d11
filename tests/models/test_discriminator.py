"""The discriminator: its derivatives, its classes, its examples apart, what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import x64 as x64

from fmjax.flow_maps import gradient_penalty
from fmjax.models import Discriminator

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MODEL = Discriminator(channels=4, channel_multipliers=(1, 2), num_classes=3)
LABELS = jnp.array([0, 2, 1])


def setup(dtype=jnp.float32):
    """Images and parameters that are all random."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 4, 2, 2)), dtype)
    model = MODEL.clone(param_dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), dtype), shapes)
    return model, params, x


def apply(model, *args) -> Any:
    return model.apply(*args)


def test_the_class_enters_by_its_product_with_the_features():
    """A class whose embedding is w says w f(x) once more, of each image."""
    model, params, x = setup()
    tree = params["params"]
    (last,) = (
        tree[name] for name in tree if name.startswith("Dense") and tree[name]["bias"].size == 1
    )
    rows = {"embedding": jnp.tile(last["kernel"].T, (4, 1)).at[1].set(0.0)}
    compiled = jit(model.apply)
    known = compiled({"params": tree | {"label": rows}}, x, jnp.zeros(3, int))
    none = compiled({"params": tree | {"label": rows}}, x, jnp.ones(3, int))
    np.testing.assert_allclose(known - none, none - last["bias"], rtol=1e-5)
    assert np.std(known - none) > 0.01


@pytest.mark.slow
def test_examples_are_apart_and_jit_changes_nothing():
    model, params, x = setup()
    d, compiled = apply(model, params, x, LABELS), jit(model.apply)
    each = [compiled(params, x[k : k + 1], LABELS[k : k + 1])[0] for k in range(3)]
    np.testing.assert_allclose(d, each, rtol=1e-5)
    np.testing.assert_allclose(compiled(params, x, LABELS), d, rtol=1e-5)
    assert np.ptp(d) > 0.1


def test_the_penalty_and_its_gradient_against_finite_differences(x64):
    model, params, x = setup(jnp.float64)
    rng, step = np.random.default_rng(1), 1e-5
    along = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)

    def penalty(h):
        moved = jax.tree.map(lambda p, a: p + h * a, params, along)
        return gradient_penalty(lambda x: apply(model, moved, x, LABELS), x)

    @jit
    def slopes(pixel):
        up, down = (apply(model, params, x + sign * step * pixel, LABELS) for sign in (1, -1))
        return (up - down) / (2 * step)

    pixels = np.eye(x[0].size).reshape(-1, 1, *x.shape[1:])
    exact = np.sum([np.asarray(slopes(pixel)) ** 2 for pixel in pixels], axis=0)
    value, slope = jit(lambda h: jax.jvp(penalty, (h,), (1.0,)))(0.0)
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    up, down = (jit(penalty)(h) for h in (step, -step))
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5)


def test_a_class_enters_by_projection():
    """D(x, y) - D(x, y') = <E[y] - E[y'], f(x)>: linear in the table, zero for equal rows."""
    model, params, x = setup()
    table = params["params"]["label"]["embedding"]
    same = {"params": params["params"] | {"label": {"embedding": table.at[0].set(table[1])}}}
    zero, one, null = (apply(model, same, x, jnp.full(3, label)) for label in (0, 1, 3))
    np.testing.assert_array_equal(zero, one)
    np.testing.assert_array_equal(apply(model, same, x), null)
    assert np.abs(null - one).min() > 1e-3
    twice = {"params": same["params"] | {"label": {"embedding": 2 * table.at[0].set(table[1])}}}
    further = apply(model, twice, x, jnp.full(3, 3)) - apply(model, twice, x, jnp.full(3, 1))
    np.testing.assert_allclose(further, 2 * (null - one), rtol=1e-4)


def test_bad_input_is_refused():
    model, params, x = setup()
    with pytest.raises(ValueError, match="divisible.*need fewer levels"):
        apply(model, params, x[:, :3])
    with pytest.raises(ValueError, match=r"x\[None\]"):
        apply(model, params, x[0])
    with pytest.raises(ValueError, match="labels must be in 0..3"):
        apply(model, params, x, LABELS + 2)
    with pytest.raises(ValueError, match="labels need a model with classes"):
        apply(MODEL.clone(num_classes=None), params, x, LABELS)
