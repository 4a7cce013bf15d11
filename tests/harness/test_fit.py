"""Training without a run folder: the numbers of a loop by hand, and of a run folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from made_runs import losses, params_at

from fmjax import data, harness
from fmjax.harness import keys
from fmjax.training import sharding


def task():
    return tiny.make_task(tiny.Config())


def by_hand(num_steps, seed=0):
    """State and losses of a plain loop, the batches split over the devices."""
    made, mesh = task(), sharding.make_mesh()
    state = jax.jit(made.init, out_shardings=sharding.replicated(mesh))(
        keys.key(seed, "parameters")
    )
    step, order, found = jax.jit(made.step), data.batches(tiny.NUM, 16, seed=seed), []
    for _ in range(num_steps):
        batch = sharding.shard_batch(made.batch(next(order)), mesh)
        state, metrics = step(state, keys.key(seed, "training"), batch)
        found.append(float(metrics.loss))
    return state, found


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_fit_is_the_loop_by_hand_to_the_bit():
    state, found = harness.fit(task(), 12, batch_size=16, seed=3)
    want, want_losses = by_hand(12, seed=3)
    assert_same(state, want)
    assert found.dtype == np.float32 and found.tolist() == np.float32(want_losses).tolist()
    other, _ = harness.fit(task(), 12, batch_size=16, seed=4)
    assert not np.array_equal(other.params["w"], state.params["w"])


@pytest.mark.slow
def test_fit_goes_on_from_a_state():
    whole, all_losses = harness.fit(task(), 12, batch_size=16)
    half, first = harness.fit(task(), 5, batch_size=16)
    state, second = harness.fit(task(), 12, batch_size=16, state=half)
    assert_same(state, whole)
    np.testing.assert_array_equal(np.concatenate([first, second]), all_losses)
    again, none = harness.fit(task(), 12, batch_size=16, state=state)  # nothing is left to do
    assert int(again.step) == 12 and none.shape == (0,)


@pytest.mark.slow
def test_fit_and_a_run_folder_give_the_same_parameters(tmp_path):
    state, found = harness.fit(task(), 12, batch_size=16)
    harness.train(tiny.Config(workdir=tmp_path, num_steps=12, log_every=1), tiny.make_task)
    np.testing.assert_allclose(losses(tmp_path), found, rtol=1e-6)
    for name in ("params", "ema_params"):
        kept, want = params_at(tmp_path, 12, name), getattr(state, name)
        for leaf in want:
            np.testing.assert_allclose(kept[leaf], want[leaf], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [1, 4, 6])
def test_a_loss_that_is_not_finite_is_named_by_its_step(bad):
    made = task()

    def step(state, key, batch):
        state, metrics = made.step(state, key, batch)
        return state, metrics._replace(loss=jnp.where(state.step == bad, jnp.nan, metrics.loss))

    with pytest.raises(FloatingPointError, match=f"The loss of step {bad} is nan"):
        harness.fit(made._replace(step=step), 6, batch_size=16)


def test_batches_that_can_not_be_filled_are_refused():
    with pytest.raises(ValueError, match="multiple of the number of devices.*got 12"):
        harness.fit(task(), 2, batch_size=12)
    with pytest.raises(ValueError, match="batch_size must be .*60.*got 64"):
        harness.fit(task(), 2, batch_size=64)
