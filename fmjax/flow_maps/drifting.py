"""Drifting: a generator of one step whose own batch tells it where to go, without time and flow.

Examples x of the generator are drawn to data p and pushed away from each other. With distances d
to all targets y, which are negatives n and positives p, in the unit of their mean over all pairs,

    a(x, y) = sqrt(softmax over y of -d/R  times  softmax over x of -d/R),
    F(x) = sum_p sum_n a(x, p) a(x, n) (p - n),

and the drift V adds F, brought to a root mean square of 1, over temperatures R. Exchanging p and n
changes its sign, so V = 0 where the two are one distribution: the equilibrium. Training moves every
example to where its drift points: |x/S - sg(x/S + V/S)|^2, S a typical distance per coordinate.

The published models drift in the features of a trained encoder, and not in pixels.

Source: Deng et al. 2026, arXiv 2602.04770.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ..couplings.points import distances, power_of_two
from ..types import as_batch, check_number, kind, wider

_TEMPERATURES = (0.02, 0.05, 0.2)


def drift(
    x: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperatures: Sequence[float] = _TEMPERATURES,
) -> jax.Array:
    """Where each x is drawn to by the positives and pushed to by the negatives. No gradient.

    Args:
      x: `[batch, *event]`.
      positives: data, `[p, *event]`.
      negatives: `[n, *event]`; None takes x, no example of which pushes itself.
      temperatures: R of each term, in mean distances.

    Returns:
      V `[batch, *event]`, in the unit of x and at least float32. Each temperature's term has the
      root mean square S, the mean distance over the square root of the event's size, or is zero
      where positives and negatives are the same up to rounding.

    Raises:
      ValueError: for an empty set, event shapes that differ, a single x without negatives, and
        temperatures that are not positive.

    Example:
      >>> drift(jnp.zeros((1, 1)), jnp.ones((1, 1)), -jnp.ones((1, 1)), temperatures=[1.0])
      Array([[1.]], dtype=float32)

    Source: arXiv 2602.04770, algorithm 2.
    """
    direction, unit = _drift(x, positives, negatives, temperatures)
    return direction * unit


def drifting_loss(
    x: jax.Array, positives: jax.Array, *, temperatures: Sequence[float] = _TEMPERATURES
) -> jax.Array:
    """The squared drift, whose gradient moves x along V: |x/S - sg(x/S + V/S)|^2 / D.

    Args:
      x: the generator's examples, `[batch, *event]`, two or more.
      positives: data, `[p, *event]`; with classes, of x's own (`jax.vmap` over them).
      temperatures: of `drift`.

    Returns:
      `[batch]`, mean squares over the event in the unit S, in at least float32.

    Raises:
      ValueError: as `drift` does.

    Example:
      >>> x = jnp.array([[-1.0], [1.0]])
      >>> drifting_loss(x, jnp.zeros((1, 1)), temperatures=[0.2])
      Array([1., 1.], dtype=float32)

    Source: arXiv 2602.04770, equation 6.
    """
    direction, unit = _drift(x, positives, None, temperatures)
    scaled = jnp.asarray(x).astype(direction.dtype) / unit
    apart = scaled - lax.stop_gradient(scaled + direction)
    return jnp.mean(jnp.square(apart), axis=range(1, apart.ndim))


def _drift(
    x: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None,
    temperatures: Sequence[float],
) -> tuple[jax.Array, jax.Array]:
    """V / S and S."""
    sets = _sets(x, positives, x if negatives is None else negatives)
    if negatives is None and len(sets[0]) < 2:
        raise ValueError("x must be two examples or more, which push each other; got 1.")
    _check_temperatures(temperatures)

    dtype = functools.reduce(wider, (s.dtype for s in sets), jnp.dtype(jnp.float32))
    flat = [lax.stop_gradient(s).reshape(len(s), -1).astype(dtype) for s in sets]
    scale = power_of_two(*flat)  # squares neither overflow nor vanish
    origin = jnp.mean(flat[1] / scale, axis=0, keepdims=True)  # an offset would cost digits
    points, plus, minus = (s / scale - jnp.broadcast_to(origin, s.shape) for s in flat)
    apart = jnp.sqrt(distances(points, jnp.concatenate([minus, plus])))
    pairs = jnp.ones(apart.shape, bool)
    if negatives is None:
        pairs &= ~jnp.eye(*apart.shape, dtype=bool)
    mean = jnp.mean(apart, where=pairs)
    mean = jnp.where(mean == 0, 1, mean)

    logits = jnp.where(pairs, -apart / mean, -jnp.inf)
    forces = [_force(logits, plus, minus, temperature) for temperature in temperatures]
    total = jnp.sum(jnp.stack(forces), axis=0)
    return total.reshape(sets[0].shape), scale * mean / points.shape[1] ** 0.5


def _force(logits: jax.Array, plus: jax.Array, minus: jax.Array, temperature: float) -> jax.Array:
    """F of every x, of root mean square 1; zero where it is rounding."""
    logits /= temperature
    log_a = (jax.nn.log_softmax(logits, axis=1) + jax.nn.log_softmax(logits, axis=0)) / 2
    log_minus, log_plus = log_a[:, : len(minus)], log_a[:, len(minus) :]
    # Weights of each x, a(x, p) sum_n a(x, n), of which all share one factor.
    to_plus = log_plus + jax.nn.logsumexp(log_minus, axis=1, keepdims=True)
    to_minus = log_minus + jax.nn.logsumexp(log_plus, axis=1, keepdims=True)
    largest = jnp.maximum(to_plus.max(), to_minus.max())
    toward, away = (
        jnp.matmul(jnp.exp(weights - largest), rows, precision="highest")
        for weights, rows in ((to_plus, plus), (to_minus, minus))
    )
    # What two equal sums leave is rounding, that of the logits, and is not brought to 1.
    rounding = 32 * jnp.finfo(logits.dtype).eps * (1 + 1 / temperature)
    size = jnp.maximum(_rms(toward - away), rounding * (_rms(toward) + _rms(away)))
    return (toward - away) / jnp.where(size == 0, 1, size)


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _sets(*given: jax.Array) -> list[jax.Array]:
    """x, positives and negatives, of one event shape and none of them empty."""
    names = ("x", "positives", "negatives")
    sets = [as_batch(name, points) for name, points in zip(names, given, strict=True)]
    for name, points in zip(names, sets, strict=True):
        if not points.size or points.shape[1:] != sets[0].shape[1:]:
            raise ValueError(
                f"{name} must be [number, *event] and not empty, with the event shape of x; got "
                f"{points.shape} and x {sets[0].shape}."
            )
    return sets


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not isinstance(temperatures, Sequence) or isinstance(temperatures, str) or not temperatures:
        raise ValueError(
            f"temperatures must be a list of one or more, as {_TEMPERATURES}; got "
            f"{kind(temperatures)}."
        )
    for temperature in temperatures:
        usual = "Published ones are 0.02, 0.05 and 0.2 mean distances"
        check_number("temperatures", temperature, usual, positive=True)
