"""A step that does not fit into a device's memory: what other flags would need.

What a program needs on each device is what XLA says once it is compiled: arguments, results that
take no argument's place, and all in between. Nothing is run for it, so the figure is there for
what does not fit either.
"""

import atexit
import contextlib
import dataclasses
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fmjax import training
from fmjax.harness import step
from fmjax.harness.config import RunConfig, mesh
from fmjax.harness.task import LossStep, Task
from fmjax.training import sharding

SECONDS = 60.0  # for all that is compiled in order to know what it needs
MEASURED = 2  # alternatives


@contextlib.contextmanager
def explained(config: RunConfig, make_task: Callable[[Any], Task]) -> Iterator[None]:
    """Where a device's memory is full, says what of the flags would need less.

    Raises:
      ValueError: instead of the RESOURCE_EXHAUSTED of what is done inside.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        full = re.search(r"RESOURCE_EXHAUSTED.*", str(error))
        if full is None:
            raise
        message = f"{_got(config)}: {full[0].rstrip('. ')}. {_advice(config, make_task)}"
        raise ValueError(message) from error


def first_explained(
    steps: step.Steps, config: RunConfig, make_task: Callable[[Any], Task]
) -> step.Steps:
    """The steps, whose first dispatch is waited for under `explained`."""
    first = True

    def call(state: training.TrainState, key: jax.Array, batches: Any) -> Any:
        nonlocal first
        if not first:
            return steps(state, key, batches)
        first = False
        with explained(config, make_task):
            return jax.block_until_ready(steps(state, key, batches))

    return call


def needed(config: RunConfig, task: Task) -> int:
    """Bytes on each device that a dispatch of the task's steps needs, as compiled.

    Args:
      config: the run's flags.
      task: as `make_task(config)` makes it; one example of its data is read for the shapes.
    """
    devices, task = mesh(config), step.in_parts(config, task)
    state = jax.eval_shape(task.init, jax.random.key(0))
    size = (config.steps_per_dispatch, config.batch_size)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size + np.shape(x)[1:], jax.dtypes.canonicalize_dtype(x.dtype))

    shardings, batches = sharding.state_sharding(state, devices), task.batch(np.arange(1))
    jitted: Any = sharding.jit_train_step(
        training.many_steps(task.step), devices, state=shardings, batch_axis=1
    )
    lowered = jitted.lower(state, jax.random.key(0), jax.tree.map(abstract, batches))
    found = lowered.compile(compiler_options=step.unoptimised(devices)).memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + new + found.temp_size_in_bytes


def alternatives(config: RunConfig, task: Task) -> dict[str, RunConfig]:
    """Flags that need less memory, of those that the task has, as words and as a config.

    On a CPU more parts take longest to compile, and come after `--remat`.
    """
    devices = mesh(config).size
    found: dict[str, dict[str, Any]] = {}
    if getattr(config, "remat", None) is False:
        found["--remat"] = {"remat": True}
    if isinstance(task.step, LossStep) and (parts := _more_parts(config, devices)):
        found[f"--accumulate {parts}"] = {"accumulate": parts}
    if config.fsdp < devices:
        found[f"--fsdp {devices}"] = {"fsdp": devices}
    if getattr(config, "precision", None) == "float32":
        found["--precision bfloat16"] = {"precision": "bfloat16"}
    return {words: dataclasses.replace(config, **change) for words, change in found.items()}


def _more_parts(config: RunConfig, devices: int) -> int | None:
    """Four times as many parts or more, as few as the batch can have; else the most it can have."""
    each = config.batch_size // devices
    more = [n for n in range(config.accumulate + 1, each + 1) if each % n == 0]
    return next((n for n in more if n >= 4 * config.accumulate), more[-1] if more else None)


def _got(config: RunConfig) -> str:
    parts = "1 part" if config.accumulate == 1 else f"{config.accumulate} parts"
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    of = f" of {_gib(limit)}" if limit else ""
    return (
        f"A step must fit into a device's memory{of}; got --batch-size {config.batch_size} in "
        f"{parts} on {mesh(config).size} x {mesh(config).devices.flat[0].device_kind}"
    )


def _advice(config: RunConfig, make_task: Callable[[Any], Task]) -> str:
    """What the alternatives need, as far as it is known within `SECONDS`."""
    found: dict[str, int] = {}
    known: list[str] = []

    def measure() -> None:
        with contextlib.suppress(Exception):  # the line is printed in any case
            others = alternatives(config, make_task(config))
            known.extend(others)
            for words in known[:MEASURED]:
                with contextlib.suppress(Exception):
                    found[words] = needed(others[words], make_task(others[words]))

    thread = threading.Thread(target=measure, daemon=True)
    thread.start()
    thread.join(SECONDS)
    atexit.register(_leave, thread)
    measured = dict(found)
    needs = [f"{words} would need {_gib(size)} on each" for words, size in measured.items()]
    less = [words for words in known if words not in measured]
    texts = [", ".join(needs)] if needs else []
    texts += (
        [f"{', '.join(less)} {'also ' * bool(needs)}lower{'s' * (len(less) == 1)} the need"]
        if less
        else []
    )
    return f"{'; '.join([*texts, 'a smaller --batch-size fits too'])}."


def _leave(thread: threading.Thread) -> None:
    """Ends the process here if XLA still compiles, which would abort it on its way out."""
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
