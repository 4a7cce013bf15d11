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
from fmjax.harness.task import Init, Samples, Task, Trained
from fmjax.tasks import points
from fmjax.tasks.facts import known_or
from fmjax.training import digests


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


_FACTS = frozenset({"num_examples", "event_shape", "columns", "conditions", "moments", "sha256"})


class Vectors:
    """A table, standardised by its training rows.

    What a finished run needs for its samples (names and moments, the `facts`) is in its folder: to
    draw from it takes no table, and another table of today changes no units.

    Args:
      config: a `VectorConfig`.

    Raises:
      ValueError: by the attributes, as `data.load_table` does.
    """

    def __init__(self, config: VectorConfig):
        self._config = config

    @functools.cached_property
    def _tables(self) -> tuple[data.Table, data.Table]:
        config = self._config
        try:
            train, held_out = (
                data.load_table(
                    config.data, split, columns=config.columns or None, conditions=config.condition
                )
                for split in ("train", "test")
            )
        except ValueError as error:
            text = str(error).replace("`columns`", "--columns")
            text = text.replace("`conditions`", "--condition")
            raise ValueError(
                text if str(config.data) in text else f"{config.data}: {text}"
            ) from error
        return train, held_out

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """`describe` of the table; of a finished run what its folder says."""
        return known_or(self._config.known, _FACTS, self.describe)

    def describe(self) -> dict[str, Any]:
        """What a run folder keeps of the table that is there now."""
        train, held_out = self._tables
        parts = [train.x, train.conditions, held_out.x, held_out.conditions]
        moments = [inference.fit_standardizer(x) for x in parts[:2] if x is not None]
        return {
            "num_examples": len(train.x),
            "event_shape": [train.x.shape[1]],
            "columns": list(train.names),
            "conditions": list(train.condition_names),
            "moments": [[part.mean.tolist(), part.std.tolist()] for part in moments],
            "sha256": digests.hash_json(
                [None if part is None else digests.hash_array(part) for part in parts]
            ),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Of the columns that are modelled."""
        return tuple(self.facts["columns"])

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Of those that are given."""
        return tuple(self.facts["conditions"])

    @functools.cached_property
    def standardizer(self) -> inference.Standardizer:
        """Of the columns that are modelled."""
        return inference.Standardizer(*map(np.asarray, self.facts["moments"][0]))

    @functools.cached_property
    def of_conditions(self) -> inference.Standardizer | None:
        """Of those that are given; None where there are none."""
        found = self.facts["moments"][1:]
        return inference.Standardizer(*map(np.asarray, found[0])) if found else None

    @functools.cached_property
    def train(self) -> Rows:
        """To train on."""
        return self._rows(self._tables[0])

    @functools.cached_property
    def held_out(self) -> Rows:
        """Not to train on."""
        return self._rows(self._tables[1])

    def _rows(self, table: data.Table) -> Rows:
        x, given = inference.standardize(self.standardizer, table.x), self.of_conditions
        return Rows(x, None if given is None else as_condition(given, table.conditions))


def open_vectors(config: VectorConfig) -> Vectors:
    """The table that the flags name.

    Raises:
      ValueError: for a dropout that is no probability, or one without conditions; as the table
        does.
    """
    if not 0 <= config.condition_dropout <= 1:
        raise ValueError(f"--condition-dropout must be in [0, 1]; got {config.condition_dropout}.")
    if config.condition_dropout and not config.condition:
        raise ValueError(
            f"--condition-dropout needs --condition COLUMNS; got {config.condition_dropout} "
            "without."
        )
    table = Vectors(config)
    _ = table.facts  # a table that can't work is refused here
    return table


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
    null = jax.tree.map(lambda x: np.zeros(np.shape(x)[1:], np.float32), condition)
    return fm.drop_labels(key, condition, null, config.condition_dropout)


def make_mlp(config: VectorConfig) -> models.MLP | models.ConditionalMLP:
    """The MLP that the flags describe, conditional where columns are given."""
    make = models.ConditionalMLP if config.condition else models.MLP
    return make(**dataclasses.asdict(config.model))


def init_params(model: models.MLP | models.ConditionalMLP, table: Vectors, key: jax.Array) -> Any:
    """The MLP's first parameters."""
    x, given = jnp.zeros((1, len(table.names))), table.of_conditions
    condition = () if given is None else (_none(len(table.condition_names), 1),)
    return model.init(key, jnp.zeros(()), x, *condition)


def _none(num_columns: int, num: int) -> dict[str, jax.Array]:
    """The condition that stands for none, for so many rows."""
    return {"value": jnp.zeros((num, num_columns)), "known": jnp.zeros(num)}


def velocity_of(
    model: models.MLP | models.ConditionalMLP, params: Any, condition: Any = None
) -> fm.Velocity:
    """The velocity under a condition, a pytree of `[batch, ...]`.

    Raises:
      ValueError: if a conditional network is given none.
    """
    apply = functools.partial(model.apply, params)
    if condition is None and isinstance(model, models.ConditionalMLP):
        raise ValueError(
            "A run with conditions needs one for each row, {'value': [batch, C], 'known': "
            "[batch]}; got none. fmjax.tasks.vectors.as_condition makes them."
        )
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

    def take(rows: Rows, index: Any) -> Rows:
        return jax.tree.map(lambda x: x[index], rows)

    def original(z: np.ndarray) -> np.ndarray:
        return inference.unstandardize(table.standardizer, np.asarray(z))

    def told(condition: Any) -> dict[str, np.ndarray]:
        assert table.of_conditions is not None
        value = inference.unstandardize(table.of_conditions, np.asarray(condition["value"]))
        return {"conditions": value}

    @functools.cache
    def load() -> points.Data:
        train, held_out, given = table.train, table.held_out, ", ".join(table.condition_names)
        log_scale, half = -float(inference.log_det(table.standardizer)), len(held_out.x) // 2
        first, second = take(held_out, slice(half)), take(held_out, slice(half, 2 * half))
        evaluated = points.Points(
            first.x, {0: second.x}.get, first.condition, given, "standardised columns", log_scale
        )
        return points.Data(
            x1=train.x,
            held_out=held_out.x,
            evaluated=lambda: evaluated,
            facts=table.describe(),
            batch=functools.partial(take, train),
            held_out_batch=functools.partial(take, held_out),
            held_out_conditions=held_out.condition,
            log_scale=log_scale,
            given=given,
        )

    def condition(rows: np.ndarray) -> Any:
        return take(table.held_out, rows % len(table.held_out.x)).condition

    conditional, num = bool(table.condition_names), len(table.condition_names)
    samples = Samples(
        fm.standard_normal((len(table.names),)),
        lambda z: {"x": original(z)},
        condition if conditional else None,
        jax.tree.map(lambda x: x[0], _none(num, 1)) if config.condition_dropout else None,
        picture=lambda arrays, condition: plotting.corner(
            original(table.held_out.x), arrays["x"], table.names
        ),
        told=told if conditional else None,
        given=functools.partial(_given, table) if conditional else None,
    )
    velocity = functools.partial(velocity_of, model)
    return points.make_task(config, table.facts, load, init, step, velocity, samples)


def log_prob(trained: Trained, x: Any, conditions: Any = None) -> np.ndarray:
    """log p of rows in the table's own units, in nats.

    Args:
      trained: the run, from `fmjax.harness.read.read`.
      x: `[num, D]`, in original units.
      conditions: `[num, C]`, in original units; None for a run without conditions.

    Returns:
      `[num]`, float64.
    """
    table = open_vectors(trained.config)
    z = jnp.asarray(inference.standardize(table.standardizer, np.asarray(x, np.float64)))
    given = None if table.of_conditions is None else as_condition(table.of_conditions, conditions)
    solve = jax.jit(lambda params, z, given: fm.log_prob(trained.velocity(params, given), z))
    log_p = np.asarray(solve(trained.params, z, given), np.float64)
    return log_p + float(inference.log_det(table.standardizer))
