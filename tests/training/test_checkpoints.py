"""Restored = never stopped; killed, refused and resharded runs; names; parameters alone."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from oracles import jit
from test_digests import Twins, trees

from fmjax import training
from fmjax.training import checkpoints, sharding

KEY = jax.random.key(5)
CONFIG = {"seed": 0, "num_steps": 100, "model": {"width": 16, "features": (8, 8)}, "rate": 1e-3}


TX = training.adam(1e-2, warmup_steps=5, clip_norm=1.0)


def loss_fn(params, key, x):
    x = x + jax.random.normal(key, x.shape)
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - 1.0) ** 2)


@jit
def init(key):
    key_w, key_v = jax.random.split(key)
    params = {"w": jax.random.normal(key_w, (3, 16)), "v": jax.random.normal(key_v, (16,))}
    return training.init_train_state(params, TX)


STEP = jit(training.make_train_step(loss_fn, TX), donate_argnums=0)


def train(state, num_steps):
    for n in range(int(state.step), int(state.step) + num_steps):
        state, _ = STEP(state, KEY, np.full((8, 3), n / 10, np.float32))
    return state


def make_state(params, ema_params=None, step=1, opt_state=()):
    ema_params = params if ema_params is None else ema_params
    return training.TrainState(jnp.int32(step), params, ema_params, opt_state)


def host(state):
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, host(a), host(b))
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


def test_restored_equals_never_stopped_to_the_last_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = "runs/lune d'été 月"  # Orbax itself takes no relative path
    whole = train(init(jax.random.key(0)), 20)
    with checkpoints.open_manager(folder) as manager:
        assert checkpoints.latest_step(manager) is None
        checkpoints.save(manager, train(init(jax.random.key(0)), 10), CONFIG)
    with checkpoints.open_manager(tmp_path / folder) as manager:
        assert checkpoints.latest_step(manager) == 10
        example = init(jax.random.key(1))  # other values: they must not be read
        state = checkpoints.restore(manager, example)
        assert isinstance(state, training.TrainState) and int(state.step) == 10
        abstract = jax.eval_shape(init, jax.random.key(1))
        assert_identical(checkpoints.restore(manager, abstract), state)
    assert_identical(train(state, 10), whole)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_save_in_progress_does_not_see_the_donated_steps(tmp_path, num_devices):
    # Four megabytes per leaf, so that the write is still going on when the buffers are reused.
    everywhere = sharding.replicated(sharding.make_mesh(jax.devices()[:num_devices]))
    start = make_state(np.arange(2.0**20, dtype=np.float32), np.ones(2**20, np.float32))
    state = jax.device_put(start, everywhere)
    bump = jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoints.open_manager(tmp_path) as manager:
        for _ in range(2):
            state = bump(state)
            expected = host(state)
            checkpoints.save(manager, state, {})
            for _ in range(10):
                old, state = state, bump(state)
            assert old.params.is_deleted()
            manager.wait_until_finished()
            assert_identical(checkpoints.restore(manager, state), expected)


def test_the_latest_are_kept_and_a_saved_step_is_not_saved_again(tmp_path):
    state = init(KEY)
    with checkpoints.open_manager(tmp_path, max_to_keep=2) as manager:
        for _ in range(4):
            state = train(state, 5)
            checkpoints.save(manager, state, CONFIG)
        checkpoints.save(manager, state, CONFIG, wait=True)
        assert list(manager.all_steps()) == [15, 20]
    with checkpoints.open_manager(tmp_path, max_to_keep=None) as manager:
        with pytest.raises(ValueError, match="must grow; got step 3 where .* holds step 20"):
            checkpoints.save(manager, train(init(KEY), 3), CONFIG)
        checkpoints.save(manager, train(state, 1), CONFIG, wait=True)
        assert list(manager.all_steps()) == [15, 20, 21]


def test_restore_into_another_sharding(tmp_path):
    mesh = sharding.make_mesh()
    state = train(init(KEY), 3)
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
        checkpoints.save(manager, train(init(KEY), 1), CONFIG)
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
        assert str(tmp_path) in lines[0] and "another folder" in lines[-1]
        checkpoints.check_config(
            manager, other, free={"num_steps", "model", "name", "rate", "seed"}
        )
        stored = checkpoints.restore_config(manager)
        assert stored is not None and stored["model"] == {"width": 16, "features": [8, 8]}
        with pytest.raises(TypeError):
            checkpoints.save(manager, train(init(KEY), 2), {"function": len})
        assert checkpoints.latest_step(manager) == 1


def test_fields_of_a_config_keep_their_names(tmp_path):
    config = {"a.b": 1, "a": {"b": 2, "c": {}}, "a/b": None}
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, make_state(jnp.ones(2)), config, wait=True)
        assert checkpoints.restore_config(manager) == config
        checkpoints.check_config(manager, config)
        other = {"a.b": 2, "a": {"b": 1, "c": {}}, "a/b": 0}
        with pytest.raises(ValueError) as error:
            checkpoints.check_config(manager, other, free={"a"})
        assert str(error.value).splitlines()[1:-1] == [
            "  a%2Eb: folder has 1, got 2",
            "  a%2Fb: folder has null, got 0",
        ]
        with pytest.raises(ValueError, match="must differ as strings"):
            checkpoints.save(manager, make_state(jnp.ones(2), step=2), {"a": {1: 2, "1": 3}})
        assert checkpoints.latest_step(manager) == 1


def test_restore_refuses_an_empty_folder(tmp_path):
    with checkpoints.open_manager(tmp_path) as manager:
        for restore in (checkpoints.restore, checkpoints.restore_params):
            with pytest.raises(ValueError, match="must hold a checkpoint; got none"):
                restore(manager, init(KEY))


@pytest.mark.parametrize("reloads", [False, True])
def test_a_checkpoint_that_goes_while_they_are_listed_is_listed_no_more(
    tmp_path, monkeypatch, reloads
):
    """A run that is still there makes room: first for what Orbax looks at a folder's age by."""
    with checkpoints.open_manager(tmp_path) as manager:
        for step in (1, 2):
            checkpoints.save(manager, make_state(jnp.ones(2), step=step), {}, wait=True)
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    age = ocp.path.step.Metadata.commit_timestamp.fget

    def found(metadata):
        if metadata.step == 1:
            shutil.rmtree(metadata.path)
        return age(metadata)

    def make_room():
        monkeypatch.setattr(ocp.path.step.Metadata, "commit_timestamp", property(found))

    if not reloads:
        make_room()
    with checkpoints.open_manager(tmp_path) as manager:
        if reloads:
            make_room()
            manager.reload()
        assert manager.all_steps() == [2]


