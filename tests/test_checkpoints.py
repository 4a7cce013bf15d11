"""Restored = never stopped; killed, refused and resharded runs."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import checkpoints, sharding, training

KEY = jax.random.key(5)
CONFIG = {"seed": 0, "num_steps": 100, "model": {"width": 16, "features": (8, 8)}, "rate": 1e-3}


def make_run(width=16):
    tx = training.adam(1e-2, warmup_steps=5, clip_norm=1.0)

    def loss_fn(params, key, x):
        x = x + jax.random.normal(key, x.shape)
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1.0) ** 2)

    def init(key):
        key_w, key_v = jax.random.split(key)
        params = {
            "w": jax.random.normal(key_w, (3, width)),
            "v": jax.random.normal(key_v, (width,)),
        }
        return training.init_train_state(params, tx)

    step = jax.jit(training.make_train_step(loss_fn, tx), donate_argnums=0)
    return init, step


INIT, STEP = make_run()


def train(state, num_steps, step=STEP):
    for n in range(int(state.step), int(state.step) + num_steps):
        state, _ = step(state, KEY, jnp.full((8, 3), n / 10))
    return state


def host(state):
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def test_restored_equals_never_stopped_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "runs/lune d'été 月"  # Orbax itself takes no relative path
    whole = train(INIT(jax.random.key(0)), 20)
    with checkpoints.open_manager(folder) as manager:
        assert checkpoints.latest_step(manager) is None
        checkpoints.save(manager, train(INIT(jax.random.key(0)), 10), CONFIG)
    with checkpoints.open_manager(tmp_path / folder) as manager:
        assert checkpoints.latest_step(manager) == 10
        example = INIT(jax.random.key(1))  # other values: they must not be read
        state = checkpoints.restore(manager, example)
        assert isinstance(state, training.TrainState) and int(state.step) == 10
        abstract = jax.eval_shape(INIT, jax.random.key(1))
        assert_identical(checkpoints.restore(manager, abstract), state)
    assert_identical(train(state, 10), whole)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_save_in_progress_does_not_see_the_donated_steps(tmp_path, num_devices):
    # Four megabytes per leaf, so that the write is still going on when the buffers are reused.
    place = sharding.replicated(sharding.make_mesh(jax.devices()[:num_devices]))
    start = jax.tree.map(jnp.zeros_like, INIT(KEY))
    start = start._replace(params={"w": jnp.arange(2.0**20)}, ema_params={"w": jnp.ones(2**20)})
    state = jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=place)(start)
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoints.open_manager(tmp_path) as manager:
        for _ in range(3):
            state = bump(state)
            expected = host(state)
            checkpoints.save(manager, state, {})
            for _ in range(10):
                old, state = state, bump(state)
            assert old.params["w"].is_deleted()
            manager.wait_until_finished()
            assert_identical(checkpoints.restore(manager, state), expected)


def test_the_latest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    state = INIT(KEY)
    with checkpoints.open_manager(tmp_path, max_to_keep=2) as manager:
        for _ in range(4):
            state = train(state, 5)
            checkpoints.save(manager, state, CONFIG)
        checkpoints.save(manager, state, CONFIG, wait=True)
        assert list(manager.all_steps()) == [15, 20]
    with checkpoints.open_manager(tmp_path, max_to_keep=None) as manager:
        with pytest.raises(ValueError, match="must grow; got step 3 where .* holds step 20"):
            checkpoints.save(manager, train(INIT(KEY), 3), CONFIG)
        checkpoints.save(manager, train(state, 1), CONFIG, wait=True)
        assert list(manager.all_steps()) == [15, 20, 21]


def test_restore_into_another_sharding(tmp_path):
    mesh = sharding.make_mesh()
    state = train(INIT(KEY), 3)
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, state, CONFIG, wait=True)
        spread = checkpoints.restore(manager, state, sharding.replicated(mesh))
    for leaf in jax.tree.leaves(spread):
        assert leaf.is_fully_replicated and len(leaf.sharding.device_set) == 8
    assert_identical(spread, state)
    # And back: from eight devices to one.
    with checkpoints.open_manager(tmp_path / "eight") as manager:
        checkpoints.save(manager, spread, CONFIG, wait=True)
        back = checkpoints.restore(manager, state)
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(back))
    assert_identical(back, state)


def test_another_config_is_refused_field_by_field(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.check_config(manager, {"anything": "goes"})  # nothing to go on with
        assert checkpoints.restore_config(manager) is None
        checkpoints.save(manager, train(INIT(KEY), 1), CONFIG)
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.check_config(manager, CONFIG)
        other = {
            "seed": 1,
            "num_steps": 200,
            "model": {"width": 32, "features": (8, 8)},
            "name": "x",
        }
        with pytest.raises(ValueError) as error:
            checkpoints.check_config(manager, other, free={"num_steps"})
        lines = str(error.value).splitlines()
        assert lines[1:-1] == [
            "  model.width: folder has 16, got 32",
            '  name: folder has nothing, got "x"',
            "  rate: folder has 0.001, got nothing",
            "  seed: folder has 0, got 1",
        ]
        assert str(tmp_path) in lines[0] and "--workdir" in lines[-1]
        checkpoints.check_config(
            manager, other, free={"num_steps", "model", "name", "rate", "seed"}
        )
        stored = checkpoints.restore_config(manager)
        assert stored is not None and stored["model"] == {"width": 16, "features": [8, 8]}
        with pytest.raises(TypeError):
            checkpoints.save(manager, train(INIT(KEY), 2), {"function": len})
        assert checkpoints.latest_step(manager) == 1


def test_restore_refuses_an_empty_folder_and_another_model(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        with pytest.raises(ValueError, match="must hold a checkpoint; got none"):
            checkpoints.restore(manager, INIT(KEY))
        checkpoints.save(manager, train(INIT(KEY), 1), CONFIG, wait=True)
        init, _ = make_run(width=8)
        with pytest.raises(ValueError):
            checkpoints.restore(manager, init(KEY))


KILLED = """
import sys, jax, jax.numpy as jnp
from fmjax import checkpoints, training

