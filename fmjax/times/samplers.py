"""A time sampler that knows its quantile function, and the checks that samplers share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import TimeSampler, is_concrete, kind


class QuantileSampler:
    """A time sampler `(key, shape) -> t` with the quantile function of its density.

    With F the distribution function of the times, `quantile(u)` is the t with F(t) = u: it carries
    a uniform number to a time. Whoever spreads uniform numbers evenly, as `stratified` does, can
    spread times so.

    Args:
      times: the sampler `(key, shape) -> t`; it draws as it did.
      quantile: `u -> t`, increasing, from [0, 1] to [0, 1], of any shape.

    Attributes:
      quantile: the same.

    Example:
      >>> times = QuantileSampler(lambda key, shape: jax.random.uniform(key, shape), lambda u: u)
      >>> times(jax.random.key(0), (128,)).shape
      (128,)
    """

    def __init__(self, times: TimeSampler, quantile: Callable[[jax.Array], jax.Array]):
        functools.update_wrapper(self, times)
        self._times = times
        self.quantile = quantile

    def __call__(self, key: jax.Array, shape: tuple[int, ...], /) -> jax.Array:
        return self._times(key, shape)


def from_quantile(quantile: Callable[[jax.Array], jax.Array]) -> QuantileSampler:
    """The sampler that carries uniform numbers over: t = quantile(u), u ~ U[0, 1)."""

    def times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return quantile(jax.random.uniform(key, shape, jnp.float32))

    return QuantileSampler(times, quantile)


def carried(times: TimeSampler, change: Callable[[jax.Array], jax.Array]) -> TimeSampler:
    """The sampler of change(t), `change` increasing; with a quantile function if `times` has one.

    Raises:
      ValueError: if `times` can't be called.
    """
    check_sampler(times)

    def changed(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return change(times(key, shape))

    quantile = getattr(times, "quantile", None)
    return changed if quantile is None else QuantileSampler(changed, lambda u: change(quantile(u)))


def check_sampler(times: Any) -> None:
    """Refuses what can't be called."""
    if not callable(times):
        raise ValueError(f"times must be a sampler (key, shape) -> t; got {kind(times)}.")


def check_finite(name: str, value: Any) -> None:
    """Refuses what is no number, or a number that is known not to be finite."""
    number = isinstance(value, int | float | np.number)
    if isinstance(value, jax.Array):
        number = value.shape == () and jnp.issubdtype(value.dtype, jnp.number)
    if not number or (is_concrete(value) and not math.isfinite(value)):
        raise ValueError(
            f"{name} must be a finite number; got {kind(value)}. logit_normal(mean, std) makes a "
            "sampler: logit_normal()(key, shape)."
        )
