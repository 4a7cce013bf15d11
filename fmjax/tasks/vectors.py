"""What experiments on tables share: columns standardised, densities in the original units.

A table's columns are brought to mean 0 and standard deviation 1 by the training rows, and samples
brought back. A density of the standardised rows z gives log p(x) = log p(z) - sum_d log s_d.

Conditions are columns that are given and not modelled, standardised too. The network is told them
as {"value": [batch, C], "known": [batch]}; of a dropped one both are zero.
"""

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import fmjax as fm
from fmjax import data, inference, models, plotting, training
from fmjax.harness.task import Init, Task, Trained
from fmjax.tasks import points


@dataclasses.dataclass(frozen=True)
class VectorConfig(points.PointConfig):
    """The flags of an experiment on a table."""

    data: pathlib.Path = tyro.MISSING
    """The table, .npz, .csv, .tsv or .txt: rows of numbers, of which a tenth is held out unless the
    file holds arrays `train` and `test`."""
    columns: tuple[str, ...] = ()
    """Columns to model; all others than the conditions without the flag."""
    condition: tuple[str, ...] = ()
    """Columns that are given and not modelled: the flow is conditional on them."""
    condition_dropout: float = 0.0
    """Share of the rows whose condition isn't told in training; above 0 for guidance."""

    def data_name(self) -> str:
        return self.data.stem


class Rows(NamedTuple):
    """Standardised rows `[batch, D]`, float32, and their condition, a pytree, or None."""

    x: Any
    condition: Any


class Vectors(NamedTuple):
    """A table, standardised.

    Attributes:
      train: to train on.
      held_out: not to train on.
      names: of the columns.
      condition_names: of those that are given.
      standardizer: of the columns.
      of_conditions: of those that are given; None where there are none.
    """

    train: Rows
    held_out: Rows
    names: tuple[str, ...]
    condition_names: tuple[str, ...]
    standardizer: inference.Standardizer
    of_conditions: inference.Standardizer | None


def open_vectors(config: VectorConfig) -> Vectors:
    """Reads the table that the flags name, and standardises it by its training rows.

    Raises:
      ValueError: as `data.load_table` does; for a dropout that is no probability, or one without
        conditions.
    """
    if not 0 <= config.condition_dropout <= 1:
        raise ValueError(f"--condition-dropout must be in [0, 1]; got {config.condition_dropout}.")
    if config.condition_dropout and not config.condition:
        raise ValueError(
            f"--condition-dropout needs --condition COLUMNS; got {config.condition_dropout} "
            "without."
        )
    columns = config.columns or None
    train, held_out = (
        data.load_table(config.data, split, columns=columns, conditions=config.condition)
        for split in ("train", "test")
    )
    standardizer = inference.fit_standardizer(train.x)
    given = None if train.conditions is None else inference.fit_standardizer(train.conditions)

    def rows(table: data.Table) -> Rows:
        x = inference.standardize(standardizer, table.x)
        return Rows(x, None if given is None else as_condition(given, table.conditions))

    names = train.names, train.condition_names
    return Vectors(rows(train), rows(held_out), *names, standardizer, given)


def as_condition(given: inference.Standardizer, values: Any) -> dict[str, np.ndarray]:
    """Conditions `[num, C]` in original units as the network is told them."""
    value = inference.standardize(given, np.asarray(values, np.float64))
    return {"value": value, "known": np.ones(len(value), np.float32)}


def _given(table: Vectors, values: tuple[float, ...]) -> dict[str, np.ndarray]:
    """One condition in original units as the network is told it."""
    assert table.of_conditions is not None, "a run with conditions"
    names = table.condition_names
    if len(values) != len(names) or not np.isfinite(values).all():
        raise ValueError(
            f"--given takes one finite number for each of {', '.join(names)}; got "
            f"{' '.join(map(str, values))}."
        )
    return jax.tree.map(lambda x: x[0], as_condition(table.of_conditions, [values]))