def state(step, size):
    noise = jax.random.normal(jax.random.key(0), size)  # does not compress
    return training.TrainState(jnp.int32(step), {"w": jnp.full(4, step), "noise": noise}, {}, ())

manager = checkpoints.open_manager(sys.argv[1])
checkpoints.save(manager, state(1, 8), {}, wait=True)
checkpoints.save(manager, state(2, 2**23), {}, wait=True)
"""


def test_a_save_that_was_killed_is_no_checkpoint(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=env) as process:
        # Killed as soon as anything of step 2 is seen, while its 32 megabytes are being written.
        while process.poll() is None and not list(tmp_path.glob("2*")):
            time.sleep(1e-3)
        process.kill()
    leftovers = [path.name for path in tmp_path.glob("2*")]
    assert leftovers and leftovers != ["2"], leftovers
    state = training.TrainState(jnp.int32(2), {"w": jnp.full(4, 2), "noise": jnp.ones(8)}, {}, ())
    with checkpoints.open_manager(tmp_path) as manager:
        assert checkpoints.latest_step(manager) == 1
        restored = checkpoints.restore(manager, state)
        np.testing.assert_array_equal(restored.params["w"], 1)
        # The run goes on and saves the very step that was cut off.
        checkpoints.save(manager, state, {}, wait=True)
        assert_identical(checkpoints.restore(manager, state), state)
        assert list(manager.all_steps()) == [1, 2]


def test_orbax_says_nothing(tmp_path, capfd):
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, train(INIT(KEY), 1), CONFIG, wait=True)
        checkpoints.check_config(manager, CONFIG)
        checkpoints.restore(manager, INIT(KEY))
    assert capfd.readouterr() == ("", "")
