"""What differs between experiments: a `Task`; the harness does the rest.

A task is made by `make_task(config)`, a function of its experiment. `config.json` names it, so that
evaluation, sampling and export find the task of a run folder by importing it.

`from_loss` makes the usual step, on the key k_n = fold_in(key, n) of step n:

    k_draw, k_loss = split(k_n)
    loss           = mean(loss(params, k_loss, draw(k_draw, batch)))

What is random about the examples (noise, times, pairing, dropped labels) is drawn over the global
batch, also where its loss is taken in parts (`LossStep`). A task with a step of its own, of two
networks or of a teacher, brings it as a function `(state, key, batch) -> (state, metrics)`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fmjax import training
from fmjax.guidance import batched_guidance
from fmjax.sources import Source
from fmjax.training import accumulation, digests
from fmjax.types import Velocity, kind, returned

Batch = Callable[[np.ndarray], Any]  # rows `[num]` of the data -> a pytree of arrays `[num, ...]`
Draw = Callable[[jax.Array, Any], Any]  # (key, batch) -> drawn, a pytree of arrays `[batch, ...]`
Loss = Callable[[Any, jax.Array, Any], jax.Array]  # (params, key, drawn) -> `[batch]`
Init = Callable[[jax.Array], training.TrainState]


class Samples(NamedTuple):
    """How new examples are drawn from a trained task, and what is kept of them.

    Attributes:
      source: where the flow begins.
      arrays: `x1 [num, *event] -> {name: array [num, ...]}` on the host: pixel values, original
        units. The first is what the task is about.
      condition: `rows [num] -> condition`, a pytree of host arrays `[num, ...]`: that of the k-th
        sample; None for a velocity without conditions.
      null: the condition that stands for none, for guidance; None where there is none.
      num_classes: where conditions are classes 0..num_classes - 1; else None.
      picture: `(arrays, condition) -> uint8 [height, width, 3]`, a picture of all of them; None for
        what can't be drawn.
      told: `condition -> {name: array}`, what is kept of conditions; None for `{"labels": ...}`.
      given: `values -> condition` of one sample, from numbers that a user gives; None where
        conditions are not numbers.
      single: `arrays of one sample -> uint8 [height, width, 1 or 3]`, pixel by pixel; None for what
        is no picture.
      jump: `(params, key, x0, condition, num_steps) -> x1`, drawing in so many evaluations by a way
        of the task's own, with its key for noise on the way; None for a velocity alone.
    """

    source: Source
    arrays: Callable[[np.ndarray], dict[str, np.ndarray]]
    condition: Callable[[np.ndarray], Any] | None = None
    null: Any = None
    num_classes: int | None = None
    picture: Callable[[dict[str, np.ndarray], Any], np.ndarray] | None = None
    single: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None
    told: Callable[[Any], dict[str, np.ndarray]] | None = None
    given: Callable[[tuple[float, ...]], Any] | None = None
    jump: Callable[[Any, jax.Array, jax.Array, Any, int], jax.Array] | None = None


class Task(NamedTuple):
    """What differs between experiments.

    Attributes:
      num_examples: of the training data.
      batch: `rows [num] -> pytree` of host arrays `[num, ...]`, the examples of these numbers:
        memory, disk or network is its own affair.
      init: `key -> TrainState`.
      step: `(state, key, batch) -> (state, metrics)`, a pure function that is not jitted; the key
        is the run's, the same at every step. `from_loss` makes `init` and `step`.
      velocity: `(params, condition) -> Velocity`, how a run folder is sampled from.
      finish: `(trained, folder, key) -> figures` after training, as JSON can hold them.
      evaluate: `(trained, folder, flags) -> record`, what `fmjax.evaluation` measures; by every
        process of a pod (`harness.share` divides batches), of which process 0's is kept.
      preview: `(trained, key) -> picture`, uint8 `[height, width, 3]`, small.
      samples: how new examples are drawn.
      num_held_out: examples that are not trained on, for the held-out loss.
      held_out: as `batch`, of these.
      about: what the first line of a run says besides.
      data: `() -> record` of what the data are, as JSON can hold it: shapes, numbers, a hash. A run
        resumes on the same alone.
    """

    num_examples: int
    batch: Batch
    init: Init
    step: training.TrainStep
    velocity: Callable[[Any, Any], Velocity]
    finish: Callable[[Any, pathlib.Path, jax.Array], dict[str, Any]] | None = None
    evaluate: Callable[[Any, pathlib.Path, Any], dict[str, Any]] | None = None
    preview: Callable[[Any, jax.Array], np.ndarray] | None = None
    samples: Samples | None = None
    num_held_out: int = 0
    held_out: Batch | None = None
    about: str = ""
    data: Callable[[], dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A task with parameters that were trained.

    Attributes:
      task: the task.
      name: of the experiment, "digits" say.
      config: the flags that it was trained under.
      step: training steps.
      params: the parameters, of which `average` says whether they are the moving average.
      average: see there.
      guidance: the scale of `guided`; 1 is none.
    """

    task: Task
    name: str
    config: Any
    step: int
    params: Any
    average: bool = True
    guidance: float = 1.0

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the parameters, their names, dtypes and shapes, in hex."""
        return digests.hash_tree(self.params)

    def velocity(self, params: Any, condition: Any = None) -> Velocity:
        """The velocity under a condition, unguided; the parameters are an argument, as jit wants
        them."""
        return self.task.velocity(params, condition)

    def guided(self, params: Any, condition: Any = None) -> Velocity:
        """The velocity under a condition, guided away from that of none."""
        return guided(self.task, params, condition, self.guidance)

    @property
    def source(self) -> Source:
        """Where the flow begins."""
        if self.task.samples is None:
            raise ValueError(f"Samples need Task.samples; the task of {self.name} has none.")
        return self.task.samples.source

    def condition(self, rows: np.ndarray) -> Any:
        """The conditions of the samples of these numbers; None for a task without conditions."""
        samples = self.task.samples
        return None if samples is None or samples.condition is None else samples.condition(rows)


def guided(task: Task, params: Any, condition: Any, scale: float) -> Velocity:
    """A task's velocity under classifier-free guidance; at scale 1 the network is called once.

    Raises:
      ValueError: for another scale than 1, if the task knows no null condition.
    """
    if scale == 1:
        return task.velocity(params, condition)
    if condition is None:
        raise ValueError(f"Guidance needs a condition to be guided to; got none, scale {scale}.")
    check_guidance(task, scale)
    assert task.samples is not None  # else check_guidance has raised

    def velocity(t: jax.Array, x: jax.Array, condition: Any) -> jax.Array:
        return task.velocity(params, condition)(t, x)

    return batched_guidance(velocity, condition, task.samples.null, scale)


def check_guidance(task: Task, scale: float) -> None:
    """Refuses guidance of a task that has not learnt it."""
    if scale != 1 and (task.samples is None or task.samples.null is None):
        raise ValueError(
            "Guidance needs a run that was trained with conditions and, for a part of its "
            f"examples, without; got a scale of {scale}."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class LossStep:
    """The step that `from_loss` makes: `(state, key, batch) -> (state, metrics)`.

    Attributes:
      undivided: takes the loss of the batch at once; what a call does.
      in_parts: `(num_parts, mesh) -> step` that takes it in parts, once the whole batch is drawn,
        for less memory: `training.accumulation`. The update is the same, to rounding, but for what
        the loss draws from its key: dropout's masks are each part's own.
    """

    undivided: training.TrainStep
    in_parts: Callable[[int, Mesh], training.TrainStep]

    def __call__(
        self, state: training.TrainState, key: jax.Array, batch: Any
    ) -> tuple[training.TrainState, training.Metrics]:
        return self.undivided(state, key, batch)


def from_loss(
    draw: Draw,
    loss: Loss,
    tx: optax.GradientTransformation,
    init_params: Callable[[jax.Array], Any],
    *,
    ema_decay: float | optax.Schedule = 0.9999,
) -> tuple[Init, LossStep]:
    """The `init` and `step` of a task whose loss is a mean over examples.

    Args:
      draw: `(key, batch) -> drawn`, all that is random about the examples, over the global batch;
        both are pytrees of arrays `[batch, ...]`.
      loss: `(params, key, drawn) -> [batch]`; its key is for dropout.
      tx: an Optax transformation.
      init_params: `key -> params`, a pytree of floating-point arrays.
      ema_decay: of the parameters' moving average, as `training.make_train_step` takes it.

    Returns:
      `init(key) -> TrainState` and `step(state, key, batch) -> (state, metrics)`, both to be
      jitted by the caller; see the module for the keys.

    Raises:
      ValueError: as `training.make_train_step` does; by the step, if the loss is not `[batch]`.

    Example:
      >>> def draw(key, x1):
      ...     return x1 + jax.random.normal(key, x1.shape)
      >>> def loss(params, key, drawn):
      ...     return (drawn - params["mean"]) ** 2
      >>> tx = optax.adam(1e-2)
      >>> init, step = from_loss(draw, loss, tx, lambda key: {"mean": jnp.zeros(())})
      >>> state, metrics = step(init(jax.random.key(0)), jax.random.key(1), jnp.ones(4))
      >>> int(state.step)
      1
    """

    def init(key: jax.Array) -> training.TrainState:
        return training.init_train_state(init_params(key), tx)

    def losses(params: Any, key: jax.Array, drawn: Any) -> jax.Array:
        shape = np.shape(jax.tree.leaves(drawn)[0])[:1]
        return returned("loss", loss(params, key, drawn), shape, "One number for each example.")

    def step(mean: training.LossFn) -> training.TrainStep:
        def mean_loss(params: Any, key: jax.Array, batch: Any) -> jax.Array:
            key_draw, key_loss = jax.random.split(key)
            return mean(params, key_loss, _same_length(draw(key_draw, batch)))

        return training.make_train_step(mean_loss, tx, ema_decay=ema_decay)

    def in_parts(num_parts: int, mesh: Mesh) -> training.TrainStep:
        return step(accumulation.mean_in_parts(losses, num_parts, mesh))

    return init, LossStep(step(lambda *args: jnp.mean(losses(*args))), in_parts)


def _same_length(drawn: Any) -> Any:
    """What was drawn, if all of its arrays have the axis of the batch."""
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(drawn)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "draw must return arrays that all begin with the axis of the batch; got "
            f"{[kind(leaf) for leaf in jax.tree.leaves(drawn)]}."
        )
    return drawn
