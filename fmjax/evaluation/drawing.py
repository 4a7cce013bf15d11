"""Drawing samples from a trained run: by which solver, in batches, each batch computed once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import diffrax
import jax
import numpy as np

import fmjax as fm
from fmjax.harness.share import Batch, put
from fmjax.harness.store import Store
from fmjax.harness.task import Trained
from fmjax.sources import Source

SOLVERS = {
    "Euler": (diffrax.Euler(), 1, 0),  # with its evaluations per step, and before the first
    "Heun": (diffrax.Heun(), 2, 0),
    "Midpoint": (diffrax.Midpoint(), 2, 0),
    "Tsit5": (diffrax.Tsit5(), 6, 1),
    "Dopri5": (diffrax.Dopri5(), 6, 1),
}
ADAPTIVE = ("Heun", "Tsit5", "Dopri5")
JUMPS = "jumps"  # instead of a solver: the run's own way, `Samples.jump`


class Way(NamedTuple):
    """A way to solve: in `num_steps` equal steps or jumps, or adaptively at `tolerance`."""

    solver: str
    num_steps: int | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        if self.solver == JUMPS:
            return f"{self.num_steps} {'jump' if self.num_steps == 1 else 'jumps'}"
        steps = f"{self.num_steps} equal steps"
        return f"{self.solver}, {steps if self.num_steps else f'tolerance {self.tolerance:g}'}"


class Drawn(NamedTuple):
    """Samples `[num, *event]`, evaluations of the network for one of them, seconds for all."""

    x1: np.ndarray
    num_evaluations: float
    seconds: float


class Solve(Protocol):
    """`(way, x0, condition, each=None) -> (x1, num_evaluations)`, from `make_solve`."""

    def __call__(
        self, way: Way, x0: jax.Array, condition: Any, each: Any = None
    ) -> tuple[jax.Array, jax.Array]: ...


def ways(evaluations: Sequence[int], tolerances: Sequence[float]) -> list[Way]:
    """Every solver with about so many evaluations in equal steps, and the adaptive ones."""
    found = []
    for name, (_, per_step, at_start) in SOLVERS.items():
        steps = sorted({round((n - at_start) / per_step) for n in evaluations} - {0})
        found += [Way(name, num_steps=n) for n in steps]
    return found + [Way(name, tolerance=tol) for name in ADAPTIVE for tol in tolerances]


def make_solve(trained: Trained) -> Solve:
    """Solves a trained run's flow, compiled once per solver and steps.

    Jumps need `each`, a key for every sample `[num]`: nothing depends on what else is in a batch.
    """
    compiled: dict[Any, Any] = {}

    def solve(way: Way, x0: jax.Array, condition: Any, each: Any = None) -> tuple[Any, Any]:
        key = (way.solver, way.num_steps)
        if key not in compiled:
            made = _jump_fn if way.solver == JUMPS else _solve_fn
            compiled[key] = jax.jit(made(trained, *key))
        last = each if way.solver == JUMPS else way.tolerance
        return compiled[key](trained.params, x0, condition, last)

    return solve


def _solve_fn(trained: Trained, solver: str, num_steps: int | None) -> Callable[..., Any]:
    def solve(params: Any, x0: jax.Array, condition: Any, tolerance: Any) -> tuple[Any, Any]:
        adaptive = None if num_steps else diffrax.PIDController(rtol=tolerance, atol=tolerance)
        trajectory = fm.integrate(
            trained.guided(params, condition),
            x0,
            solver=SOLVERS[solver][0],
            num_steps=num_steps,
            stepsize_controller=adaptive,
        )
        return trajectory.x[-1], trajectory.num_evaluations

    return solve


def can_jump(trained: Trained) -> bool:
    """Whether a run draws in few evaluations by a way of its own, and is asked for no guidance."""
    samples = trained.task.samples
    return samples is not None and samples.jump is not None and trained.guidance == 1


def check_jumps(trained: Trained) -> None:
    """Refuses jumps of a run that can't.

    Raises:
      ValueError: if it has no way of its own to draw in few evaluations, or is guided.
    """
    if can_jump(trained):
        return
    if trained.task.samples is None or trained.task.samples.jump is None:
        raise ValueError(
            f"Jumps need an average velocity; got a run of {trained.name}, a velocity alone. Take "
            "a solver."
        )
    raise ValueError(
        "Guidance is of a velocity, and an average velocity jumps without; got a scale of "
        f"{trained.guidance}. Take 1, or a solver."
    )


def _jump_fn(trained: Trained, _: str, num_steps: int | None) -> Callable[..., Any]:
    check_jumps(trained)
    samples = trained.task.samples
    assert samples is not None and samples.jump is not None and num_steps is not None
    jump = samples.jump

    def one(params: Any, x0: jax.Array, condition: Any, key: jax.Array) -> jax.Array:
        x0, condition = jax.tree.map(lambda x: x[None], (x0, condition))
        return jump(params, key, x0, condition, num_steps)[0]

    def every(params: Any, x0: jax.Array, condition: Any, each: jax.Array) -> tuple[Any, Any]:
        return jax.vmap(one, in_axes=(None, 0, 0, 0))(params, x0, condition, each), num_steps

    return every


@jax.jit
def keys_of(key: jax.Array, rows: jax.Array) -> jax.Array:
    """A key for each row, whatever else is in its batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def batches(
    solve: Solve,
    way: Way,
    store: Store,
    name: str,
    key: jax.Array,
    source: Source,
    batch_size: int,
    num: int,
    condition: Callable[[np.ndarray], Any],
    finish: Callable[[np.ndarray], np.ndarray] = lambda x1: x1,
    key_jumps: jax.Array | None = None,
) -> list[Batch]:
    """The batches of `num` samples, to be solved by the processes of a pod; `joined` reads them.

    Args:
      solve: from `make_solve`.
      way: how to solve.
      store: where the batches are kept.
      name: of these samples, unique in the store.
      key: of the noise; batch i draws from fold_in(key, i).
      source: where the flow begins.
      batch_size: samples per solve.
      num: how many; the last batch is drawn in full and cut.
      condition: that of the samples of these numbers, `Trained.condition`.
      finish: what is done to a batch before it is stored, quantising for instance.
      key_jumps: of the noise on the way of jumps, which need one; sample k draws from
        fold_in(key_jumps, k).

    Returns:
      One for each `batch_size` samples, their arrays "x1" and "num_evaluations".
    """

    def batch(i: int) -> dict[str, np.ndarray]:
        x0 = source.sample(jax.random.fold_in(key, i), batch_size)
        rows = np.arange(i * batch_size, (i + 1) * batch_size)
        each = None if key_jumps is None else keys_of(key_jumps, rows)
        x1, evaluations = solve(way, *put((x0, condition(rows))), each=each)
        return {"x1": finish(np.asarray(x1)), "num_evaluations": np.asarray(evaluations)}

    return [
        Batch(store, f"{name}_batch_{i:04d}", functools.partial(batch, i), str(way))
        for i in range(-(-num // batch_size))
    ]


def joined(batches: Sequence[Batch], num: int) -> Drawn:
    """The first `num` samples of `batches`, and what all of them cost."""
    found = [batch.get() for batch in batches]
    return Drawn(
        x1=np.concatenate([batch["x1"] for batch in found])[:num],
        num_evaluations=float(np.mean([batch["num_evaluations"] for batch in found])),
        seconds=float(sum(batch["seconds"] for batch in found)),
    )
