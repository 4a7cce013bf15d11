"""Pairs of a trained flow's ends, from its run folder: made once, kept in files, trained on.

Pair k is (x0_k, x1_k): noise of the run's own source under the seed and k, and where the teacher's
flow carries it under the k-th condition, by Tsit5 at a tolerance. The pairs are in the teacher's
folder, batch by batch, in a store named after the digest of the teacher's parameters, its guidance,
the seed, the tolerance and the batch size: a start after a kill computes what is missing, and
several students share them. The processes of a pod share the work. Training reads them into memory.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from fmjax.evaluation import drawing
from fmjax.harness import keys, places
from fmjax.harness.config import RunConfig
from fmjax.harness.read import imported, read, read_config
from fmjax.harness.share import Batch, put, solve
from fmjax.harness.start import say
from fmjax.harness.store import Arrays, Store
from fmjax.harness.task import Task, Trained
from fmjax.sources import Source
from fmjax.tasks.facts import known_or

_FACTS = frozenset({"teacher", "num_examples", "seed", "tolerance"})


@dataclasses.dataclass(frozen=True)
class PairsConfig(RunConfig):
    """The flags of an experiment that trains on a teacher's pairs."""

    teacher: epath.Path | None = None
    """Run folder of the flow whose pairs are learnt. A run begins with its parameters, unless
    --init-from names others."""
    num_pairs: int = 8192
    """Pairs of noise and where the teacher carries it."""
    pair_tolerance: float = 1e-4
    """Tolerance of Tsit5 in making them."""
    pair_batch_size: int = 256
    """Pairs per solve, over all devices of a process."""

    def __post_init__(self) -> None:
        if self.init_from is None:
            object.__setattr__(self, "init_from", self.teacher)

    def data_name(self) -> str:
        return "" if self.teacher is None else self.teacher.name


class PairBatch(NamedTuple):
    """Pairs of a teacher.

    Attributes:
      x0: source samples, `[batch, *event]`.
      x1: where the teacher carries them, `[batch, *event]`.
      condition: under which it does, a pytree of arrays `[batch, ...]`, or None.
    """

    x0: Any
    x1: Any
    condition: Any


class TeacherPairs:
    """The teacher of a run, and its pairs.

    Args:
      config: the run's flags. While it trains the pairs are read or made here; a finished run needs
        none.

    Raises:
      ValueError: without --teacher; as `harness.load` does for its folder.
    """

    def __init__(self, config: PairsConfig):
        if config.teacher is None:
            raise ValueError("--teacher must name the run folder of a trained flow; got none.")
        self._config, self.folder = config, places.as_path(config.teacher)
        self.config, self.task = _open(self.folder, config)
        self._pairs: PairBatch | None = None
        if config.known is None:
            teacher = self.trained()
            self.facts = _facts(config, teacher)
            self._pairs = make_pairs(
                self.folder,
                teacher,
                config.num_pairs,
                seed=config.seed,
                tolerance=config.pair_tolerance,
                batch_size=config.pair_batch_size,
            )
        else:
            self.facts = known_or(config.known, _FACTS, dict)

    def trained(self) -> Trained:
        """The teacher with its parameters, the moving average."""
        return read(self.folder)

    def batch(self, rows: np.ndarray) -> PairBatch:
        """The pairs of these numbers, on the host."""
        if self._pairs is None:
            raise ValueError(
                "A finished run is read without its teacher's pairs; got rows to train on. Train "
                "with harness.train."
            )
        return jax.tree.map(lambda x: x[rows], self._pairs)

    def describe(self) -> dict[str, Any]:
        """What the pairs depend on, with the teacher's parameters as they are now."""
        return self.facts if self._pairs is not None else _facts(self._config, self.trained())

    def as_teacher(self, trained: Trained) -> Trained:
        """A student under the teacher's flags, for what the teacher's task does with a run."""
        task = self.task._replace(samples=trained.task.samples)
        return dataclasses.replace(trained, task=task, config=self.config)


def _open(folder: places.Folder, config: PairsConfig) -> tuple[Any, Task]:
    """The teacher's flags and task, on the devices of this run; unguided, as its pairs are."""
    record, flags = read_config(folder)
    names = {field.name for field in dataclasses.fields(flags)}
    shared = {name: getattr(config, name) for name in ("num_devices", "fsdp", "cluster")}
    shared |= {"guidance": 1.0} if "guidance" in names else {}
    flags = dataclasses.replace(flags, **shared)
    task = imported(record["make_task"], folder / "config.json", "a function")(flags)
    if task.samples is None:
        raise ValueError(f"Pairs need Task.samples of the teacher; the task of {folder} has none.")
    return flags, task


def _facts(config: PairsConfig, teacher: Trained) -> dict[str, Any]:
    return {
        "teacher": teacher.digest,
        "num_examples": config.num_pairs,
        "seed": config.seed,
        "tolerance": config.pair_tolerance,
    }


def make_pairs(
    folder: places.Folder,
    teacher: Trained,
    num: int,
    *,
    seed: int,
    tolerance: float,
    batch_size: int,
) -> PairBatch:
    """The first `num` pairs of a teacher, each batch read where it is stored, else computed.

    Args:
      folder: the teacher's run folder, in which they are kept.
      teacher: the teacher, with its parameters and its guidance.
      num: of pairs.
      seed: of the noise.
      tolerance: of Tsit5.
      batch_size: pairs per solve, over all devices of a process.

    Returns:
      `PairBatch(x0, x1, condition)`, host arrays `[num, ...]`.
    """
    settings = {
        "parameters": teacher.digest,
        "guidance": teacher.guidance,
        "seed": seed,
        "tolerance": tolerance,
        "size": batch_size,
    }
    with places.at_hand(folder / "pairs") as here:
        store = Store(here, "pairs", settings)
        batch = functools.partial(_batch, teacher, drawing.make_solve(teacher), store, settings)
        batches = [batch(i) for i in range(-(-num // batch_size))]
        if not all(batch.store.has(batch.name) for batch in batches):
            say(f"{num} pairs of {folder} ...")
        solve(batches, "pairs")
        found = [batch.get() for batch in batches]
    x0, x1 = (np.concatenate([batch[k] for batch in found])[:num] for k in ("x0", "x1"))
    return PairBatch(x0, x1, teacher.condition(np.arange(num)))


def _batch(
    teacher: Trained, integrate: drawing.Solve, store: Store, settings: dict[str, Any], i: int
) -> Batch:
    """The i-th batch, to be computed where it is not stored."""

    def compute() -> Arrays:
        rows = np.arange(i * settings["size"], (i + 1) * settings["size"])
        x0 = np.asarray(_noise(teacher.source, keys.key(settings["seed"], "pairs"), rows))
        way = drawing.Way("Tsit5", tolerance=settings["tolerance"])
        x1, evaluations = integrate(way, *put((x0, teacher.condition(rows))))
        return dict(x0=x0, x1=np.asarray(x1), num_evaluations=np.asarray(evaluations))

    return Batch(store, f"batch_{i:06d}", compute, "pairs")


@functools.partial(jax.jit, static_argnums=0)
def _noise(source: Source, key: jax.Array, rows: jax.Array) -> jax.Array:
    """The noise of the pairs of these numbers, each by itself."""
    return jax.vmap(lambda row: source.sample(jax.random.fold_in(key, row), 1)[0])(rows)