def drop_condition(config: VectorConfig, key: jax.Array, condition: Any) -> Any:
    """The condition that the network is told: of a part of the rows, drawn one by one, none."""
    if condition is None or not config.condition_dropout:
        return condition
    return fm.drop_labels(key, condition, _null(condition), config.condition_dropout)


def _null(condition: Any) -> Any:
    return jax.tree.map(lambda x: np.zeros(np.shape(x)[1:], np.float32), condition)


def make_mlp(config: VectorConfig) -> models.MLP | models.ConditionalMLP:
    """The MLP that the flags describe, conditional where columns are given."""
    make = models.ConditionalMLP if config.condition else models.MLP
    return make(**dataclasses.asdict(config.model))


def init_params(model: models.MLP | models.ConditionalMLP, table: Vectors, key: jax.Array) -> Any:
    """The MLP's first parameters."""
    x, *condition = (jax.tree.map(lambda leaf: jnp.asarray(leaf[:1]), part) for part in table.train)
    return model.init(key, jnp.zeros(()), x, *(part for part in condition if part is not None))


def velocity_of(
    model: models.MLP | models.ConditionalMLP, params: Any, condition: Any = None
) -> fm.Velocity:
    """The velocity under a condition, a pytree of `[batch, ...]`."""
    apply = functools.partial(model.apply, params)
    return apply if condition is None else functools.partial(apply, condition=condition)


def make_task(
    config: VectorConfig,
    table: Vectors,
    model: models.MLP | models.ConditionalMLP,
    init: Init,
    step: training.TrainStep,
) -> Task:
    """The task of an experiment on a table, from what differs between them.

    Args:
      config: its flags.
      table: from `open_vectors`.
      model: from `make_mlp`.
      init: `key -> TrainState`.
      step: `(state, key, Rows) -> (state, metrics)`.
    """
    train, held_out = table.train, table.held_out
    log_scale = -float(inference.log_det(table.standardizer))

    def take(rows: Rows, index: Any) -> Rows:
        return jax.tree.map(lambda x: x[index], rows)

    def original(z: np.ndarray) -> np.ndarray:
        return inference.unstandardize(table.standardizer, np.asarray(z))

    def evaluated() -> points.Points:
        half = len(held_out.x) // 2
        first, second = take(held_out, slice(half)), take(held_out, slice(half, 2 * half))
        fresh = {0: second.x}.get
        return points.Points(first.x, fresh, first.condition, log_scale)

    def condition(rows: np.ndarray) -> Any:
        return take(held_out, rows % len(held_out.x)).condition

    shown = points.Data(
        x1=train.x,
        held_out=held_out.x,
        evaluated=evaluated,
        batch=functools.partial(take, train),
        held_out_batch=functools.partial(take, held_out),
        arrays=lambda z: {"x": original(z)},
        condition=condition if config.condition else None,
        given=functools.partial(_given, table) if config.condition else None,
        null=_null(train.condition) if config.condition_dropout else None,
        held_out_conditions=held_out.condition,
        log_scale=log_scale,
        picture=lambda arrays: plotting.corner(original(held_out.x), arrays["x"], table.names),
        facts={"columns": table.names, "conditions": table.condition_names},
    )
    return points.make_task(config, shown, init, step, functools.partial(velocity_of, model))


def log_prob(config: VectorConfig, trained: Trained, x: Any, conditions: Any = None) -> np.ndarray:
    """log p of rows in the table's own units, in nats.

    Args:
      config: the run's flags, `trained.config`.
      trained: the run, from `fmjax.harness.read.read`.
      x: `[num, D]`, in original units.
      conditions: `[num, C]`, in original units; None for a run without conditions.

    Returns:
      `[num]`, float64.
    """
    table = open_vectors(config)
    z = jnp.asarray(inference.standardize(table.standardizer, np.asarray(x, np.float64)))
    given = None if table.of_conditions is None else as_condition(table.of_conditions, conditions)
    solve = jax.jit(lambda params, z, given: fm.log_prob(trained.velocity(params, given), z))
    log_p = np.asarray(solve(trained.params, z, given), np.float64)
    return log_p + float(inference.log_det(table.standardizer))
