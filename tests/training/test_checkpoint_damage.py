"""Damaged checkpoints: found, named, passed over; never a wrong state, never a lost good one."""

import hashlib
import json
import random
import shutil

import jax
import jax.numpy as jnp
import pytest
from oracles import jit
from test_checkpoints import assert_identical

from fmjax import training
from fmjax.training import checkpoints


@jit
def make_state(step):
    key = jax.random.key(step)
    params = {"w": jax.random.normal(key, (300,)), "b": jnp.arange(12.0).reshape(3, 4) + step}
    opt_state = (jnp.int32(step), None, {"mu": jnp.full(5, step, jnp.bfloat16)})
    average = jax.tree.map(lambda x: x + 1, params)
    return training.TrainState(jnp.int32(step), params, average, opt_state)


EXAMPLE = make_state(77)


def save(folder, *steps):
    with checkpoints.open_manager(folder) as manager:
        for step in steps:
            checkpoints.save(manager, make_state(step), {"seed": step}, wait=True)
    return folder


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def content(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest() for p in files(folder)}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_record(folder, old, new):
    record = folder / "2" / "record" / "metadata"
    assert old in record.read_text()
    record.write_text(record.read_text().replace(old, new, 1))


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole") / "checkpoints", 1, 2)


# Orbax leaves the reads that it gave up to the interpreter, which mentions them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["cut", "emptied", "missing", "flip 0", "flip 1", "flip 2"])
def test_any_damaged_file_is_harmless_or_found(pristine, tmp_path, kind):
    rng, found = random.Random(kind), 0
    for number, path in enumerate(p.relative_to(pristine) for p in files(pristine / "2")):
        folder = tmp_path / str(number)
        shutil.copytree(pristine, folder)
        if kind == "cut":
            cut(folder / path)
        elif kind == "emptied":
            (folder / path).write_bytes(b"")
        elif kind == "missing":
            (folder / path).unlink()
        else:
            flip(folder / path, rng)
        with checkpoints.open_manager(folder) as manager:
            config = checkpoints.restore_config(manager)
            try:
                average = checkpoints.restore_params(manager, EXAMPLE.params)
                assert_identical(average, make_state(2).ema_params)
            except checkpoints.DamagedCheckpointError:
                pass
            state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
            assert checkpoints.latest_step(manager) == int(state.step)
        assert_identical(state, make_state(2 if not damaged else 1))
        assert [d.step for d in damaged] == [2] * len(damaged)
        assert (folder / "2").exists() != (folder / "2.damaged").exists() == bool(damaged)
        assert config in ({"seed": 1}, {"seed": 2}) and (config == {"seed": 2} or damaged)
        found += len(damaged)
    assert found >= 4, "the damage must have met what counts"


