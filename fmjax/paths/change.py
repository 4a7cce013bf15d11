"""A trained velocity along another path: change of schedule after training, by the angle.

All affine paths pass through the same points but for a scale. With the angle
phi(t) = atan2(alpha(t), sigma(t)) and the radius r(t) = hypot(alpha(t), sigma(t)), the point of a
path P at t and the point of a path Q at s with phi_P(t) = phi_Q(s) are multiples of one another,
x_Q = r_Q(s) / r_P(t) x_P, and have the same predictions x1 and x0. So

    t = phi_P^-1(phi_Q(s)),   u_Q = alpha_Q' x1 + sigma_Q' x0,   x1, x0 of P at r_P(t) / r_Q(s) x.

Neither alpha nor sigma divides anything, and the slope of t in s never appears: it is finite
wherever alpha_Q' and sigma_Q' are and the predictions can be had, both ends included. The inverse
is found by search for the sign of alpha_P sigma_Q - sigma_P alpha_Q, for any schedule.

Angles that P does not reach are taken from its nearest end: those of `cond_ot(sigma_min)` past
its t = 1, and those below alpha(0) = 0.0066 of `vp`. There identities hold to that, no better.

DDIM's update x_s = alpha(s) x1 + sigma(s) x0 is Euler's method after a change to `cond_ot()`, on
the grid of `match_times`, with x scaled by `match_scales` at both ends.

Sources: Karras et al. 2022, arXiv 2206.00364 (schedules as scalings); Song et al. 2020, arXiv
2010.02502 (DDIM); Lipman et al. 2024, arXiv 2412.06264 (section 4.8.2, by the signal-to-noise
ratio, which is infinite at the data).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, broadcast_time, is_concrete
from .affine import AffinePath, Schedule, as_time, check_path, scaled, weights
from .predictions import PredictedVelocity, predictor

SECTIONS = 32  # of the interval in one round of the search: five bits of t


def change_path(velocity: Velocity, trained: AffinePath, wanted: AffinePath) -> PredictedVelocity:
    """The velocity along `wanted` of what was trained along `trained`. One call of it for each.

    Samples and likelihoods of an exact solve are the same along both; the steps of a solver are
    not. It holds for every coupling.

    Args:
      velocity: `(t, x) -> u` along `trained`. Of a `PredictedVelocity`, made by `from_x0`,
        `from_x1` or this function, the predictions are changed and not u: from `vp` and `linear_vp`
        that is finite at t = 1, where their u is infinite.
      trained: the path that it was trained along.
      wanted: the path to solve along.

    Returns:
      A velocity `(t, x) -> u` along `wanted`, whose `predict(t, x)` is (x1, x0).

    Raises:
      ValueError: if a path is none or does not run from the source to the data, or `velocity` can't
        be called; by the velocity, at a concrete t where `wanted` has an infinite slope, or where
        the velocity of `trained` has no finite predictions (`vp` at t = 1, `polynomial(2)` at 0); a
        traced one gives NaN there.

    Example:
      >>> from fmjax.paths.schedules import cond_ot, cosine
      >>> velocity = change_path(lambda t, x: 3 - x, cond_ot(), cosine())
      >>> velocity(jnp.array(1.0), jnp.zeros((1, 2))).round(5)  # -pi / 2 of x0 = x - u
      Array([[4.71239, 4.71239]], dtype=float32)
    """
    _check_direction(trained, wanted)
    predict_trained = predictor("change_path", trained, velocity)

    def predict(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, t = as_batch("x", x), as_time(t)
        broadcast_time(t, x)
        there, scale = _match(wanted, trained, t)
        return predict_trained(there, scaled(scale, x))

    return PredictedVelocity(wanted, predict)


def match_times(trained: AffinePath, wanted: AffinePath, ts: jax.Array) -> jax.Array:
    """The times at which `wanted` passes the points that `trained` passes at `ts`.

    The points agree up to the factor `match_scales(trained, wanted, ts)`. A grid for a solver, or a
    shift of one: `match_times(AffinePath(lambda t: t, lambda t: 3 * (1 - t)), cond_ot(), ts)` is
    the grid t / (t + 3 (1 - t)), where the ratio sigma / alpha is three times that of `ts`.

    Args:
      trained: the path that passes the points at `ts`.
      wanted: the other path.
      ts: times in [0, 1], of any shape.

    Returns:
      Times of the shape of `ts`, in float32 at least; an end of `wanted` where it passes none of
      the points. Differentiable in `ts`.

    Raises:
      ValueError: if a path is none or does not run from the source to the data, or a concrete `ts`
        is outside [0, 1].

    Example:
      >>> from fmjax.paths.schedules import cond_ot, cosine
      >>> match_times(cosine(), cond_ot(), jnp.array([0.0, 0.5, 1.0]))
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    _check_direction(trained, wanted)
    return _match(trained, wanted, as_time(ts))[0]


