"""DDPM's ancestral sampler as a stochastic differential equation on a grid of equal steps.

Between the times t < s of a path, with the predictions x1 and x0 at (t, x), DDPM draws x_s from the
posterior q(x_s | x_t, x1) of the forward noising, z ~ N(0, I):

    x_s = alpha_s x1 + k x0 + sqrt(sigma_s^2 - k^2) z,   k = sigma_s^2 alpha_t / (alpha_s sigma_t).

With k = sigma_s it would be DDIM's step, which draws nothing. Divided by the step h = s - t, the
change of the mean is a drift and the variance a squared diffusion, of which one Euler step is
exactly this one. As h tends to 0 they tend to `langevin_drift` and `langevin_diffusion` at the rate
1 / alpha. Nothing is divided by alpha_t: the first step is finite from t = 0.

The variance is the smaller one of the two that the paper names (beta tilde).

Sources: Ho et al. 2020, arXiv 2006.11239, equations 6 and 7; Song et al. 2020, arXiv 2010.02502,
equation 12 with eta = 1.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, broadcast_time, kind
from .affine import AffinePath, as_time, check_path, combine, refuse_singular, weights
from .predictions import predictor


def ancestral_drift(path: AffinePath, velocity: Velocity, num_steps: int) -> Velocity:
    """The drift whose Euler step of 1 / `num_steps` is the mean of DDPM's ancestral step.

    `sample_sde(key, ancestral_drift(path, velocity, n), ancestral_diffusion(path, n), x0,
    num_steps=n)`, from t = 0 to 1 by Euler's method, is DDPM's sampler with n steps.

    Args:
      path: the path along which `velocity` was trained; DDPM's is `vp()`.
      velocity: `(t, x) -> u`, of a source that is independent of the data. Of one made by `from_x0`
        the predictions are taken, so that `vp` is finite throughout.
      num_steps: the number of equal steps of the solve.

    Returns:
      A drift `(t, x) -> [batch, *event]`, for t = 0, 1 / n, ..., 1 - 1 / n.

    Raises:
      ValueError: if `path` is none, `velocity` can't be called, or `num_steps` is no whole number
        from 1 on; by the drift, at a concrete t where the predictions have no finite value, and at
        t = 1, where there is no step left.

    Source: arXiv 2006.11239, equation 7.
    """
    check_path(path)
    _check_num_steps(num_steps)
    predict = predictor("ancestral_drift", path, velocity)

    def drift(t: jax.Array, x: jax.Array) -> jax.Array:
        x, t = as_batch("x", x), as_time(t)
        alpha, keep, _ = _step(path, t, num_steps)
        broadcast_time(t, x)
        refuse_singular("ancestral_drift", t, alpha, keep, fix=_FIX)
        x1, x0 = predict(t, x)
        mean = combine(alpha, x1, keep, x0).astype(x.dtype)
        return (mean - x) * num_steps

    return drift


def ancestral_diffusion(path: AffinePath, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The diffusion that belongs to `ancestral_drift`: sqrt(n (sigma_s^2 - k^2)), s = t + 1 / n.

    Args:
      path: the path.
      num_steps: n.

    Returns:
      A function of t, whose shape it returns, for `sample_sde`.

    Raises:
      ValueError: if `path` is none or `num_steps` no whole number from 1 on; by the diffusion, at a
        concrete t = 1.
    """
    check_path(path)
    _check_num_steps(num_steps)

    def diffusion(t: jax.Array) -> jax.Array:
        t = as_time(t)
        _, _, variance = _step(path, t, num_steps)
        refuse_singular("ancestral_diffusion", t, variance, fix=_FIX)
        return jnp.sqrt(num_steps * variance)

    return diffusion


_FIX = "The last step starts at 1 - 1 / num_steps."


def _step(path: AffinePath, t: jax.Array, num_steps: int) -> tuple[jax.Array, ...]:
    """alpha_s, k and the variance of the step from t to s, the next time of the grid."""
    alpha, sigma = weights(path, t)
    alpha_s, sigma_s = weights(path, (jnp.round(t * num_steps) + 1) / num_steps)
    ratio = sigma_s * alpha / (alpha_s * sigma)
    return alpha_s, sigma_s * ratio, sigma_s**2 * (1 - ratio) * (1 + ratio)


def _check_num_steps(num_steps: Any) -> None:
    try:
        good = operator.index(num_steps) >= 1
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"num_steps must be a whole number from 1 on; got {kind(num_steps)}. DDPM's is 1000."
        )
