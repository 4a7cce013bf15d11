"""Affine paths by name, each a pair of functions alpha and sigma of time.

Where sigma' is infinite (`vp` and `linear_vp` at t = 1) the velocity is too: a concrete `t` there
is refused with a ValueError, and a traced one gives NaN or infinity.

Source: Lipman et al. 2024, arXiv 2412.06264 (section 4.8).
"""

import math

import jax
import jax.numpy as jnp

from .affine import AffinePath


def cond_ot(sigma_min: float = 0.0) -> AffinePath:
    """Conditional optimal transport: alpha = t, sigma = 1 - (1 - sigma_min) t.

    With `sigma_min = 0` it is the straight line with u_t = x1 - x0 (rectified flow).

    Args:
      sigma_min: the noise that is left on the data at t = 1, in [0, 1).

    Raises:
      ValueError: if `sigma_min` is outside [0, 1).

    Source: arXiv 2210.02747, equation 20.
    """
    if not 0 <= sigma_min < 1:
        raise ValueError(
            f"sigma_min must be in [0, 1); got {sigma_min}. The paper uses values up to 0.1."
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
