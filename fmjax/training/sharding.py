"""Shardings of one training step: over devices, over hosts, the state replicated or split.

The D devices of a mesh stand in D / F rows (the axis "data") of F (the axis "fsdp"), and the batch
is split over all of them. The state is split over "fsdp" and repeated over "data":

- F = 1, data parallel: the state is replicated, and the mesh is the one axis "data".
- F = D, fully sharded: every device holds 1 / D of parameters, average and optimiser state; XLA
  gathers a layer's parameters where it needs them, and sums gradients where they are kept.

With B examples on D devices, the loss (1 / B) sum_i l_i equals (1 / D) sum_d (1 / (B / D))
sum_{i on d} l_i, and so does its gradient. Two functions do so:

- `jit_train_step`: one program over the global batch. `loss_fn` sees all B examples
  and XLA inserts the sums over devices. Whatever `loss_fn` draws from its key is what one device
  would have drawn: N devices = 1 device, up to the order of the sums, whatever F.
- `pmap_train_step`: D replicas of the step, each on its B / D examples, with
  an explicit mean. It takes the same arrays and the same state, and gives the same numbers where
  `loss_fn` draws nothing itself (noise, times and pairing are made on the global batch before the
  step and stand in `batch`). What `loss_fn` does draw comes from each replica's own key, so these
  draws, and a pairing made inside `loss_fn`, depend on the device count.

A pod runs one process per host: call `jax.distributed.initialize()` before anything else, create
the state under `jax.jit(..., out_shardings=state_sharding(...))`, use `jit_train_step`, read the
rows that `local_rows` names and give them to `shard_batch`.

Source: Rajbhandari et al. 2019, arXiv 1910.02054 (stage 3).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .step import Metrics, TrainState, TrainStep

DATA_AXIS = "data"
FSDP_AXIS = "fsdp"
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]

# Arrays of fewer numbers are replicated: to gather them costs more than to hold them.
_SMALLEST_SPLIT = 1024


def make_mesh(devices: Devices | None = None, *, fsdp: int = 1) -> Mesh:
    """A mesh over the devices of all processes, or those given.

    Args:
      devices: the devices, in order; None for `jax.devices()`.
      fsdp: over how many devices one copy of the state is split; 1 replicates it.

    Returns:
      A `Mesh` of the axis "data", or with `fsdp` above 1 of "data" and "fsdp". Its axes are Auto:
      XLA chooses the layouts in between, as attention and adaptive solves need.

    Raises:
      ValueError: if `fsdp` does not divide the number of devices.

    Example:
      >>> make_mesh(jax.devices()[:1]).shape["data"]
      1
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(
            f"fsdp must divide the number of devices; got {fsdp} for {len(devices)} devices. "
            "1 replicates the state, the number of devices splits it over all."
        )
    axes = (DATA_AXIS,) if fsdp == 1 else (DATA_AXIS, FSDP_AXIS)
    grid = np.array(devices).reshape(-1) if fsdp == 1 else np.array(devices).reshape(-1, fsdp)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of keys, and of a state that is not split: replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The sharding of a batch: its axis `axis` is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, mesh.axis_names))


