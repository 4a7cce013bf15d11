"""Pairs of times t <= s: between which an average velocity is trained.

Two samplers of `fmjax.times` give a start and an end, an order makes them a pair, and a share of
the pairs gets s = t, where U is the velocity and the data alone decide. The published pairs are

    MeanFlow, ImageNet    ordered_times(logit_normal(0.4, 1), logit_normal(0.4, 1), equal=0.75,
                                        order=sort_times)
    MeanFlow, CIFAR-10    ordered_times(logit_normal(2, 2), logit_normal(2, 2), equal=0.25,
                                        order=sort_times)
    the same, released    ordered_times(logit_normal(0.6, 1.6), logit_normal(4, 1.6), equal=0.25)

where a logit-normal of the papers' clock has the opposite mean on this one. In the last s = t holds
for 30 % of the pairs, since the order makes 5 % more of them equal.

Source: Geng et al. 2025, arXiv 2505.13447, section 4.3 and appendix A.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..types import TimeSampler, is_concrete, kind, known_number, returned


class TimePair(NamedTuple):
    """Two times t <= s in [0, 1], each `[]` or `[batch]`.

    Attributes:
      t: the start.
      s: the end; s - t is the horizon.
    """

    t: jax.Array
    s: jax.Array


def clip_end(start: jax.Array, end: jax.Array) -> TimePair:
    """The pair (t, max(t, s)) of any two times: t keeps its density, and s = t where s < t.

    Example:
      >>> clip_end(jnp.float32(0.75), jnp.float32(0.25))
      TimePair(t=Array(0.75, dtype=float32), s=Array(0.75, dtype=float32))
    """
    return TimePair(start, jnp.maximum(start, end))


def sort_times(start: jax.Array, end: jax.Array) -> TimePair:
    """The pair (min, max) of any two times.

    Example:
      >>> sort_times(jnp.float32(0.75), jnp.float32(0.25))
      TimePair(t=Array(0.25, dtype=float32), s=Array(0.75, dtype=float32))
    """
    return TimePair(jnp.minimum(start, end), jnp.maximum(start, end))


def ordered_times(
    start: TimeSampler,
    end: TimeSampler,
    *,
    equal: float | jax.Array,
    order: Callable[[jax.Array, jax.Array], TimePair] = clip_end,
) -> Callable[[jax.Array, tuple[int, ...]], TimePair]:
    """Pairs t <= s from two samplers, of which a share `equal` has s = t.

    Args:
      start: sampler of t, `(key, shape) -> t`.
      end: sampler of s.
      equal: the probability, in [0, 1], with which s is made t, each example's by itself, after
        the order; 0.25 to 0.75 is usual.
      order: `(start, end) -> TimePair`: `clip_end`, by which t keeps its density, or `sort_times`.

    Returns:
      A function `(key, shape) -> TimePair(t, s)`, both of shape `shape`.

    Raises:
      ValueError: if a sampler or the order can't be called, or `equal` is no probability; by the
        function, if a sampler or the order returns another shape, or the order, as far as it is
        known, a t > s.

    Example:
      >>> from fmjax.times import logit_normal
      >>> times = ordered_times(logit_normal(0.6, 1.6), logit_normal(4.0, 1.6), equal=0.25)
      >>> t, s = times(jax.random.key(0), (128,))
      >>> bool((t <= s).all())
      True

    Source: arXiv 2505.13447, section 4.3; the authors' PyTorch code for `clip_end`.
    """
    for name, function in (("start", start), ("end", end), ("order", order)):
        if not callable(function):
            form = "(start, end) -> TimePair" if name == "order" else "a sampler (key, shape) -> t"
            raise ValueError(f"{name} must be {form}; got {kind(function)}.")
    number = known_number(equal)
    if np.ndim(equal) or (is_concrete(equal) and (number is None or not 0 <= number <= 1)):
        raise ValueError(f"equal must be a probability in [0, 1]; got {kind(equal)}. Try 0.25.")

    def times(key: jax.Array, shape: tuple[int, ...]) -> TimePair:
        key_start, key_end, key_equal = jax.random.split(key, 3)
        first = returned("start", start(key_start, shape), shape)
        second = returned("end", end(key_end, shape), shape)
        ordered = order(first, second)
        if not isinstance(ordered, tuple) or len(ordered) != 2:
            raise ValueError(f"order must return TimePair(t, s); got {kind(ordered)}.")
        t, s = (returned("order", part, shape) for part in ordered)
        if is_concrete(t, s) and (np.asarray(t) > np.asarray(s)).any():
            raise ValueError("order must return t <= s; got a pair with t > s. Exchange the two.")
        return TimePair(t, jnp.where(jax.random.uniform(key_equal, shape) < equal, t, s))

    return times
