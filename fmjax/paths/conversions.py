"""Conversions between x1, x0, the velocity and the score along an affine path.

With the source x0 ~ N(0, I), x1, x0, the velocity u and the score s = -x0 / sigma of x_t given x1
determine one another linearly, and so do their expectations given x_t. With
W = alpha' sigma - alpha sigma' the six conversions are

    x1 = (sigma u - sigma' x_t) / W           u = (sigma' x_t + W x1) / sigma
    x0 = (alpha' x_t - alpha u) / W           u = (alpha' x_t - W x0) / alpha
    s  = (alpha u - alpha' x_t) / (W sigma)   u = (alpha' x_t + sigma W s) / alpha

The conversions to and from x0 and x1 hold for every coupling. Those of the score also need x0
independent of x1 (`couplings.independent`): after `minibatch_ot` the expectation of -x0 / sigma
is not the score of the marginal.

Each is as good as its coefficients. Where sigma = 0 (usually t = 1), alpha = 0 (t = 0) or sigma' is
infinite (`vp` and `linear_vp` at t = 1) some have no finite value: a concrete `t` there is refused
with a ValueError, and a traced one gives NaN or infinity.

Sources: Lipman et al. 2022, arXiv 2210.02747 (sections 3 and 4); Tong et al. 2023, arXiv
2302.00482; Lipman et al. 2024, arXiv 2412.06264 (section 4.8 and table 1 for the conversions).
"""

import jax

from ..types import as_floating, broadcast_time, check_same_shape
from .affine import AffinePath, combine, refuse_singular, schedule_with_w


def velocity_to_x1(
    path: AffinePath, t: jax.Array, x_t: jax.Array, velocity: jax.Array
) -> jax.Array:
    """x1 = (sigma u - sigma' x_t) / W: the data that a velocity points to.

    Arguments, shapes and errors are those of all six conversions: `t` is `[]` or `[batch]`, `x_t`
    and the value `[batch, *event]`, and so is what comes back, in the dtype of `x_t`.

    Raises:
      ValueError: if the shapes disagree, or at a concrete `t` where the formula has no finite value
        (here where W = 0, as for `polynomial(2)` at t = 0, or sigma' is infinite).
    """
    t, _, sigma, _, sigma_dot, w = schedule_with_w(path, t)
    return convert("velocity_to_x1", t, -sigma_dot / w, x_t, sigma / w, velocity)


def x1_to_velocity(path: AffinePath, t: jax.Array, x_t: jax.Array, x1: jax.Array) -> jax.Array:
    """u = (sigma' x_t + W x1) / sigma. Refused where sigma = 0. See `velocity_to_x1`."""
    t, _, sigma, _, sigma_dot, w = schedule_with_w(path, t)
    return convert("x1_to_velocity", t, sigma_dot / sigma, x_t, w / sigma, x1)


def velocity_to_x0(
    path: AffinePath, t: jax.Array, x_t: jax.Array, velocity: jax.Array
) -> jax.Array:
    """x0 = (alpha' x_t - alpha u) / W: the source that a velocity comes from.

    Refused where W = 0 or sigma' is infinite. See `velocity_to_x1`.
    """
    t, alpha, _, alpha_dot, _, w = schedule_with_w(path, t)
    return convert("velocity_to_x0", t, alpha_dot / w, x_t, -alpha / w, velocity)


def x0_to_velocity(path: AffinePath, t: jax.Array, x_t: jax.Array, x0: jax.Array) -> jax.Array:
    """u = (alpha' x_t - W x0) / alpha. Refused where alpha = 0 or W is infinite."""
    t, alpha, _, alpha_dot, _, w = schedule_with_w(path, t)
    return convert("x0_to_velocity", t, alpha_dot / alpha, x_t, -w / alpha, x0)


def velocity_to_score(
    path: AffinePath, t: jax.Array, x_t: jax.Array, velocity: jax.Array
) -> jax.Array:
    """s = (alpha u - alpha' x_t) / (W sigma).

    For a marginal velocity of independent pairs it is the gradient of log p_t; not after
    `minibatch_ot`.

    Refused where W sigma is 0 (t = 1 without sigma_min) or infinite. See `velocity_to_x1`.
    """
    t, alpha, sigma, alpha_dot, _, w = schedule_with_w(path, t)
    scale = 1 / (w * sigma)
    return convert("velocity_to_score", t, -alpha_dot * scale, x_t, alpha * scale, velocity)


def score_to_velocity(
    path: AffinePath, t: jax.Array, x_t: jax.Array, score: jax.Array
) -> jax.Array:
    """u = (alpha' x_t + sigma W s) / alpha. Refused where alpha = 0 or W is infinite."""
    t, alpha, sigma, alpha_dot, _, w = schedule_with_w(path, t)
    return convert("score_to_velocity", t, alpha_dot / alpha, x_t, sigma * w / alpha, score)


def convert(
    name: str, t: jax.Array, a: jax.Array, x_t: jax.Array, b: jax.Array, value: jax.Array
) -> jax.Array:
    x_t, value = as_floating("x_t", x_t), as_floating("the value to convert", value)
    check_same_shape("x_t and the value to convert", x_t, value)
    broadcast_time(t, x_t)  # a wrong shape is named before a singular value
    refuse_singular(name, t, a, b)
    return combine(a, x_t, b, value)
