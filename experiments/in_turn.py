"""Times that can be compared: every way in turn, so that other work on the machine slows all."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.harness.task import Task


def milliseconds(ways: dict[Any, Callable[[], Any]], repetitions: int) -> dict[Any, list[float]]:
    """Every way `repetitions` times, after a first call of each that is not counted.

    Args:
      ways: name -> what is timed, until the arrays that it returns are ready.
      repetitions: of each.

    Returns:
      name -> `repetitions` times in milliseconds.
    """
    found: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            jax.block_until_ready(way())
            found[name].append(1e3 * (time.perf_counter() - began))
    return {name: times[1:] for name, times in found.items()}


def medians(ways: dict[Any, Callable[[], Any]], repetitions: int) -> dict[Any, float]:
    """The median of each way's `milliseconds`."""
    return {name: float(np.median(ms)) for name, ms in milliseconds(ways, repetitions).items()}


def training_step(task: Task, batch_size: int) -> tuple[Any, tuple[Any, jax.Array, Any]]:
    """A task's jitted step, and its arguments: a new state, a key, the first examples."""
    batch = jax.tree.map(jnp.asarray, task.batch(np.arange(batch_size)))
    return jax.jit(task.step), (task.init(jax.random.key(0)), jax.random.key(1), batch)
