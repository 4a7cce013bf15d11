"""The coefficients of an affine path and combinations of two arrays with them, for `paths`.

Everything that `paths` computes is a(t) x + b(t) y with a and b made of alpha, sigma, their time
derivatives, which `jax.jvp` takes, and W = alpha' sigma - alpha sigma'.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..types import (
    as_array,
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
Path = tuple[Schedule, Schedule]  # alpha and sigma: `paths.AffinePath` is one


def schedule(path: Path, t: Any) -> tuple[jax.Array, ...]:
    """t as an array of at least float32, then alpha, sigma, alpha' and sigma' there."""
    check_path(path)
    t = as_time(t)

    def both(t: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            _coefficient(name, f, t) for name, f in zip(("alpha", "sigma"), path, strict=True)
        )

    (alpha, sigma), (alpha_dot, sigma_dot) = jax.jvp(both, (t,), (jnp.ones_like(t),))
    return t, alpha, sigma, alpha_dot, sigma_dot


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


def as_time(t: Any) -> jax.Array:
    """t as an array of at least float32; refused outside [0, 1] where its value is known."""
    t = as_array("t", t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = as_floating("t", t) if jnp.iscomplexobj(t) else t.astype(jnp.float32)
    if is_concrete(t) and t.size and not (t.min() >= -_SLACK and t.max() <= 1 + _SLACK):
        raise ValueError(
            f"t must lie in [0, 1], 0 at the source and 1 at the data; got times from {t.min()} to "
            f"{t.max()}. Steps of 0..N need t / N."
        )
    return at_least_float32(t)


_SLACK = 1e-5  # a grid in float32, or a difference quotient, need not end on 0 and 1


def _coefficient(name: str, function: Schedule, t: jax.Array) -> jax.Array:
    value = function(t)
    if isinstance(value, int | float):
        value = jnp.asarray(value, t.dtype)
    constant = getattr(value, "shape", None) == ()
    fix = f"{name} is an elementwise function of t, or a number."
    value = returned(f"{name}(t)", value, () if constant else t.shape, fix)
    return jnp.broadcast_to(value.astype(t.dtype), t.shape)


def schedule_with_w(path: Path, t: Any) -> tuple[jax.Array, ...]:
    t, alpha, sigma, alpha_dot, sigma_dot = schedule(path, t)
    w = alpha_dot * sigma - alpha * sigma_dot
    # The reciprocal of an infinite W would be a silent zero.
    return t, alpha, sigma, alpha_dot, sigma_dot, jnp.where(jnp.isfinite(w), w, jnp.nan)


def combine(a: jax.Array, x: jax.Array, b: jax.Array, y: jax.Array) -> jax.Array:
    """a x + b y, with a and b functions of time, computed in the wider dtype, returned in x's."""
    dtype = wider(a.dtype, x.dtype)
    a, b = broadcast_time(a, x).astype(dtype), broadcast_time(b, x).astype(dtype)
    return (a * x.astype(dtype) + b * y.astype(dtype)).astype(x.dtype)


def convert(
    name: str, t: jax.Array, a: jax.Array, x_t: jax.Array, b: jax.Array, value: jax.Array
) -> jax.Array:
    x_t, value = as_floating("x_t", x_t), as_floating("the value to convert", value)
    check_same_shape("x_t and the value to convert", x_t, value)
    broadcast_time(t, x_t)  # a wrong shape is named before a singular value
    refuse_singular(name, t, a, b)
    return combine(a, x_t, b, value)


def refuse_singular(name: str, t: jax.Array, *coefficients: jax.Array) -> None:
    """Refuses a concrete t at which a coefficient is infinite or undefined."""
    if not is_concrete(*coefficients):
        return
    for c in coefficients:
        finite = jnp.isfinite(c)
        if not finite.all():
            at = jnp.ravel(t)[jnp.argmin(jnp.ravel(finite))]
            noise = " cond_ot(sigma_min=1e-4) has no singularity at the data." if at > 0.5 else ""
            raise ValueError(
                f"{name} has no finite value where this path is singular; got t = {at}. Take t "
                f"inside (0, 1), from 1e-5 to 1 - 1e-5 for instance.{noise}"
            )
