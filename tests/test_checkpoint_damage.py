"""Damaged checkpoints: found, named, passed over; never a wrong state, never a lost good one."""

import hashlib
import pickle
import random
import shutil

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from test_checkpoints import assert_identical

from fmjax import checkpoints, training


def make_state(step, width=300):
    key = jax.random.key(step)
    params = {"w": jax.random.normal(key, (width,)), "b": jnp.arange(12.0).reshape(3, 4) + step}
    opt_state = (jnp.int32(step), None, {"mu": jnp.full(5, step, jnp.bfloat16)})
    return training.TrainState(jnp.int32(step), params, {"w": params["w"] + 1}, opt_state)


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
        lines = str(error.value).splitlines()
        assert str(folder) in lines[0] and lines[1].startswith("  step 2: the digests of step, ")
        assert "params.b" in lines[1] and "restore_latest_good" in lines[2]
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
    cut(folder / "1" / "config" / "metadata")
    (folder / "2" / "config" / "metadata").write_text('{"seed": 3}')
    before = content(folder)
    with checkpoints.open_manager(folder) as manager:
        with pytest.raises(checkpoints.DamagedCheckpointError, match="No whole one is left") as e:
            checkpoints.restore_latest_good(manager, EXAMPLE)
        assert [d.step for d in e.value.damaged] == [2, 1]
        assert "config is not the one that was saved" in e.value.damaged[0].reason
        with pytest.raises(checkpoints.DamagedCheckpointError, match="No whole one is left"):
            checkpoints.check_config(manager, {"seed": 2})
    assert content(folder) == before


def test_a_damaged_config_is_passed_over_by_check_config(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "c")
    (folder / "2" / "config" / "metadata").write_text('{"seed": 1}')  # wrong, but well-formed
    with checkpoints.open_manager(folder) as manager:
        assert checkpoints.restore_config(manager) == {"seed": 1}
        state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
        assert int(state.step) == 1 and damaged[0].step == 2


def test_a_damaged_record_is_damage_and_not_another_model(pristine, tmp_path):
    folder = shutil.copytree(pristine, tmp_path / "c")
    record = folder / "2" / "digest" / "metadata"
    assert "float32[300]" in record.read_text()
    record.write_text(record.read_text().replace("float32[300]", "float32[308]", 1))
    with checkpoints.open_manager(folder) as manager:
        state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
    assert_identical(state, make_state(1))
    assert "record of digests" in damaged[0].reason


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


def save_without_digests(folder, *steps):
    with ocp.CheckpointManager(folder, item_names=("state", "config")) as manager:
        for step in steps:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(make_state(step)),
                config=ocp.args.JsonSave({"seed": step}),
            )
            manager.save(step, args=items)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_from_before_the_digests_restore_with_a_warning(tmp_path):
    save_without_digests(tmp_path / "c", 1, 2)
    with checkpoints.open_manager(tmp_path / "c") as manager:
        with pytest.warns(UserWarning, match="2 was saved without digests"):
            assert_identical(checkpoints.restore(manager, EXAMPLE), make_state(2))
        checkpoints.check_config(manager, {"seed": 2})
        with pytest.warns(UserWarning), pytest.raises(ValueError) as error:
            checkpoints.restore_latest_good(manager, make_state(0, width=8))
        assert not isinstance(error.value, checkpoints.DamagedCheckpointError)
        cut(tmp_path / "c" / "2" / "state" / "manifest.ocdbt")
        with pytest.warns(UserWarning):
            state, damaged = checkpoints.restore_latest_good(manager, EXAMPLE)
        assert_identical(state, make_state(1))
        checkpoints.save(manager, make_state(2), {"seed": 2}, wait=True)
        assert_identical(checkpoints.restore(manager, EXAMPLE), make_state(2))


def test_the_digest_is_taken_before_the_state_is_donated(tmp_path):
    bump = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = bump(make_state(3))
    with checkpoints.open_manager(tmp_path) as manager:
        for _ in range(3):
            checkpoints.save(manager, state, {})
            state = bump(state)
        assert int(checkpoints.restore(manager, EXAMPLE).step) == 6


def test_no_pickle_is_loaded(pristine, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a pickle was loaded")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with checkpoints.open_manager(pristine) as manager:
        assert_identical(checkpoints.restore(manager, EXAMPLE), make_state(2))
