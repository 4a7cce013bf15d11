"""Data parallelism: one mesh axis, "data". The state is replicated, the batch is split.

With B examples on D devices, the loss (1 / B) sum_i l_i equals (1 / D) sum_d (1 / (B / D))
sum_{i on d} l_i, and so does its gradient. Two roads lead there:

- `jit_train_step`, the main road: one program over the global batch. `loss_fn` sees all B examples
  and XLA inserts the sums over devices. Whatever `loss_fn` draws from its key is what one device
  would have drawn: N devices = 1 device, up to the order of the sums.
- `pmap_train_step`, the thin second road: D replicas of the step, each on its B / D examples, with
  an explicit mean. It takes the same arrays and the same state, and gives the same numbers where
  `loss_fn` draws nothing itself (noise, times and pairing are made on the global batch before the
  step and stand in `batch`). What `loss_fn` does draw comes from each replica's own key, so these
  draws, and a pairing made inside `loss_fn`, depend on the device count.

A pod runs one process per host: call `jax.distributed.initialize()` before anything else, create
the state under `jax.jit(..., out_shardings=replicated(mesh))`, take the jit road, and give
`shard_batch` the part of the batch that this process has read.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmjax.training import Metrics, TrainState, TrainStep

DATA_AXIS = "data"
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]


def make_mesh(devices: Devices | None = None) -> Mesh:
    """A mesh of the one axis "data" over the devices of all processes, or over those given.

    Args:
      devices: the devices, in order; None for `jax.devices()`.

    Returns:
      A `Mesh` whose axis is Auto: XLA chooses the layouts in between, as attention's reshapes and
      Diffrax's adaptive solves need.

    Example:
      >>> make_mesh(jax.devices()[:1]).shape["data"]
      1
    """
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of state and keys: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch `[batch, ...]`: its first axis split over "data"."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def check_batch_size(batch_size: int, num_devices: int) -> None:
    """Refuses a global batch that the devices can't share equally.

    Args:
      batch_size: examples in the global batch.
      num_devices: devices of all processes together.

    Raises:
      ValueError: if `batch_size` is no positive multiple of `num_devices`; it names the nearest
        sizes that work.

    Example:
      >>> check_batch_size(128, 8)
    """
    if batch_size > 0 and batch_size % num_devices == 0:
        return
    below = max(batch_size, 0) // num_devices * num_devices
    sizes = " or ".join(str(size) for size in (below, below + num_devices) if size > 0)
    raise ValueError(
        f"The batch size must be a positive multiple of the number of devices; got {batch_size} "
        f"for {num_devices} devices. Take {sizes}, or fewer devices."
    )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the mesh, its first axis split over the devices.

    Args:
      batch: pytree of host arrays `[local_batch, ...]`: the examples that this process has read.
        With P processes the global batch is P times as large, in the order of the processes.
      mesh: from `make_mesh`.

    Returns:
      The same pytree of global arrays `[batch, ...]`.

    Raises:
      ValueError: if this process's devices can't share its examples equally.

    Example:
      >>> shard_batch({"x1": np.zeros((8, 2))}, make_mesh(jax.devices()[:1]))["x1"].shape
      (8, 2)
    """
    sharding, num_devices = batch_sharding(mesh), len(mesh.local_devices)

    def put(local: Any) -> jax.Array:
        check_batch_size(len(local), num_devices)
        return jax.make_array_from_process_local_data(sharding, local)

    return jax.tree.map(put, batch)


def jit_train_step(train_step: TrainStep, mesh: Mesh) -> TrainStep:
    """Compiles a training step for a mesh: the main road, on one device, many, or a pod.

    Args:
      train_step: from `training.make_train_step`, without an axis name.
      mesh: from `make_mesh`.

    Returns:
      The compiled step. The state is replicated and donated (the one passed in can't be used
      again), the key is replicated, the batch comes from `shard_batch`, the metrics are those of
      the global batch.

    Example:
      >>> from fmjax import training
      >>> mesh, tx = make_mesh(jax.devices()[:1]), training.adam(1e-3)
      >>> loss_fn = lambda params, key, x: ((x - params) ** 2).mean()
      >>> step = jit_train_step(training.make_train_step(loss_fn, tx), mesh)
      >>> init = lambda: training.init_train_state(jax.numpy.zeros(()), tx)
      >>> state = jax.jit(init, out_shardings=replicated(mesh))()
      >>> state, _ = step(state, jax.random.key(0), shard_batch(np.ones(8, np.float32), mesh))
    """
    whole = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(whole, whole, batch_sharding(mesh)),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )


def pmap_train_step(train_step: TrainStep, devices: Devices | None = None) -> TrainStep:
    """Runs a training step under `jax.pmap`: the thin second road, for one process.

    Args:
      train_step: from `training.make_train_step` with `axis_name="data"`. Without the name nothing
        is averaged, and each device would train alone on its own examples.
      devices: the devices, in order; None for `jax.devices()`.

    Returns:
      A step of the same arguments as the jit road's: an unstacked state (donated), a key, and a
      batch `[batch, ...]`, of host arrays or sharded as by `shard_batch`, which is split here into
      `[devices, batch / devices, ...]`. The state that comes back is replicated, also unstacked. A
      first state that is not replicated yet costs a second trace.

    Raises:
      ValueError: when called, if the devices can't share the batch equally.

    Example:
      >>> from fmjax import training
      >>> tx, loss_fn = training.adam(1e-3), lambda params, key, x: ((x - params) ** 2).mean()
      >>> step = training.make_train_step(loss_fn, tx, axis_name="data")
      >>> state = training.init_train_state(jax.numpy.zeros(()), tx)
      >>> step = pmap_train_step(step, jax.devices()[:1])
      >>> state, _ = step(state, jax.random.key(0), np.ones(8, np.float32))
    """
    devices = jax.devices() if devices is None else devices
    mapped = jax.pmap(
        train_step,
        axis_name=DATA_AXIS,
        in_axes=(None, None, 0),
        out_axes=None,  # after the mean every replica holds the same state
        devices=devices,
        donate_argnums=0,
    )

    def split(x: Any) -> Any:
        check_batch_size(len(x), len(devices))
        return x.reshape((len(devices), -1, *x.shape[1:]))

    def step(state: TrainState, key: jax.Array, batch: Any) -> tuple[TrainState, Metrics]:
        return mapped(state, key, jax.tree.map(split, batch))

    return step
