"""Optimal pairs that leave the source independent of a condition.

A velocity that is told a condition c of x1 is sampled from x0 ~ q(x0), whatever c. Pairs of least
cost break that: x0 then tells c, so that training sees p(x0 | c), which is not q. With c_i the
condition of the x1 that x0_i was drawn with, the cost

    |x0_i - x1_j|^2 + weight * d(c_i, c_j)

pays for every x0 that leaves its condition. Of classes, d = 1 where they differ, an infinite weight
pairs within each class: the set of x0 of every class stays, and p(x0 | c) = q(x0) exactly. Of
continuous conditions, d = |c_i - c_j|^2, a finite weight leaves some of the skew.

Source: Cheng and Schwing 2025, arXiv 2503.10636 (C2OT).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Coupling, as_array, kind, known_number, wider
from .assignment import (
    call_on_host,
    potentials,
    scipy_assignment,
    solve,
    solve_on_device,
)
from .exact import DIRECT, optimal_rows
from .points import as_pair, as_points, distances


def conditional_ot(conditions: Any, weight: float = math.inf) -> Coupling:
    """Pairs the batch by the optimal assignment that respects its conditions.

    It is made inside the training step, where the conditions are known:
    `fm.conditional_ot(labels)(key, x0, x1)`. Of labels, the permutation minimises the squared
    Euclidean cost within each class, as `minibatch_ot` of each class would. A continuous condition
    needs a finite weight, in units of |x0 - x1|^2 / |c|^2: the smaller the weight, the straighter
    the paths and the larger the skew. Measure it by the correlation of x0 and c.

    Args:
      conditions: of x1, `[batch, ...]`: integers or booleans for classes, equal where all of a row
        is; floats for continuous ones.
      weight: 0 or more; infinite, for classes alone, pairs nobody across classes.

    Returns:
      A coupling `(key, x0, x1) -> x0`: x0 permuted, with `minibatch_ot`'s exactness and rules for
      what is not finite. Its key is not used.

    Raises:
      ValueError: if `weight` is negative or NaN, or infinite for floats; by the coupling, if the
        conditions are not those of the batch, or as `minibatch_ot` does.

    Example:
      >>> x0, x1 = jnp.array([[5.0], [0.0], [1.0]]), jnp.array([[1.0], [4.0], [4.0]])
      >>> conditional_ot(jnp.array([0, 0, 1]))(jax.random.key(0), x0, x1)
      Array([[0.],
             [5.],
             [1.]], dtype=float32)

    Source: arXiv 2503.10636, section 4.
    """
    conditions = as_array("conditions", conditions)
    classes = not jnp.issubdtype(conditions.dtype, jnp.inexact)
    number = known_number(weight)
    if number is None or not number >= 0:
        raise ValueError(f"weight must be a number, 0 or more; got {kind(weight)}.")
    weight = number
    if not classes and (math.isinf(weight) or jnp.iscomplexobj(conditions)):
        raise ValueError(
            "weight must be finite for continuous conditions, of which no two are equal; got "
            f"weight={weight} and conditions of {conditions.dtype}. Classes must be integers."
        )

    def coupling(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        del key
        x0, x1 = as_pair(x0, x1)
        if conditions.shape[:1] != x0.shape[:1]:
            raise ValueError(
                "conditions must be those of this batch, [batch, ...]; got "
                f"{conditions.shape} for x1 {x1.shape}."
            )
        if not x0.size:
            return x0
        of = conditions.reshape(len(x0), -1)
        if classes:
            rows, finite = _rows_of_classes(x0, x1, of, weight)
        else:
            # |(x0, s c0) - (x1, s c1)|^2 with s^2 = weight is the cost.
            dtype = wider(wider(x0.dtype, x1.dtype), jnp.float32)
            of = math.sqrt(weight) * of.astype(dtype)
            rows, finite = optimal_rows(
                *(
                    jnp.concatenate([x.reshape(len(x), -1).astype(dtype), of], axis=1)
                    for x in (x0, x1)
                )
            )
        return jnp.where(finite, x0[rows], jnp.nan)

    return coupling


def _rows_of_classes(
    x0: jax.Array, x1: jax.Array, classes: jax.Array, weight: float
) -> tuple[jax.Array, jax.Array]:
    """The row of x0 for each of x1, `[batch]`, and whether all numbers were finite, `[]`."""
    points = as_points(x0, x1)
    penalty = jnp.asarray(weight, points.x0.dtype) / points.unit / points.unit

    def penalised(x0: jax.Array, x1: jax.Array, penalty: jax.Array) -> jax.Array:
        differ = jnp.any(classes[:, None] != classes[None], axis=-1)
        return distances(x0, x1) + jnp.where(differ, penalty, 0)

    def on_host(x0: jax.Array, x1: jax.Array, penalty: jax.Array) -> jax.Array:
        if math.isinf(weight):
            return call_on_host(_rows_within, x0, x1, classes)
        f, g = potentials(penalised(x0, x1, penalty))
        return call_on_host(_rows_penalised, x0, x1, classes, penalty, f, g)

    def on_device(x0: jax.Array, x1: jax.Array, penalty: jax.Array) -> jax.Array:
        return solve_on_device(penalised(x0, x1, penalty))

    rows = jax.lax.platform_dependent(points.x0, points.x1, penalty, cpu=on_host, default=on_device)
    return rows, points.finite


# NumPy and SciPy alone, on the host.


def _rows_within(x0: np.ndarray, x1: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The row of each column, one class after the other."""
    rows = np.empty(len(x0), np.int32)
    number = np.unique(classes, axis=0, return_inverse=True)[1].reshape(-1)
    for label in range(number.max() + 1):
        index = np.flatnonzero(number == label)
        columns = scipy_assignment(_costs(x0[index], x1[index]))[1]
        rows[index[columns]] = index
    return rows


def _rows_penalised(
    x0: np.ndarray,
    x1: np.ndarray,
    classes: np.ndarray,
    penalty: np.ndarray,
    f: np.ndarray,
    g: np.ndarray,
) -> np.ndarray:
    """The row of each column, where leaving a class costs the penalty."""
    differ = np.any(classes[:, None] != classes[None], axis=-1)
    return solve(_costs(x0, x1) + penalty.astype(np.float64) * differ, f, g)


def _costs(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """|x0[i] - x1[j]|^2 in float64: by differences, or of large events by products."""
    from scipy.spatial.distance import cdist  # late, for `import fmjax` to be light

    x0, x1 = x0.astype(np.float64), x1.astype(np.float64)
    if x0.shape[1] <= DIRECT:
        return cdist(x0, x1, "sqeuclidean")
    x0, x1 = x0 - x0.mean(axis=0), x1 - x1.mean(axis=0)  # changes no assignment
    return -2 * (x0 @ x1.T)  # the squares add the same to all of a row or of a column