def test_values_that_read_well_but_are_others_are_found_and_named(pristine, tmp_path):
    # The whole state of another step: every checksum on the disk is right.
    folder = shutil.copytree(pristine, tmp_path / "c")
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    before = content(folder)
    with checkpoints.open_manager(folder) as manager:
        with pytest.raises(checkpoints.DamagedCheckpointError) as error:
            checkpoints.restore(manager, EXAMPLE)
        assert content(folder) == before
        assert str(error.value) == (
            f"A checkpoint must be what was saved; damaged in {folder}: step 2: 7 digests are not "
            "those of the saved values: of step, params.b, params.w, ema_params.b, ema_params.w. "
            "restore_latest_good goes back to the last good one: a run that starts again does so."
        )
        state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
        assert damaged == error.value.damaged
    assert_identical(state, make_state(1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_run_goes_on_from_the_one_before_and_saves_the_same_steps_again(tmp_path):
    folder = save(tmp_path / "c", 1, 2, 3)
    for _ in range(2):  # the second time, 3.damaged is there already
        for step in (2, 3):
            cut(folder / str(step) / "state" / "manifest.ocdbt")
        with checkpoints.open_manager(folder) as manager:
            state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
            assert [d.step for d in damaged] == [3, 2] and all("DATA_LOSS" in d[1] for d in damaged)
            assert_identical(state, make_state(1))
            assert list(manager.all_steps()) == [1]
            for step in (2, 3):
                checkpoints.save(manager, make_state(step), {"seed": step})
        with checkpoints.open_manager(folder) as manager:
            again, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
            assert not damaged
            assert_identical(again, make_state(3))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["1", "2", "2.damaged", "2.damaged-1", "3", "3.damaged", "3.damaged-1"]
    assert (folder / "3.damaged-1" / "state" / "manifest.ocdbt").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_with_none_left_nothing_is_touched(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "c")
    cut(folder / "1" / "state" / "manifest.ocdbt")
    cut(folder / "1" / "record" / "metadata")
    change_record(folder, '"seed": 2', '"seed": 3')
    before = content(folder)
    with checkpoints.open_manager(folder) as manager:
        with pytest.raises(checkpoints.DamagedCheckpointError, match="No good one is left") as e:
            checkpoints.restore_latest_good(manager, EXAMPLE)
        assert [d.step for d in e.value.damaged] == [2, 1]
        assert "record is not the one that was saved" in e.value.damaged[0].reason
        with pytest.raises(checkpoints.DamagedCheckpointError, match="No good one is left"):
            checkpoints.check_config(manager, {"seed": 2})
    assert content(folder) == before


# Wrong, but well-formed: the config, and what would make the state another model's.
@pytest.mark.parametrize("change", [('"seed": 2', '"seed": 1'), ("float32[300]", "float32[308]")])
def test_a_damaged_record_is_damage_and_passed_over(pristine, tmp_path, change):
    folder = shutil.copytree(pristine, tmp_path / "c")
    change_record(folder, *change)
    with checkpoints.open_manager(folder) as manager:
        assert checkpoints.restore_config(manager) == {"seed": 1}
        state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
        assert damaged[0].step == 2 and "record is not the one" in damaged[0].reason
    assert_identical(state, make_state(1))


def test_an_array_that_is_gone_is_damage(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "c")
    path = folder / "2" / "state" / "_METADATA"
    listed = json.loads(path.read_text())
    del listed["tree_metadata"]["('ema_params.w',)"]
    path.write_text(json.dumps(listed))
    with checkpoints.open_manager(folder) as manager:
        for restore, example in (
            (checkpoints.restore, EXAMPLE),
            (checkpoints.restore_params, EXAMPLE.params),
        ):
            with pytest.raises(checkpoints.DamagedCheckpointError, match="no array ema_params.w"):
                restore(manager, example)
        last = checkpoints.restore_params(manager, EXAMPLE.params, average=False)
    assert_identical(last, make_state(2).params)


OTHER = {
    "params.w: folder has float32[300], got float32[8]": lambda s: s._replace(
        params=s.params | {"w": jnp.ones(8)}
    ),
    "params.b: folder has float32[3,4], got nothing": lambda s: s._replace(
        params={"w": s.params["w"]}
    ),
    "opt_state.1: folder has empty, got nothing": lambda s: s._replace(opt_state=s.opt_state[:1]),
    "step: folder has int32[], got float32[]": lambda s: s._replace(step=jnp.float32(0)),
}


@pytest.mark.parametrize("line", OTHER)
def test_another_model_is_refused_and_is_no_damage(pristine, tmp_path, line):
    folder = shutil.copytree(pristine, tmp_path / "c")
    before = content(folder)
    with checkpoints.open_manager(folder) as manager:
        for restore in (checkpoints.restore, checkpoints.restore_latest_good):
            with pytest.raises(ValueError) as error:
                restore(manager, OTHER[line](EXAMPLE))
            assert not isinstance(error.value, checkpoints.DamagedCheckpointError)
            assert f"  {line}" in str(error.value).splitlines()
    assert content(folder) == before


def test_the_digest_is_taken_before_the_state_is_donated(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = bump(make_state(3))
    with checkpoints.open_manager(tmp_path) as manager:
        for _ in range(3):
            checkpoints.save(manager, state, {})
            state = bump(state)
        assert int(checkpoints.restore(manager, EXAMPLE).step) == 6
