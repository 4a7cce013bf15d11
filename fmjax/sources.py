"""The source of a flow at t = 0: how it is sampled, and its log-density in nats per example."""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .types import SourceLogProb, as_batch, at_least_float32, returned, wider


class Source(NamedTuple):
    """A distribution that flows begin at.

    Attributes:
      sample: `(key, num) -> x0`, `[num, *event]`.
      log_prob: `x0 [batch, *event] -> [batch]`, in nats, summed over the event.
    """

    sample: Callable[[jax.Array, int], jax.Array]
    log_prob: SourceLogProb


def standard_normal(event_shape: tuple[int, ...]) -> Source:
    """Independent standard normals, N(0, I), float32.

    Args:
      event_shape: of one example.

    Returns:
      A `Source`; its density takes `[batch, *event_shape]`.

    Example:
      >>> source = standard_normal((2,))
      >>> source.sample(jax.random.key(0), 5).shape
      (5, 2)
      >>> source.log_prob(jnp.zeros((1, 2)))
      Array([-1.837877], dtype=float32)
    """

    def sample(key: jax.Array, num: int) -> jax.Array:
        return jax.random.normal(key, (num, *event_shape))

    return Source(sample, standard_normal_log_prob)


def standard_normal_log_prob(x: jax.Array) -> jax.Array:
    """log N(x; 0, I) summed over the event: `[batch, *event]` -> `[batch]`, in nats.

    Summed and returned in at least float32, whatever the dtype of x: half precision can't hold it.
    """
    x = at_least_float32(as_batch("x", x))
    event_size = math.prod(x.shape[1:])
    square = jnp.sum(jnp.square(x), axis=range(1, x.ndim))
    return -0.5 * (square + event_size * math.log(2 * math.pi))


def source_at(source_log_prob: SourceLogProb, x0: jax.Array, log_det: jax.Array) -> jax.Array:
    """What a caller's log-density gives at `x0`, refused unless it is `[batch]`.

    Returns:
      `[batch]`, or `[1, batch]` where `log_det` holds several estimates, in its dtype.
    """
    fix = "It must be [batch], summed over the event."
    log_p = returned("source_log_prob", source_log_prob(x0), x0.shape[:1], fix)
    return jnp.expand_dims(log_p.astype(log_det.dtype), range(log_det.ndim - 1))


def check_source(source_log_prob: SourceLogProb, x: jax.Array) -> None:
    """`source_at` before the solve that it follows, unless the density works outside of JAX."""
    x0 = jax.ShapeDtypeStruct(x.shape, wider(x.dtype, jnp.float32))
    log_det = jnp.zeros(x.shape[:1], x0.dtype)
    with contextlib.suppress(jax.errors.JAXTypeError):
        jax.eval_shape(lambda x0: source_at(source_log_prob, x0, log_det), x0)
