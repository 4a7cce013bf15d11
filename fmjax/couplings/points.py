"""Batches as rows of numbers, in a unit in which their squares neither overflow nor vanish."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..types import as_batch, check_same_shape, refuse_explicit_mesh, wider


class Points(NamedTuple):
    """Two batches, of which the gradient is stopped.

    Attributes:
      x0: `[n, D]`, in at least float32, in the unit.
      x1: `[m, D]`, likewise.
      unit: a power of two, `[]`.
      finite: whether all numbers are, `[]`; where they aren't, x0 and x1 are zero.
    """

    x0: jax.Array
    x1: jax.Array
    unit: jax.Array
    finite: jax.Array


def as_pair(x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as floating arrays `[batch, *event]`, refused if their shapes differ."""
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    refuse_explicit_mesh("x0", x0)
    return x0, x1


def as_points(x0: jax.Array, x1: jax.Array) -> Points:
    """Two batches `[n, *event]` and `[m, *event]`, neither of them empty."""
    dtype = wider(wider(x0.dtype, x1.dtype), jnp.float32)
    flat0, flat1 = (jax.lax.stop_gradient(x).reshape(len(x), -1).astype(dtype) for x in (x0, x1))
    finite = jnp.all(jnp.isfinite(flat0)) & jnp.all(jnp.isfinite(flat1))
    flat0, flat1 = (jnp.where(finite, x, 0) for x in (flat0, flat1))
    unit = power_of_two(flat0, flat1)  # rounds nothing
    return Points(flat0 / unit, flat1 / unit, unit, finite)


def distances(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """|x0[i] - x1[j]|^2, `[n, m]`, by differences: a turn is one pass over x1."""

    def costs(a: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(a[None] - x1), axis=1)

    return jax.lax.map(costs, x0)


def power_of_two(*arrays: jax.Array) -> jax.Array:
    """The power of two that divides the largest absolute value into [1, 2); NaN if not finite."""
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in arrays]))
    mantissa, _ = jnp.frexp(largest)
    power = jnp.where(largest > 0, largest / (2 * mantissa), 1)
    return jnp.where(jnp.isfinite(largest), power, jnp.nan)
