"""Full disks, other meshes and several processes: the last good checkpoint comes back."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_checkpoints import assert_identical

from fmjax import training
from fmjax.training import checkpoints, sharding

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_sharded_states_restore_into_another_mesh(tmp_path):
    mesh = sharding.make_mesh()
    whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    state = training.TrainState(
        jnp.int32(4),
        {"w": jnp.arange(64.0).reshape(8, 8)},
        {"w": jnp.ones((16, 3))},
        (jnp.ones(8),),
    )
    places = training.TrainState(whole, {"w": split}, {"w": split}, (split,))
    spread = jax.device_put(state, places)
    small = NamedSharding(sharding.make_mesh(jax.devices()[:2]), PartitionSpec("data"))
    with checkpoints.open_manager(tmp_path / "eight") as manager:
        checkpoints.save(manager, spread, {}, wait=True)
        one = checkpoints.restore(manager, state)  # to one device
        two = checkpoints.restore(manager, state, places._replace(params=small))
    assert_identical(one, state)
    assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(one))
    assert_identical(two, state)
    assert two.params["w"].sharding == small
    with checkpoints.open_manager(tmp_path / "one") as manager:
        checkpoints.save(manager, state, {}, wait=True)
        again = checkpoints.restore_latest_good(manager, jax.eval_shape(lambda: state), places)
        assert checkpoints.restore(manager, spread).params["w"].sharding == split
    assert_identical(again.state, state)
    assert jax.tree.map(lambda x: x.sharding, again.state) == places
    assert again.state.params["w"].addressable_shards[0].data.shape == (1, 8)


FULL = """
import os, pathlib, sys, time
import jax, jax.numpy as jnp
from fmjax import training
from fmjax.training import checkpoints

def state(step):
    noise = jax.random.normal(jax.random.key(step), (50_000,))  # 200 kB that do not compress
    return training.TrainState(jnp.int32(step), {"w": noise}, {}, ())

disk, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1]) / "checkpoints"
good, step, errors = 1, 1, 0
with checkpoints.open_manager(folder, max_to_keep=1) as manager:
    checkpoints.save(manager, state(1), {}, wait=True)
# From no free block to enough for the whole checkpoint: the disk fills at every stage of a save.
for number, free in enumerate([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 200, 256, 400]):
    filler = disk / "filler"
    stat = os.statvfs(disk)
    filler.write_bytes(bytes(max(stat.f_bavail * stat.f_frsize - free * 1024, 0)))
    step += 1
    try:
        with checkpoints.open_manager(folder, max_to_keep=1) as manager:
            checkpoints.save(manager, state(step), {}, wait=number % 2 == 0)
            if number % 4 == 1:
                time.sleep(0.1)
                checkpoints.save(manager, state(step + 1), {})  # meets the error of the one before
                step += 1
        good = step
    except checkpoints.CheckpointSaveError as error:
        errors += 1
        assert "No space left" in str(error) and f"the last good one is step {good}" in str(error)
        assert f"of step {step} was" in str(error) or f"of step {step + 1} was" in str(error), error
        print(error)
    with checkpoints.open_manager(folder, max_to_keep=1) as manager:  # the disk is still full
        restored = checkpoints.restore(manager, state(0))
    on_disk = {int(p.name) for p in folder.iterdir() if p.name.isdigit()}
    assert int(restored.step) == max(on_disk) >= good, (on_disk, good)
    good = max(on_disk)
    assert (restored.params["w"] == state(good).params["w"]).all()
    step = max(step, good)
    filler.unlink()
with checkpoints.open_manager(folder) as manager:
    checkpoints.save(manager, state(step + 1), {})
with checkpoints.open_manager(folder) as manager:
    assert int(checkpoints.restore(manager, state(0)).step) == step + 1
print("errors", errors)
"""


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_leaves_the_last_good_checkpoint(tmp_path):
    inside = 'mount -t tmpfs -o size=4m none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", inside, "sh", str(tmp_path), sys.executable, FULL]
    if shutil.which("unshare") is None:
        pytest.skip("a small disk needs unshare(1) and mount(8)")
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    if done.returncode == 77 or "unshare failed" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()[:200]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 5, done.stdout
    assert "Traceback" not in done.stdout


POD = """
import functools, pathlib, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
folder, port, process = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=60)
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from fmjax import training
from fmjax.training import checkpoints, sharding

mesh = sharding.make_mesh()
whole, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
places = training.TrainState(whole, {"w": split}, {"w": split}, (split,))

@functools.partial(jax.jit, out_shardings=places)
def state(step):
    w = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), (4096, 4))
    return training.TrainState(jnp.int32(step), {"w": w}, {"w": w + 1}, (w[:8],))

with checkpoints.open_manager(folder) as manager:
    for step in (1, 2, 3):
        checkpoints.save(manager, state(step), {"seed": 0}, wait=True)
    if process == 0:
        # What process 1 has written, and process 0 does not read.
        for path in (folder / "3" / "state" / "ocdbt.process_1" / "d").iterdir():
            path.write_bytes(b"")
    multihost_utils.sync_global_devices("damaged")
    restored, damaged = checkpoints.restore_latest_good(manager, state(9))
    assert int(restored.step) == 2 and [d.step for d in damaged] == [3], damaged
    print("REASON", damaged[0].reason)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state(2)), strict=True):
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(a.data, b.data)
    assert checkpoints.latest_step(manager) == 2
    checkpoints.save(manager, state(3), {"seed": 0}, wait=True)
    average = checkpoints.restore_params(manager, state(9).params)["w"]
    assert average.sharding == split and int(checkpoints.restore(manager, state(9)).step) == 3
    for a, b in zip(average.addressable_shards, state(3).ema_params["w"].addressable_shards):
        np.testing.assert_array_equal(a.data, b.data)
print("DONE")
"""


@pytest.mark.slow
def test_all_processes_of_a_pod_pass_over_what_one_could_not_read(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path / "c"
    command = [sys.executable, "-c", POD, str(folder), port]
    pipe = subprocess.PIPE
    pod = [
        subprocess.Popen([*command, str(n)], env=ENV, stdout=pipe, stderr=pipe, text=True)
        for n in range(2)
    ]
    try:
        texts = [process.communicate(timeout=120) for process in pod]
    finally:
        for process in pod:
            process.kill()
    for process, (out, err) in zip(pod, texts, strict=True):
        assert process.returncode == 0 and out.endswith("DONE\n"), err[-3000:]
    assert "REASON another process could not read it" in texts[0][0]
    assert "DATA_LOSS" in texts[1][0] or "OUT_OF_RANGE" in texts[1][0], texts[1][0]
    assert (folder / "3.damaged").exists()
    # One process of eight devices, and one device, read what two processes wrote.
    example = training.TrainState(
        jnp.int32(0), {"w": jnp.ones((4096, 4))}, {"w": jnp.ones((4096, 4))}, (jnp.ones((8, 4)),)
    )
    with checkpoints.open_manager(folder) as manager:
        one = checkpoints.restore(manager, example)
        split = NamedSharding(sharding.make_mesh(), PartitionSpec("data"))
        eight = checkpoints.restore(manager, example, training.TrainState(
            sharding.replicated(split.mesh), split, split, split
        ))  # fmt: skip
    assert_identical(one, eight)
    w = jax.random.uniform(jax.random.fold_in(jax.random.key(0), 3), (4096, 4))
    np.testing.assert_array_equal(one.params["w"], w)
