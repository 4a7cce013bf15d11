"""The coefficients of an affine path and combinations of two arrays with them, for `paths`.

Everything that `paths` computes is a(t) x + b(t) y with a and b made of alpha, sigma, their time
derivatives, which `jax.jvp` takes, and W = alpha' sigma - alpha sigma'.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .types import broadcast_time, check_same_shape, wider

Schedule = Callable[[jax.Array], jax.Array]
Path = tuple[Schedule, Schedule]  # alpha and sigma: `paths.AffinePath` is one


def schedule(path: Path, t: jax.Array) -> tuple[jax.Array, ...]:
    """t as a floating-point array, then alpha, sigma, alpha' and sigma' there."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(jnp.float32)

    def both(t: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jnp.broadcast_to(jnp.asarray(f(t), t.dtype), t.shape) for f in path)

    (alpha, sigma), (alpha_dot, sigma_dot) = jax.jvp(both, (t,), (jnp.ones_like(t),))
    return t, alpha, sigma, alpha_dot, sigma_dot


def schedule_with_w(path: Path, t: jax.Array) -> tuple[jax.Array, ...]:
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
    check_same_shape("x_t and the value to convert", x_t, value)
    broadcast_time(t, x_t)  # a wrong shape is named before a singular value
    refuse_singular(name, t, a, b)
    return combine(a, x_t, b, value)


def refuse_singular(name: str, t: jax.Array, *coefficients: jax.Array) -> None:
    """Refuses a concrete t at which a coefficient is infinite or undefined."""
    if any(isinstance(c, Tracer) for c in coefficients):
        return
    for c in coefficients:
        finite = jnp.isfinite(c)
        if not finite.all():
            raise ValueError(
                f"{name} has no finite value where this path is singular; got t = "
                f"{jnp.ravel(t)[jnp.argmin(jnp.ravel(finite))]}. Stay inside (0, 1), for instance "
                "t in [1e-5, 1 - 1e-5], or use a path without the singularity, such as "
                "cond_ot(sigma_min=1e-4)."
            )
