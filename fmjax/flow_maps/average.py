"""The average velocity U(t, s, x): one function for a flow, a flow map and a consistency model.

Let phi(t, s, x) be the position at time s of the ODE path that is at x at time t, and s >= t. Then

    U(t, s, x) = (phi(t, s, x) - x) / (s - t),      x_s = x_t + (s - t) U(t, s, x_t),

the mean over [t, s] of the velocity u along that path. Time runs from the source at t = 0 to the
data at t = 1. With h = s - t and the total derivative dU/dt = d_t U + (d_x U) u,

    U(t, t, x) = u(t, x),                                                  the boundary
    U = u + h dU/dt,                                                       differentiating the start
    U + h d_s U = u(s, phi(t, s, x)),                                      differentiating the end
    h U(t, s, x) = (r - t) U(t, r, x) + (s - r) U(r, s, phi(t, r, x)).     the semigroup

A one-step generator is x0 + U(0, 1, x0), and a consistency model x + (1 - t) U(t, 1, x).

Papers whose time runs from the data to the noise write U = u - (t - r) dU/dt: their clock is
reversed. In this one the sign is a plus.

Source: Geng et al. 2025, arXiv 2505.13447, equations 3 to 6; Boffi et al. 2024, arXiv 2406.07507.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..paths.affine import as_time
from ..types import (
    Velocity,
    as_batch,
    broadcast_time,
    check_velocity,
    is_concrete,
    returned,
    wider,
)


class AverageVelocity(Protocol):
    """`average_velocity(t, s, x) -> U`: any callable, with parameters and labels closed over.

    `t` and `s`, s >= t, are both `[]` or both `[batch]`; `x` and the returned `U` are arrays
    `[batch, *event]`. Of a network that was built with `horizon=True` it is

        lambda t, s, x: model.apply(params, t, x, horizon=s - t)
    """

    # Any, not jax.Array: Flax declares what `model.apply` returns that loosely.
    def __call__(self, t: jax.Array, s: jax.Array, x: jax.Array, /) -> Any: ...


def flow_map(
    average_velocity: AverageVelocity,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The flow map of an average velocity: x_s = x_t + (s - t) U(t, s, x_t).

    Args:
      average_velocity: `(t, s, x) -> U`.

    Returns:
      A function `(t, s, x) -> x_s`, with t and s `[]` or `[batch]`, x and x_s `[batch, *event]` in
      the dtype of x. A call costs one of `average_velocity`.

    Raises:
      ValueError: if `average_velocity` can't be called or is a Flax model without its parameters;
        by the map, for times of a wrong shape or outside [0, 1], for s < t where both are known,
        and if U has not the shape of x.

    Example:
      >>> jump = flow_map(lambda t, s, x: jnp.full_like(x, 2.0))
      >>> jump(0.5, 1.0, jnp.zeros((1, 2)))
      Array([[1., 1.]], dtype=float32)

    Source: arXiv 2505.13447, equation 12, with time reversed.
    """
    check_average(average_velocity)

    def x_s(t: jax.Array, s: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        t, s = as_times(t, s, x)
        wide = wider(wider(x.dtype, t.dtype), jnp.float32)
        average = checked_average(average_velocity, wide)(t, s, x)
        return (x.astype(wide) + broadcast_time(s - t, x).astype(wide) * average).astype(x.dtype)

    return x_s


def instantaneous(average_velocity: AverageVelocity) -> Velocity:
    """The velocity of an average velocity: u(t, x) = U(t, t, x).

    `fm.sample`, `fm.log_prob`, guidance and all else that takes a velocity works on it.

    Args:
      average_velocity: `(t, s, x) -> U`.

    Returns:
      A velocity `(t, x) -> u`.

    Raises:
      ValueError: if `average_velocity` can't be called or is a Flax model without its parameters;
        by the velocity, if U has not the shape of x.

    Example:
      >>> velocity = instantaneous(lambda t, s, x: (s - t) * x + 3.0)
      >>> velocity(jnp.array(0.5), jnp.ones((1, 2)))
      Array([[3., 3.]], dtype=float32)

    Source: arXiv 2505.13447, section 4.1.
    """
    call = checked_average(average_velocity)
    return lambda t, x: call(t, t, x)


def checked_average(
    average_velocity: AverageVelocity, dtype: Any = None
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """A caller's average velocity, refused where it returns another shape than that of x.

    U is cast to `dtype`; None keeps its own.
    """
    check_average(average_velocity)

    def call(t: jax.Array, s: jax.Array, x: jax.Array) -> jax.Array:
        u = average_velocity(t, s, x)
        fix = "It must be that of x, [batch, *event]."
        u = returned("the average velocity", u, np.shape(x), fix)
        return u if dtype is None else u.astype(dtype)

    return call


def check_average(average_velocity: Any) -> None:
    """Refuses what can't be called, and a network that would take s for x."""
    form, fix = "(t, s, x) -> U", "lambda t, s, x: model.apply(params, t, x, horizon=s - t)"
    check_velocity("the average velocity", average_velocity, form, fix)
    function = average_velocity
    bound = isinstance(function, functools.partial) and getattr(function.func, "__self__", None)
    if any(c.__module__.startswith("flax.linen") for c in type(bound).__mro__):
        raise ValueError(
            f"the average velocity must be a function {form}; got the apply of a Flax "
            f"{type(bound).__name__}, which takes no s. Build the model with horizon=True and "
            f"write {fix}."
        )


def as_times(t: Any, s: Any, x: jax.Array, end: str = "s") -> tuple[jax.Array, jax.Array]:
    """t and s in one dtype of at least float32 and one shape, `[]` or `[batch]`; `end` names s.

    Raises:
      ValueError: if the shape of either is no prefix of x's, for times outside [0, 1], and for
        s < t, each where the values are known.
    """
    t, s = as_time(t), as_time(s, end)
    for name, time in (("t", t), (end, s)):
        broadcast_time(time, x, name)  # refuses another shape
    if is_concrete(t, s) and (np.asarray(s) < np.asarray(t)).any():
        raise ValueError(
            f"{end} must not be before t, from which a flow map leads on to it; got {end} - t down "
            f"to {np.min(np.asarray(s) - np.asarray(t))}. Are they swapped?"
        )
    dtype = wider(t.dtype, s.dtype)
    shape = t.shape or s.shape
    return jnp.broadcast_to(t.astype(dtype), shape), jnp.broadcast_to(s.astype(dtype), shape)
