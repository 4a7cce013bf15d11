"""The types that the rooms share, and the one helper that broadcasts a time.

Time runs from the source at t = 0 to the data at t = 1. A batch is always there: `x` is
`[batch, *event]`, and `t` is `[]` (one time for all, as a solver gives it) or `[batch]` (as
training gives it), so that `t.shape` is a prefix of `x.shape`.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class PathSample(NamedTuple):
    """A point on a conditional path and its velocity: all that a flow-matching loss needs.

    Attributes:
      t: times in [0, 1], `[]` or `[batch]`.
      x_t: points, `[batch, *event]`.
      u_t: conditional velocities d/dt x_t, `[batch, *event]`.
    """

    t: jax.Array
    x_t: jax.Array
    u_t: jax.Array


class Velocity(Protocol):
    """`velocity(t, x) -> u`: any callable. Parameters and conditions are closed over.

    `t` is `[]` or `[batch]`; `x` and the returned `u` are arrays `[batch, *event]`.
    """

    # Any, not jax.Array: Flax declares what `model.apply` returns that loosely.
    def __call__(self, t: jax.Array, x: jax.Array, /) -> Any: ...


class Coupling(Protocol):
    """`coupling(key, x0, x1) -> x0`: the source re-paired with the data. Only `x0` moves."""

    def __call__(self, key: jax.Array, x0: jax.Array, x1: jax.Array, /) -> jax.Array: ...


class TimeSampler(Protocol):
    """`times(key, shape) -> t`: training times in [0, 1]."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], /) -> jax.Array: ...


class Divergence(Protocol):
    """`divergence(velocity, t, x) -> (u, div)`: the velocity and its divergence in one call.

    `u` is `[batch, *event]`; `div` is `[batch]`, exact or an unbiased estimate, or
    `[num_estimates, batch]`, several estimates side by side.
    """

    def __call__(
        self, velocity: Velocity, t: jax.Array, x: jax.Array, /
    ) -> tuple[jax.Array, jax.Array]: ...


class SourceLogProb(Protocol):
    """`source_log_prob(x0) -> [batch]`: log-density of the source, in nats per example."""

    def __call__(self, x0: jax.Array, /) -> jax.Array: ...


def broadcast_time(t: jax.Array, x: jax.Array) -> jax.Array:
    """Shapes a time, or a function of time, so that it multiplies `x` example by example.

    Args:
      t: `[]` or `[batch]`.
      x: `[batch, *event]`.

    Returns:
      `t` with ones appended to its shape, of rank `x.ndim`.

    Raises:
      ValueError: if `t.shape` is no prefix of `x.shape`.

    Example:
      >>> broadcast_time(jnp.zeros(4), jnp.zeros((4, 8, 8, 3))).shape
      (4, 1, 1, 1)
    """
    t = jnp.asarray(t)
    if t.ndim > 1 or t.shape != x.shape[: t.ndim]:
        raise ValueError(
            "t must have the shape [] or [batch], a prefix of the shape of x; "
            f"got t {t.shape} and x {x.shape}. A column of times needs t[:, 0]."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def check_same_shape(what: str, a: jax.Array, b: jax.Array) -> None:
    """Refuses two arrays whose shapes differ; `what` names them in the error."""
    if a.shape != b.shape:
        raise ValueError(
            f"{what} must have one shape, [batch, *event]; got {a.shape} and {b.shape}. "
            "Nothing is broadcast here: repeat the smaller one."
        )


def as_floating(what: str, x: jax.Array) -> jax.Array:
    """`x` as a JAX array; refuses integers, such as pixels that nobody has scaled."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{what} must be floating; got {x.dtype}. Pixels want fmjax.pixels.dequantize, other "
            "integers .astype(float)."
        )
    return x


def wider(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """The floating-point dtype with more bits; unlike a promotion, also under strict promotion."""
    return max(jnp.dtype(a), jnp.dtype(b), key=lambda dtype: jnp.finfo(dtype).bits)
