"""Densities of training times on [0, 1]: from which t the loss is drawn.

Time runs from the source (t = 0) to the data (t = 1). A time sampler is `(key, shape) -> t`; any
function of that form can be trained with. The density weighs the loss and moves no optimum.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import TimeSampler, is_concrete, kind


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """t ~ U[0, 1), the density of the paper (arXiv 2210.02747).

    Args:
      key: random key.
      shape: the shape to draw, usually `(batch,)`.

    Returns:
      Times in [0, 1), float32, of shape `shape`.
    """
    return jax.random.uniform(key, shape, jnp.float32)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """t = sigmoid(mean + std n), n ~ N(0, 1): more training in the middle of the path.

    Args:
      mean: location on the logit scale; above 0 it moves the times towards the data.
      std: scale, positive.

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `mean` or `std` is no finite number, or `std` not positive.

    Example:
      >>> t = logit_normal(0.0, 1.0)(jax.random.key(0), (128,))

    Source: Esser et al. 2024, arXiv 2403.03206, section 3.1.
    """
    _check_finite("mean", mean)
    _check_finite("std", std)
    if is_concrete(std) and not float(std) > 0:
        raise ValueError(f"std must be positive; got {std}. The usual value is 1.")

    def times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))

    return times


def edm_skewed(mean: float = -1.2, std: float = 1.2, t_min: float = 1e-4) -> TimeSampler:
    """t = 1 / (1 + s), s = exp(mean + std n), n ~ N(0, 1), clipped to [t_min, 1].

    EDM's density of noise levels, carried to flow times: s is the ratio sigma / alpha of `cond_ot`.
    It is `logit_normal(-mean, std)` but for the clip, and leans towards the data.

    Args:
      mean: mean of log s.
      std: standard deviation of log s, positive.
      t_min: the smallest time, in [0, 1).

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `mean` or `std` is no finite number, `std` is not positive, or `t_min` is
        outside [0, 1).

    Source: Karras et al. 2022, arXiv 2206.00364, table 1.
    """
    _check_finite("mean", mean)
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must be in [0, 1); got {t_min}. The usual value is 1e-4.")
    times = logit_normal(-mean, std)
    return lambda key, shape: jnp.clip(times(key, shape), t_min, 1.0)


def shifted(times: TimeSampler, shift: float) -> TimeSampler:
    """Times t / (t + shift (1 - t)) of the times t of a sampler: more noise at the same draw.

    On `cond_ot` the ratio sigma / alpha of every time is multiplied by `shift`, so that shifting
    twice is shifting by the product. Above 1 it moves the times towards the source, as larger
    images want it. The same shift of a solver's grid is
    `match_times(AffinePath(lambda t: t, lambda t: shift * (1 - t)), cond_ot(), ts)`.

    Args:
      times: a time sampler, such as `uniform` or `logit_normal()`.
      shift: positive and finite; 1 leaves the times as they are.

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `times` can't be called, or `shift` is no finite number or not positive.

    Example:
      >>> t = shifted(uniform, 3.0)(jax.random.key(0), (128,))

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2, with time reversed.
    """
    if not callable(times):
        raise ValueError(f"times must be a sampler (key, shape) -> t; got {kind(times)}.")
    _check_finite("shift", shift)
    if is_concrete(shift) and not float(shift) > 0:
        raise ValueError(f"shift must be positive; got {shift}. 1 shifts nothing.")

    def later(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        t = times(key, shape)
        return t / (t + shift * (1 - t))

    return later


def _check_finite(name: str, value: Any) -> None:
    number = isinstance(value, int | float | np.number)
    if isinstance(value, jax.Array):
        number = value.shape == () and jnp.issubdtype(value.dtype, jnp.number)
    if not number or (is_concrete(value) and not math.isfinite(value)):
        raise ValueError(
            f"{name} must be a finite number; got {kind(value)}. logit_normal(mean, std) makes a "
            "sampler: logit_normal()(key, shape)."
        )