def match_scales(trained: AffinePath, wanted: AffinePath, ts: jax.Array) -> jax.Array:
    """The number by which x of `wanted` at `match_times(...)` is x of `trained` at `ts`.

    Arguments and errors are those of `match_times`.

    Returns:
      r_wanted / r_trained with r = hypot(alpha, sigma), of the shape of `ts`.

    Example:
      >>> from fmjax.paths.schedules import cond_ot, cosine
      >>> match_scales(cosine(), cond_ot(), jnp.array([0.0, 0.5, 1.0])).round(3)
      Array([1.   , 0.707, 1.   ], dtype=float32)
    """
    _check_direction(trained, wanted)
    return _match(trained, wanted, as_time(ts))[1]


def _match(origin: AffinePath, target: AffinePath, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The time of `target` at the angle of `origin` at t, and the ratio of the radii."""
    alpha, sigma = weights(origin, t)
    there = _time_at(target, alpha, sigma)
    return there, jnp.hypot(*weights(target, there)) / jnp.hypot(alpha, sigma)


def _time_at(path: AffinePath, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """The t at which alpha(t) / sigma(t) is alpha / sigma, else the nearest end of the path."""

    def ahead(t: jax.Array) -> jax.Array:
        """The sine of the angle by which the path is ahead, times both radii."""
        alpha_t, sigma_t = weights(path, t)
        return alpha_t * sigma - sigma_t * alpha

    zero, one = jnp.zeros_like(alpha), jnp.ones_like(alpha)
    t = jax.lax.custom_root(ahead, zero, _search, lambda f, y: y / f(one))
    reached = (ahead(zero) <= 0) & (ahead(one) >= 0)
    return jnp.where(reached, t, jax.lax.stop_gradient(t))  # an end does not move


def _search(ahead: Schedule, start: jax.Array) -> jax.Array:
    """Where a growing function changes its sign in [0, 1], to the last bit; else the nearer end."""
    weight = jnp.linspace(0, 1, SECTIONS + 1, dtype=start.dtype)
    weight = weight.reshape(-1, *(1,) * start.ndim)

    def narrow(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        points = low[None] * (1 - weight) + high[None] * weight  # ends on low and high exactly
        before = jax.vmap(ahead)(points) < 0
        low = jnp.max(jnp.where(before, points, low[None]), axis=0)
        return low, jnp.min(jnp.where(before, high[None], points), axis=0)

    rounds = math.ceil((jnp.finfo(start.dtype).nmant + 1) / math.log2(SECTIONS))
    low, high = jax.lax.fori_loop(0, rounds, narrow, (start, jnp.ones_like(start)))
    at_low, at_high = ahead(low), ahead(high)
    differ = at_high > at_low
    share = -at_low / jnp.where(differ, at_high - at_low, 1)
    return jnp.where(differ, low + (high - low) * share, high)


def _check_direction(*paths: AffinePath) -> None:
    """Refuses a path, where its values are known, on which alpha / sigma does not grow."""
    for path in paths:
        check_path(path)
        with jax.ensure_compile_time_eval():
            alpha, sigma = weights(path, jnp.linspace(0, 1, 33, dtype=jnp.float32))
            if not is_concrete(alpha, sigma):
                continue
            grows = alpha[1:] * sigma[:-1] - sigma[1:] * alpha[:-1] > -1e-6
            if not (grows.all() and alpha[-1] * sigma[0] > sigma[-1] * alpha[0]):
                raise ValueError(
                    "A path must run from the source at t = 0 to the data at t = 1, alpha / sigma "
                    f"growing; got one from {alpha[0]:.3g} / {sigma[0]:.3g} to {alpha[-1]:.3g} / "
                    f"{sigma[-1]:.3g}. A schedule with the data at 0 needs 1 - t for its t."
                )
