"""Properties over shapes, dtypes, seeds and batch sizes, by Hypothesis."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fmjax as fm
from experiments import two_moons
from fmjax import data, training
from fmjax.data import pixels
from fmjax.harness import loop
from fmjax.types import broadcast_time

FLOATS = st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16])
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
few = settings(max_examples=10, deadline=None)  # each compiles


@pytest.mark.slow
@few
@given(
    num=st.integers(1, 40), share=st.integers(1, 40), seed=st.integers(0, 9), at=st.integers(0, 60)
)
def test_batches_cover_every_epoch_once_and_can_be_entered_anywhere(num, share, seed, at):
    size = min(num, share)
    begun = list(itertools.islice(data.batches(num, size, seed=seed), at + 3))
    entered = list(itertools.islice(data.batches(num, size, seed=seed, start_step=at), 3))
    for a, b in zip(begun[at:], entered, strict=True):
        np.testing.assert_array_equal(a, b)
    seen = np.concatenate(begun)
    for epoch in range(len(seen) // num):
        np.testing.assert_array_equal(
            np.sort(seen[epoch * num : (epoch + 1) * num]), np.arange(num)
        )


@few
@given(
    start=st.integers(0, 30),
    steps=st.integers(1, 30),
    per_dispatch=st.sampled_from([1, 2, 3, 5, 10]),
)
def test_dispatches_are_the_steps_in_order_and_cut_where_checkpoints_are(
    start, steps, per_dispatch
):
    config = two_moons.Config(
        num_steps=start + steps,
        batch_size=8,
        steps_per_dispatch=per_dispatch,
        checkpoint_every=3 * per_dispatch,
    )
    found = list(loop.dispatches(config, 50, start))
    numbers = [n for d in found for n in range(d.first, d.last + 1)]
    assert numbers == list(range(start + 1, start + steps + 1))
    ends = {d.last for d in found}
    assert {n for n in numbers if n % config.checkpoint_every == 0} <= ends
    rows = np.concatenate([d.rows for d in found])
    batches = itertools.islice(data.batches(50, 8, seed=0, start_step=start), steps)
    np.testing.assert_array_equal(rows, np.stack(list(batches)))


@pytest.mark.slow
@few
@given(shape=SHAPES, dtype=FLOATS, batched=st.booleans(), seed=st.integers(0, 99))
def test_paths_keep_shape_and_dtype_and_a_batch_is_its_examples(shape, dtype, batched, seed):
    key_x0, key_x1, key_t = jax.random.split(jax.random.key(seed), 3)
    x0, x1 = (jax.random.normal(key, shape, dtype) for key in (key_x0, key_x1))
    t = jax.random.uniform(key_t, shape[:1] if batched else (), dtype, 0.1, 0.9)
    drawn = fm.sample_path(fm.cond_ot(), x0, x1, t)
    assert drawn.x_t.shape == drawn.u_t.shape == shape and drawn.x_t.dtype == dtype
    wide = jnp.broadcast_to(broadcast_time(t, x0), shape).astype(jnp.float32)
    expected = wide * x1 + (1 - wide) * x0
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        drawn.x_t.astype(jnp.float32), expected.astype(jnp.float32), atol=16 * eps
    )
    loss = fm.cfm_loss(lambda t, x: jnp.zeros_like(x), drawn)
    assert loss.shape == shape[:1]


@pytest.mark.slow
@few
@given(levels=st.integers(2, 256), seed=st.integers(0, 99), shape=SHAPES)
def test_quantize_undoes_dequantize(levels, seed, shape):
    key_v, key_u = jax.random.split(jax.random.key(seed))
    v = jax.random.randint(key_v, shape, 0, levels).astype(jnp.uint8)
    back = pixels.quantize(pixels.dequantize(key_u, v, levels), levels)
    np.testing.assert_array_equal(back, v)


@pytest.mark.slow
@few
@given(n=st.integers(1, 12), dim=st.integers(1, 5), dtype=FLOATS, seed=st.integers(0, 99))
def test_pairing_permutes_and_never_costs_more_than_the_pairs_drawn(n, dim, dtype, seed):
    key_x0, key_x1 = jax.random.split(jax.random.key(seed))
    x0, x1 = (jax.random.normal(key, (n, dim), dtype) for key in (key_x0, key_x1))
    paired = fm.minibatch_ot(jax.random.key(0), x0, x1)
    assert paired.dtype == dtype
    order = lambda x: sorted(map(tuple, np.asarray(x, np.float32)))  # noqa: E731
    assert order(paired) == order(x0)

    def cost(x0):
        return np.sum((np.asarray(x0, np.float64) - np.asarray(x1, np.float64)) ** 2)

    assert cost(paired) <= cost(x0) * (1 + 1e-5)


@pytest.mark.slow
@few
@given(
    steps=st.integers(1, 6), size=st.integers(1, 5), dtype=st.sampled_from(["float32", "bfloat16"])
)
def test_many_steps_are_the_single_ones(steps, size, dtype):
    tx = training.adam(1e-2)

    def loss_fn(params, key, x):
        return jnp.mean((x - params + jax.random.normal(key, x.shape, x.dtype)) ** 2)

    step = training.make_train_step(loss_fn, tx, ema_decay=0.9)
    x = jnp.asarray(np.random.default_rng(steps).standard_normal((steps, size)), dtype)
    state = training.init_train_state(jnp.zeros((), dtype), tx)
    many, metrics = jax.jit(training.many_steps(step))(state, jax.random.key(0), x)
    for batch in x:
        state, last = jax.jit(step)(state, jax.random.key(0), batch)
    assert metrics.loss.shape == (steps,)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(metrics.loss[-1], last.loss, rtol=8 * eps)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=8 * eps, atol=8 * eps
        )


def test_a_property_that_is_false_is_found():
    """The examples are drawn at all."""

    @few
    @given(st.integers(0, 100))
    def wrong(n):
        assert n < 50

    with pytest.raises(AssertionError):
        wrong()
