"""The divergence of a velocity: exact, or estimated without bias by Hutchinson's probes.

The divergence of v at (t, x) is the trace of its Jacobian J = dv/dx, example by example. The exact
one takes one product J e per dimension. For a probe e with mean zero and identity covariance

    E[e . J e] = tr J,

whose variance, with S = (J + J^T) / 2, is

    2 sum_{i != j} S_ij^2    for random signs (Rademacher),
    2 sum_{i, j}   S_ij^2    for Gaussian probes.

A probe depends on the key alone and so stays fixed during a solve, whose integral is then estimated
without bias by each probe on its own.

Sources: Hutchinson 1989, doi 10.1080/03610918908812806; Grathwohl et al. 2018, arXiv 1810.01367
(the probe that stays fixed).
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import (
    Divergence,
    Velocity,
    as_batch,
    at_least_float32,
    checked,
    kind,
    returned,
)

Probe = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def exact_divergence(chunk_size: int = 16) -> Divergence:
    """The trace of the Jacobian, one forward-mode product per dimension of the event.

    Args:
      chunk_size: how many products run in parallel. Memory grows with it, the result does not
        change; time mostly shrinks with it until the machine is full.

    Returns:
      A divergence `(velocity, t, x) -> (u, div)`, for any event shape.

    Raises:
      ValueError: if `chunk_size < 1`.

    Example:
      >>> u, div = exact_divergence()(lambda t, x: 3 * x, jnp.zeros(()), jnp.ones((2, 4)))
      >>> div
      Array([12., 12.], dtype=float32)
    """
    _check_count("chunk_size", chunk_size)

    def divergence(velocity: Velocity, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = as_batch("x", x)
        u, jacobian_product = jax.linearize(functools.partial(checked(velocity), t), x)
        batch, event_size = x.shape[0], math.prod(x.shape[1:])

        def diagonal(i: jax.Array) -> jax.Array:
            # Batch members don't see one another, so one tangent serves them all.
            basis = jax.nn.one_hot(i, event_size, dtype=x.dtype).reshape(1, *x.shape[1:])
            column = jacobian_product(jnp.broadcast_to(basis, x.shape))
            return at_least_float32(column.reshape(batch, event_size)[:, i])

        indices = jnp.arange(event_size)
        if event_size <= chunk_size:
            return u, jnp.sum(jax.vmap(diagonal)(indices), axis=0)
        return u, jnp.sum(jax.lax.map(diagonal, indices, batch_size=chunk_size), axis=0)

    return divergence


def hutchinson_divergence(
    key: jax.Array, num_probes: int = 1, *, probe: Probe = jax.random.rademacher
) -> Divergence:
    """Hutchinson's estimate: the mean over probes e of e . (J e).

    Args:
      key: random key.
      num_probes: probes per example; the cost grows in proportion, the variance shrinks.
      probe: `(key, shape, dtype) -> e` with mean zero and identity covariance:
        `jax.random.rademacher`, random signs, or `jax.random.normal`, whose variance is larger.

    Returns:
      A divergence `(velocity, t, x) -> (u, div)`, for any event shape.

    Raises:
      ValueError: if `num_probes < 1`.

    Source: Hutchinson 1989, doi 10.1080/03610918908812806.
    """
    estimates = hutchinson_estimates(key, num_probes, probe=probe)

    def divergence(velocity: Velocity, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, div = estimates(velocity, t, x)
        return u, jnp.mean(div, axis=0)

    return divergence


def hutchinson_estimates(
    key: jax.Array, num_probes: int, *, probe: Probe = jax.random.rademacher
) -> Divergence:
    """Hutchinson's estimates one by one, so that their spread says how good their mean is.

    `log_prob` with it is `[num_probes, batch]`: with k probes the estimate of an example is the
    mean over axis 0 and its standard error the standard deviation there over sqrt(k).

    Args:
      key: random key; with the same one `hutchinson_divergence` returns the mean of these.
      num_probes: probes per example.
      probe: as for `hutchinson_divergence`.

    Returns:
      A divergence `(velocity, t, x) -> (u, div)`, `div` of shape `[num_probes, batch]`.

    Raises:
      ValueError: if `num_probes < 1`.

    Example:
      >>> estimates = hutchinson_estimates(jax.random.key(0), 8)
      >>> estimates(lambda t, x: jnp.sin(x), jnp.zeros(()), jnp.ones((3, 2)))[1].shape
      (8, 3)
    """
    _check_count("num_probes", num_probes)

    def divergence(velocity: Velocity, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = as_batch("x", x)
        u, jacobian_product = jax.linearize(functools.partial(checked(velocity), t), x)
        shape = (num_probes, *x.shape)
        probes = returned("probe", probe(key, shape, x.dtype), shape).astype(x.dtype)

        def quadratic_form(e: jax.Array) -> jax.Array:
            product = at_least_float32(e) * at_least_float32(jacobian_product(e))
            return jnp.sum(product, axis=range(1, x.ndim))

        return u, jax.vmap(quadratic_form)(probes)

    return divergence


def divergence_at(
    divergence: Divergence, velocity: Velocity, t: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a caller's divergence gives at (t, x), refused unless it is (u, div) of these shapes.

    Args:
      divergence: `(velocity, t, x) -> (u, div)`.
      velocity: `(t, x) -> u`.
      t: `[]` or `[batch]`.
      x: `[batch, *event]`, in the dtype of the solve, in which u and div are returned.

    Returns:
      u `[batch, *event]`, and div `[batch]` or `[num_estimates, batch]`.

    Raises:
      ValueError: if what comes back is no such pair, or `divergence` makes one: exact_divergence
        without parentheses.
    """
    if divergence in (exact_divergence, hutchinson_divergence, hutchinson_estimates):
        raise ValueError(
            f"divergence must be a divergence; got {kind(divergence)}, which makes one: "
            f"{divergence.__name__}(...)."  # pyright: ignore[reportAttributeAccessIssue]
        )
    if not callable(divergence):
        raise ValueError(f"divergence must be a function; got {kind(divergence)}.")
    pair = divergence(velocity, t, x)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(f"The divergence must return the pair (u, div); got {kind(pair)}.")
    u = returned("The divergence's velocity", pair[0], x.shape)
    many = np.ndim(pair[1]) == 2  # several estimates, along a leading axis
    shape = (*np.shape(pair[1])[:many], x.shape[0])
    fix = "It must be [batch] or [num_estimates, batch], summed over the event."
    div = returned("The divergence", pair[1], shape, fix)
    return u.astype(x.dtype), div.astype(x.dtype)


def _check_count(name: str, count: Any) -> None:
    try:
        good = operator.index(count) >= 1
    except TypeError:
        good = False
    if not good:
        raise ValueError(f"{name} must be at least 1, a whole number; got {kind(count)}.")


EXACT = exact_divergence()