def round_trip(state):
    with tempfile.TemporaryDirectory() as folder, checkpoints.open_manager(folder) as manager:
        checkpoints.save(manager, state, {}, wait=True)
        return checkpoints.restore(manager, state)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(trees)
def test_what_is_restored_is_what_was_saved_whatever_the_keys(tree):
    state = make_state(jax.tree.map(lambda n: np.full(2, n % 2**32, np.uint32), tree))
    assert_identical(round_trip(state), state)


@pytest.mark.parametrize("other", [jnp.full(3, 7.0), jnp.zeros(2), jnp.zeros((0, 3))])
def test_names_that_look_alike_and_arrays_without_elements(other):
    state = make_state({"a.b": jnp.ones(3), "a": {"b": other}, "key": jax.random.key(3)})
    restored = round_trip(state)
    data = jax.random.key_data
    assert (data(restored.params.pop("key")) == data(state.params.pop("key"))).all()
    assert_identical(restored._replace(ema_params=()), state._replace(ema_params=()))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Twins((jnp.ones(2), jnp.zeros(2))), "got two named 'params.same'"),
        ({"w": np.ones(2)}, "arrays of JAX; got float64 at params.w"),
        ({"w": 3.0}, "arrays of JAX; got 3.0 at params.w"),
    ],
)
def test_a_state_that_would_not_come_back_is_refused(tmp_path, params, message):
    with checkpoints.open_manager(tmp_path) as manager:
        with pytest.raises(ValueError, match=message):
            checkpoints.save(manager, make_state(params), {})
        assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_parameters_alone(tmp_path):
    params = {"w": jnp.arange(4, dtype=jnp.bfloat16), "a.b": jnp.ones(3), "a": {"b": jnp.zeros(3)}}
    average = jax.tree.map(lambda x: x.astype(jnp.float32) + 0.001, params)
    state = make_state(params, average, 7, {"mu": jax.random.normal(KEY, (50_000,))})
    shapes = jax.eval_shape(lambda: params)
    everywhere = sharding.replicated(sharding.make_mesh())
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, state, {}, wait=True)
        assert_identical(checkpoints.restore_params(manager, shapes), average)
        assert_identical(checkpoints.restore_params(manager, params, average=False), params)
        spread = checkpoints.restore_params(manager, shapes, sharding=everywhere)
        assert all(x.sharding == everywhere for x in jax.tree.leaves(spread))
        assert_identical(spread, average)
        for field, other, difference in (
            ("ema_params.w", params | {"w": jnp.ones(5)}, "float32[4], got float32[5]"),
            ("params.w", params | {"w": jnp.ones(4)}, "bfloat16[4], got float32[4]"),
            ("params.a.b", {"w": params["w"]}, "float32[3], got nothing"),
            ("params.v", params | {"v": ()}, "nothing, got empty"),
        ):
            with pytest.raises(ValueError) as error:
                checkpoints.restore_params(manager, other, average=field.startswith("ema"))
            assert f"  {field}: folder has {difference}" in str(error.value).splitlines()
    # The optimiser's state, which is not read, may be unreadable.
    sizes = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    largest = max(sizes, key=sizes.__getitem__)
    assert sizes[largest] > 150_000
    largest.write_bytes(b"")
    with checkpoints.open_manager(tmp_path) as manager:
        assert_identical(checkpoints.restore_params(manager, params, average=False), params)
        with pytest.raises(checkpoints.DamagedCheckpointError):
            checkpoints.restore(manager, state)


