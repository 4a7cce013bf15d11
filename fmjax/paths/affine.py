"""Affine paths x_t = alpha(t) x1 + sigma(t) x0: the point and its velocity.

Everything that these paths need is a(t) x + b(t) y with a and b made of alpha, sigma, their time
derivatives, which `jax.jvp` takes, and W = alpha' sigma - alpha sigma'.

Sources: Lipman et al. 2022, arXiv 2210.02747 (sections 3 and 4); Tong et al. 2023, arXiv
2302.00482.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..types import (
    PathSample,
    as_array,
    as_batch,
    as_floating,
    at_least_float32,
    broadcast_time,
    check_same_shape,
    is_concrete,
    kind,
    returned,
    wider,
)

Schedule = Callable[[jax.Array], jax.Array]


class AffinePath(NamedTuple):
    """The path x_t = alpha(t) x1 + sigma(t) x0; two functions of one's own make one.

    It is no pytree of arrays: close over it, don't pass it through `jax.jit`.

    Attributes:
      alpha: weight of the data, a differentiable elementwise function of `t`.
      sigma: weight of the source, likewise.

    Example:
      >>> path = AffinePath(alpha=lambda t: t**2, sigma=lambda t: 1 - t**2)
    """

    alpha: Schedule
    sigma: Schedule


def sample_path(path: AffinePath, x0: jax.Array, x1: jax.Array, t: jax.Array) -> PathSample:
    """The point x_t on the path from `x0` to `x1` at time `t`, and its velocity u_t = d/dt x_t.

    Args:
      path: the path.
      x0: source, `[batch, *event]`.
      x1: data, `[batch, *event]`.
      t: times in [0, 1], `[]` or `[batch]`.

    Returns:
      `PathSample(t, x_t, u_t)`; `x_t` and `u_t` are `[batch, *event]` in the dtype of `x1`.

    Raises:
      ValueError: if the shapes disagree, if `t.shape` is no prefix of `x1.shape`, if the data are
        integers, or where a concrete `t` meets an infinite slope of alpha or sigma (a traced one
        gives infinity there).

    Example:
      >>> path = AffinePath(alpha=lambda t: t, sigma=lambda t: 1 - t)
      >>> sample_path(path, jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0.0, 0.5])).x_t[1]
      Array([0.5, 0.5, 0.5], dtype=float32)
    """
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    t, alpha, sigma, alpha_dot, sigma_dot = schedule(path, t)
    refuse_singular("sample_path", t, alpha_dot, sigma_dot)
    return PathSample(t, combine(alpha, x1, sigma, x0), combine(alpha_dot, x1, sigma_dot, x0))


def schedule(path: AffinePath, t: Any) -> tuple[jax.Array, ...]:
    """t as an array of at least float32, then alpha, sigma, alpha' and sigma' there."""
    check_path(path)
    t = as_time(t)

    def both(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return weights(path, t)

    (alpha, sigma), (alpha_dot, sigma_dot) = jax.jvp(both, (t,), (jnp.ones_like(t),))
    return t, alpha, sigma, alpha_dot, sigma_dot


def weights(path: AffinePath, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma alone, at times that are checked already."""
    return coefficient("alpha", path.alpha, t), coefficient("sigma", path.sigma, t)


def schedule_with_w(path: AffinePath, t: Any) -> tuple[jax.Array, ...]:
    t, alpha, sigma, alpha_dot, sigma_dot = schedule(path, t)
    w = alpha_dot * sigma - alpha * sigma_dot
    # The reciprocal of an infinite W would be a silent zero.
    return t, alpha, sigma, alpha_dot, sigma_dot, jnp.where(jnp.isfinite(w), w, jnp.nan)


def check_path(path: Any) -> None:
    """Refuses what is no path, the factory of one above all."""
    if callable(path):
        name = getattr(path, "__name__", type(path).__name__)
        raise ValueError(f"path must be a path; got {kind(path)}, which makes one: {name}().")
    if not isinstance(path, tuple) or len(path) != 2 or not all(map(callable, path)):
        raise ValueError(
            f"path must be AffinePath(alpha, sigma), two functions of time; got {kind(path)}. "
            "fmjax.cond_ot() is one."
        )


_SLACK = 1e-5  # a grid in float32, or a difference quotient, need not end on 0 and 1


def as_time(t: Any, name: str = "t") -> jax.Array:
    """t as an array of at least float32; refused outside [0, 1] where its value is known."""
    t = as_array(name, t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = as_floating(name, t) if jnp.iscomplexobj(t) else t.astype(jnp.float32)
    if is_concrete(t) and t.size:
        known = np.asarray(t)  # JAX's own minimum of it is traced under jit
        if not (known.min() >= -_SLACK and known.max() <= 1 + _SLACK):
            raise ValueError(
                f"{name} must be in [0, 1], 0 at the source and 1 at the data; got times from "
                f"{known.min()} to {known.max()}. Steps of 0..N need t / N."
            )
    return at_least_float32(t)


def coefficient(name: str, function: Schedule, t: jax.Array) -> jax.Array:
    """A function of time at t, in the shape and the dtype of t; a number is constant."""
    value = function(t)
    if isinstance(value, int | float):
        value = jnp.asarray(value, t.dtype)
    constant = getattr(value, "shape", None) == ()
    fix = f"{name} is an elementwise function of t, or a number."
    value = returned(f"{name}(t)", value, () if constant else t.shape, fix)
    return jnp.broadcast_to(value.astype(t.dtype), t.shape)


def combine(a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array) -> jax.Array:
    """a x + b y, with a and b functions of time, computed in the wider dtype, returned in x's."""
    dtype = wider(a.dtype, x.dtype)
    a, b = broadcast_time(a, x).astype(dtype), broadcast_time(b, x).astype(dtype)
    return (a * x.astype(dtype) + b * y.astype(dtype)).astype(x.dtype)


def scaled(a: jax.Array, x: jax.Array) -> jax.Array:
    """a x, with a a function of time, computed in the wider dtype, returned in x's."""
    dtype = wider(a.dtype, x.dtype)
    return (broadcast_time(a, x).astype(dtype) * x.astype(dtype)).astype(x.dtype)


def refuse_singular(name: str, t: jax.Array, *coefficients: jax.Array, fix: str = "") -> None:
    """Refuses a concrete t where a coefficient is infinite or undefined; `fix` ends the error."""
    if not is_concrete(*coefficients):
        return
    for c in coefficients:
        finite = jnp.isfinite(c)
        if not finite.all():
            at = jnp.ravel(t)[jnp.argmin(jnp.ravel(finite))]
            if not fix and at > 0.5:
                fix = "cond_ot(sigma_min=1e-4) has no singularity at the data."
            raise ValueError(
                f"{name} has no finite value where this path is singular; got t = {at}. Take t "
                f"inside (0, 1), from 1e-5 to 1 - 1e-5 for instance.{' ' * bool(fix)}{fix}"
            )
