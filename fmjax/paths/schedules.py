"""Affine conditional paths from noise (t = 0) to data (t = 1), and what follows from them.

A path is two functions of time, alpha and sigma:

    x_t = alpha(t) x1 + sigma(t) x0,      u_t = d/dt x_t = alpha'(t) x1 + sigma'(t) x0,

with alpha(0) = 0 or nearly so, alpha(1) = 1, sigma(0) = 1 or nearly so, sigma(1) = 0 or sigma_min.
The derivatives are never written down: `jax.jvp` takes them.

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

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..types import (
    PathSample,
    Velocity,
    as_batch,
    broadcast_time,
    check_same_shape,
    wider,
)
from .affine import (
    Schedule,
    as_time,
    check_path,
    combine,
    convert,
    refuse_singular,
    schedule,
    schedule_with_w,
)


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


def cond_ot(sigma_min: float = 0.0) -> AffinePath:
    """Conditional optimal transport: alpha = t, sigma = 1 - (1 - sigma_min) t.

    With `sigma_min = 0` it is the straight line with u_t = x1 - x0 (rectified flow).

    Args:
      sigma_min: the noise that is left on the data at t = 1, in [0, 1).

    Raises:
      ValueError: if `sigma_min` lies outside [0, 1).

    Source: arXiv 2210.02747, equation 20.
    """
    if not 0 <= sigma_min < 1:
        raise ValueError(
            f"sigma_min must lie in [0, 1); got {sigma_min}. The paper uses values up to 0.1."
        )
    return AffinePath(alpha=lambda t: t, sigma=lambda t: 1 - (1 - sigma_min) * t)


def vp(beta_min: float = 0.1, beta_max: float = 20.0) -> AffinePath:
    """Variance preserving (DDPM's): alpha = exp(-T(1 - t) / 2), sigma = sqrt(1 - alpha^2).

    T(s) = beta_min s + (beta_max - beta_min) s^2 / 2. The slope of sigma is infinite at t = 1, and
    the mean of |u_t|^2 over times up to 1 diverges: draw training times below 1, t <= 0.999 say.

    Args:
      beta_min: the noise rate at the data.
      beta_max: the noise rate at the source.

    Raises:
      ValueError: unless 0 < beta_min <= beta_max.

    Source: Song et al. 2020, arXiv 2011.13456, with time reversed; arXiv 2210.02747, equation 18.
    """
    if not 0 < beta_min <= beta_max:
        raise ValueError(
            f"beta_min and beta_max must obey 0 < beta_min <= beta_max; got {beta_min} and "
            f"{beta_max}. The usual pair is 0.1 and 20."
        )

    def log_alpha(t: jax.Array) -> jax.Array:
        s = 1 - t
        return -0.5 * (beta_min * s + 0.5 * (beta_max - beta_min) * s**2)

    return AffinePath(
        alpha=lambda t: jnp.exp(log_alpha(t)),
        sigma=lambda t: jnp.sqrt(-jnp.expm1(2 * log_alpha(t))),
    )


def linear_vp() -> AffinePath:
    """Variance preserving with a linear alpha: alpha = t, sigma = sqrt(1 - t^2).

    The slope of sigma is infinite at t = 1, and the mean of |u_t|^2 over times up to 1 diverges:
    draw training times below 1, t <= 0.999 say.
    """
    return AffinePath(alpha=lambda t: t, sigma=lambda t: jnp.sqrt((1 - t) * (1 + t)))


def cosine() -> AffinePath:
    """Variance preserving along a quarter circle: alpha = sin(pi t / 2), sigma = cos(pi t / 2).

    Source: Albergo and Vanden-Eijnden 2022, arXiv 2209.15571 (trigonometric interpolant).
    """
    # sin(pi (1 - t) / 2) is the cosine that is exactly 0 at t = 1.
    return AffinePath(
        alpha=lambda t: jnp.sin(0.5 * jnp.pi * t),
        sigma=lambda t: jnp.sin(0.5 * jnp.pi * (1 - t)),
    )


def polynomial(n: float) -> AffinePath:
    """alpha = t^n, sigma = 1 - t^n. For n < 1 the velocity is infinite at t = 0.

    Near the data 1 - t^n is taken as -expm1(n log t), which keeps the digits that the difference
    loses; near the source, where the logarithm has no slope, as it is written.

    Args:
      n: the degree, positive and finite.

    Raises:
      ValueError: if `n` is not positive and finite.

    Source: one of the schedules that arXiv 2412.06264 names.
    """
    if not 0 < n < math.inf:
        raise ValueError(f"n must be positive and finite; got {n}. n = 1 is cond_ot().")

    def sigma(t: jax.Array) -> jax.Array:
        near_data = t > 0.5 ** (1 / n)  # that is, t^n > 1/2
        # Each form sees only times at which it and its slope are finite.
        log_t = jnp.log(jnp.where(near_data, t, 1))
        return jnp.where(near_data, -jnp.expm1(n * log_t), 1 - jnp.where(near_data, 0.5, t) ** n)

    return AffinePath(alpha=lambda t: t**n, sigma=sigma)


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
      >>> sample_path(cond_ot(), jnp.zeros((2, 3)), jnp.ones((2, 3)), jnp.array([0.0, 0.5])).x_t[1]
      Array([0.5, 0.5, 0.5], dtype=float32)
    """
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    t, alpha, sigma, alpha_dot, sigma_dot = schedule(path, t)
    refuse_singular("sample_path", t, alpha_dot, sigma_dot)
    return PathSample(t, combine(alpha, x1, sigma, x0), combine(alpha_dot, x1, sigma_dot, x0))


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


def marginal_velocity(path: AffinePath, data: jax.Array) -> Velocity:
    """The exact velocity of the flow from a standard normal to a finite data set.

    u_t(x) = E[u_t | x_t = x], where the data point x1 has the posterior weight
    softmax(-|x - alpha x1|^2 / (2 sigma^2)). It generates the data set (theorem 1 of the paper)
    and is the minimum of the flow-matching loss (theorem 2): an oracle without a network.

    Args:
      path: the path. Where sigma(1) = 0 the velocity has no value at t = 1: for a solve up to
        t = 1 use a path that ends in some noise, such as `cond_ot(sigma_min=1e-2)`.
      data: `[num_data, *event]`.

    Returns:
      A velocity `(t, x) -> u`, `x` and `u` of shape `[batch, *event]`.

    Raises:
      ValueError: by the velocity, if the event shapes differ or as `x1_to_velocity` does.

    Source: arXiv 2210.02747, equation 8 and theorems 1 and 2.
    """

    data = as_batch("data", data)
    check_path(path)  # before a solve does

    def posterior_mean(
        alpha: jax.Array, sigma: jax.Array, x: jax.Array, data: jax.Array
    ) -> jax.Array:
        square_distance = jnp.sum(jnp.square(x[None] - alpha * data), range(1, data.ndim))
        weights = jax.nn.softmax(-square_distance / (2 * sigma**2))
        return jnp.tensordot(weights, data, 1, precision=jax.lax.Precision.HIGHEST)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        if x.shape[1:] != data.shape[1:]:
            raise ValueError(
                "x and the data must have one event shape; got "
                f"{x.shape[1:]} and {data.shape[1:]}. Both have a leading batch axis."
            )
        dtype = wider(wider(x.dtype, data.dtype), jnp.float32)
        t = as_time(t).astype(dtype)
        broadcast_time(t, x)  # refuses a t that is neither [] nor [batch]
        alpha, sigma = (jnp.broadcast_to(a, x.shape[:1]) for a in schedule(path, t)[1:3])
        in_axes = (0, 0, 0, None)
        x1 = jax.vmap(posterior_mean, in_axes)(alpha, sigma, x.astype(dtype), data.astype(dtype))
        return x1_to_velocity(path, t, x, x1)

    return velocity