@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_an_average_has_the_dtype_that_it_is_stored_in(tmp_path, kept):
    params = {"w": jnp.full(3, 1.25, jnp.bfloat16), "v": jnp.ones(2), "n": jnp.arange(2)}
    average = params | {"w": jnp.full(3, 1.125, kept)}
    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, make_state(params, average), {}, wait=True)
        assert_identical(checkpoints.restore_params(manager, params), average)
        with pytest.raises(ValueError, match=rf"w: folder has {kept}\[3\], got int32\[3\]"):
            checkpoints.restore_params(manager, params | {"w": jnp.arange(3)})


KILLED = """
import sys, jax, jax.numpy as jnp
from fmjax import training
from fmjax.training import checkpoints

def make_state(step, size):
    noise = jax.random.normal(jax.random.key(0), size)  # does not compress
    return training.TrainState(jnp.int32(step), {"w": jnp.full(4, step), "noise": noise}, {}, ())

manager = checkpoints.open_manager(sys.argv[1])
checkpoints.save(manager, make_state(1, 8), {}, wait=True)
checkpoints.save(manager, make_state(2, 2**23), {}, wait=True)
"""


@pytest.mark.slow
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
    state = make_state({"w": jnp.full(4, 2), "noise": jnp.ones(8)}, {}, step=2)
    with checkpoints.open_manager(tmp_path) as manager:
        assert checkpoints.latest_step(manager) == 1
        restored = checkpoints.restore(manager, state)
        np.testing.assert_array_equal(restored.params["w"], 1)
        # The run goes on and saves the very step that was cut off.
        checkpoints.save(manager, state, {}, wait=True)
        assert_identical(checkpoints.restore(manager, state), state)
        assert list(manager.all_steps()) == [1, 2]


def test_orbax_says_nothing_and_loads_no_pickle(tmp_path, capfd, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    with checkpoints.open_manager(tmp_path) as manager:
        checkpoints.save(manager, init(KEY), CONFIG, wait=True)
        for name in ("load", "loads", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        checkpoints.check_config(manager, CONFIG)
        assert_identical(checkpoints.restore(manager, init(KEY)), init(KEY))
    assert capfd.readouterr() == ("", "")
