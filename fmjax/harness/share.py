"""Batches that the processes of a pod share: each solves its own, process 0 reads all of them.

Batch i of a store is solved by process i mod N, on its own devices and without a word to the
others, so that a slow one holds up nobody before the end. What passes between them are the files of
the stores. A batch depends on its number alone: N processes find the numbers of one (with as many
devices, for others round otherwise), and a start after a kill computes what is missing, whatever N
was.
"""

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fmjax.harness import places
from fmjax.harness.pods import cluster
from fmjax.harness.progress import progress
from fmjax.harness.store import Arrays, Store
from fmjax.training import sharding


class Batch(NamedTuple):
    """A batch of numbers in a store, computed once.

    Attributes:
      store: where it is kept.
      name: unique in the store.
      compute: makes its arrays.
      kind: batches of one kind take about equally long.
    """

    store: Store
    name: str
    compute: Callable[[], Arrays]
    kind: str

    def get(self) -> Arrays:
        """As `Store.get`."""
        return self.store.get(self.name, self.compute)


def put(batch: Any) -> Any:
    """Puts a pytree of arrays `[batch, ...]` on this process's devices.

    Their first axis is split over as many devices as can share it equally.
    """
    here = jax.local_devices()

    def spread(x: Any) -> jax.Array:
        mesh = sharding.make_mesh(here[: math.gcd(len(x), len(here))])
        return sharding.spread(np.asarray(x), mesh)

    return jax.tree.map(spread, batch)


def solve(batches: Sequence[Batch], label: str) -> None:
    """Computes what is missing of this process's batches, and waits until all processes have.

    Process 0 says how long the whole will take as soon as two batches of each kind have been timed,
    for the first one compiles; where there are but two, the first is a bound for the second.

    Args:
      batches: the same in every process.
      label: what the progress bar says.
    """
    own = _own(batches)
    missing = [batch for batch in own if not batch.store.has(batch.name)]
    first, rest = _timed_first(missing)
    seconds: dict[str, float] = {}
    initial = len(own) - len(missing)
    with progress(label=label, total=len(own), initial=initial, unit="batch") as bar:
        for batch in [*first, *rest]:
            if rest and batch is rest[0] and cluster.is_main():
                bar.write(_expected(first, rest, seconds))
            began = time.perf_counter()
            batch.store.make(batch.name, batch.compute)
            seconds[batch.kind] = time.perf_counter() - began
            bar.update()
    cluster.wait(label)
    places.exchange()
    if cluster.is_main():
        _name_lost(batches)


def _own(batches: Sequence[Batch]) -> list[Batch]:
    """This process's: of every store each N-th."""
    stores = {batch.store.folder: itertools.count() for batch in batches}
    num, index = jax.process_count(), jax.process_index()
    return [batch for batch in batches if next(stores[batch.store.folder]) % num == index]


def _name_lost(batches: Sequence[Batch]) -> None:
    """Says which batches others have computed where process 0 can't read them."""
    if lost := [batch for batch in batches if not batch.store.has(batch.name)]:
        print(
            f"{len(lost)} batches of other processes are not in {lost[0].store.folder.parent}: "
            "process 0 computes them again. A disk that all processes share saves that.",
            file=sys.stderr,
        )


def _timed_first(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Two batches of each kind, or one where there are no more than two, and the others."""
    count = Counter(batch.kind for batch in batches)
    seen, first, rest = Counter[str](), list[Batch](), list[Batch]()
    for batch in batches:
        seen[batch.kind] += 1
        (first if seen[batch.kind] <= (2 if count[batch.kind] > 2 else 1) else rest).append(batch)
    return first, rest


def _expected(first: Sequence[Batch], rest: Sequence[Batch], seconds: dict[str, float]) -> str:
    """How long this process's other batches take, at the pace of the last of each kind."""
    num, left = jax.process_count(), sum(seconds[batch.kind] for batch in rest)
    told = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
    told = told if left < 6000 else f"{left / 3600:.1f} h"
    count = Counter(batch.kind for batch in first)
    bound = "at most " if any(count[batch.kind] == 1 for batch in rest) else ""
    each = "" if num == 1 else f" in each of {num} processes"
    batches = "batch" if len(rest) == 1 else "batches"
    return f"Expected time: {bound}{told} for {len(rest)} more {batches}{each}."