def state_sharding(state: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state: split over "fsdp" by a rule on shapes.

    An array is split along its longest axis that F divides, the last of them where several are
    equally long. One that has no such axis, or fewer than 1,024 numbers, is replicated. Parameters,
    their average and Adam's moments have equal shapes, hence equal shardings.

    Args:
      state: a `TrainState` or any pytree of arrays, or its `jax.eval_shape`.
      mesh: from `make_mesh`.

    Returns:
      The same pytree of `NamedSharding`s; with F = 1 each is `replicated(mesh)`.

    Example:
      >>> mesh = make_mesh(jax.devices()[:1])
      >>> state_sharding(np.zeros((64, 64)), mesh) == replicated(mesh)
      True
    """
    shards = mesh.shape.get(FSDP_AXIS, 1)

    def rule(x: Any) -> NamedSharding:
        lengths = [(n, axis) for axis, n in enumerate(x.shape) if n % shards == 0 and n >= shards]
        if shards == 1 or not lengths or np.prod(x.shape) < _SMALLEST_SPLIT:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * max(lengths)[1], FSDP_AXIS))

    return jax.tree.map(rule, state)


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


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch this process has to read: those of its own devices.

    Args:
      batch_size: examples in the global batch, a multiple of the number of devices.
      mesh: from `make_mesh`.

    Returns:
      Indices in ascending order; with one process `np.arange(batch_size)`.

    Example:
      >>> local_rows(4, make_mesh(jax.devices()[:1]))
      array([0, 1, 2, 3])
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def shard_batch(batch: Any, mesh: Mesh, *, axis: int = 0) -> Any:
    """Puts a batch on the mesh, one axis split over the devices.

    Args:
      batch: pytree of host arrays `[local_batch, ...]`: the examples that this process has read,
        rows `local_rows(...)` of the global batch, in that order.
      mesh: from `make_mesh`.
      axis: the batch's axis: 1 for the batches of several steps, `[num_steps, local_batch, ...]`.

    Returns:
      The same pytree of global arrays `[batch, ...]`.

    Raises:
      ValueError: if this process's devices can't share its examples equally.

    Example:
      >>> shard_batch({"x1": np.zeros((8, 2))}, make_mesh(jax.devices()[:1]))["x1"].shape
      (8, 2)
    """
    sharding, num_devices = batch_sharding(mesh, axis=axis), len(mesh.local_devices)

    def put(local: Any) -> jax.Array:
        check_batch_size(local.shape[axis], num_devices)
        return jax.make_array_from_process_local_data(sharding, local)

    return jax.tree.map(put, batch)


def spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Puts a host array on the mesh, its first axis split where the devices can share it.

    For sampling and evaluation, where the number of examples is what it is: one that is no multiple
    of the number of devices is split over fewer of them, or replicated.

    Args:
      x: `[batch, ...]`, the same in every process.
      mesh: from `make_mesh`.

    Returns:
      The same array, global.

    Example:
      >>> spread(np.zeros((5, 2)), make_mesh(jax.devices()[:1])).shape
      (5, 2)
    """
    axes = mesh.axis_names
    while axes and len(x) % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    sharding = NamedSharding(mesh, PartitionSpec(axes or None))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def gathered(batch: Any) -> Any:
    """A sharded pytree as NumPy arrays, gathered from all devices of all processes."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(batch, tiled=True))


def jit_train_step(
    train_step: TrainStep, mesh: Mesh, *, state: Any = None, batch_axis: int = 0
) -> TrainStep:
    """Compiles a training step for a mesh: one device, many, or a pod.

    Args:
      train_step: from `training.make_train_step`, without an axis name, or `training.many_steps`.
      mesh: from `make_mesh`.
      state: its shardings, from `state_sharding`; None for a replicated one.
      batch_axis: the batch's axis: 1 for `training.many_steps`.

    Returns:
      The compiled step. The state is donated (the one passed in can't be used again), the key is
      replicated, the batch comes from `shard_batch`, the metrics are those of the global batch.

    Example:
      >>> from fmjax import training
      >>> mesh, tx = make_mesh(jax.devices()[:1]), training.adam(1e-3)
      >>> loss_fn = lambda params, key, x: ((x - params) ** 2).mean()
      >>> step = jit_train_step(training.make_train_step(loss_fn, tx), mesh)
      >>> init = lambda: training.init_train_state(jax.numpy.zeros(()), tx)
      >>> state = jax.jit(init, out_shardings=replicated(mesh))()
      >>> state, _ = step(state, jax.random.key(0), shard_batch(np.ones(8, np.float32), mesh))
    """
    everywhere = replicated(mesh)
    state = everywhere if state is None else state
    return jax.jit(
        train_step,
        in_shardings=(state, everywhere, batch_sharding(mesh, axis=batch_axis)),
        out_shardings=(state, everywhere),
        donate_argnums=0,
    )


def pmap_train_step(train_step: TrainStep, devices: Devices | None = None) -> TrainStep:
    """Runs a training step under `jax.pmap`, in one process.

    Args:
      train_step: from `training.make_train_step` with `axis_name="data"`. Without the name nothing
        is averaged, and each device would train alone on its own examples.
      devices: the devices, in order; None for `jax.devices()`.

    Returns:
      A step of the arguments of `jit_train_step`'s: an unstacked state (donated), a key, and a
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
