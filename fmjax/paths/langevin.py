"""Samples by a stochastic differential equation, from a velocity alone.

Where the source is N(0, I) and independent of the data, the velocity u of an affine path knows the
score of its marginals, s = (alpha u - alpha' x) / (W sigma), with W = alpha' sigma - alpha sigma'.
A Langevin term of any rate eta(t) >= 0 leaves the marginals as they are:

    forwards    dx = [u + eta (alpha u - alpha' x)] dt + g dB,       g^2 = 2 eta sigma W.
    backwards   dx = [u - eta (alpha u - alpha' x)] dt + g dB,       for solves from t = 1 to 0.

Nothing is divided, so that both are finite at both ends, `vp` and `linear_vp` at t = 1 excepted.
With eta = 0 it is the flow; eta = 1 / alpha is the reversal of the diffusion that the path is to
DDPM, infinite at t = 0 where alpha is 0.

After `minibatch_ot` the source is not independent of the data and s is no score: the marginals of
these equations are then wrong, those of the flow are not.

Sources: Song et al. 2020, arXiv 2011.13456; Albergo et al. 2023, arXiv 2303.08797 (any diffusion);
Ma et al. 2024, arXiv 2401.08740 (rates).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Velocity, as_batch, broadcast_time, check_number, checked, is_concrete
from .affine import (
    AffinePath,
    Schedule,
    check_path,
    coefficient,
    combine,
    refuse_singular,
    schedule_with_w,
)

FIX = "Solve between times inside (0, 1), or along cond_ot() after fmjax.change_path."


def langevin_drift(
    path: AffinePath, velocity: Velocity, eta: float | Schedule, *, reverse: bool = False
) -> Velocity:
    """The drift u + eta (alpha u - alpha' x) of an SDE with the marginals of the flow of u.

    Its diffusion is `langevin_diffusion(path, eta)`. On `cond_ot()` it is u + eta (t u - x).

    The velocity must be that of a standard normal source drawn independently of the data: one
    trained with `minibatch_ot` has no score, and the samples would be wrong.

    Args:
      path: the path along which `velocity` was trained.
      velocity: `(t, x) -> u`. The SDE calls it once where the flow does.
      eta: the rate, a number or a function of t, not negative. 0 is the flow.
      reverse: for solves from t = 1 to 0, where the Langevin term has the other sign. Run backwards
        with the forward drift the marginals are wrong.

    Returns:
      A drift `(t, x) -> [batch, *event]` for `sample_sde`.

    Raises:
      ValueError: if `path` is none, `velocity` can't be called, or `eta` is negative or no number;
        by the drift, at a concrete t where the path is singular (`vp` and `linear_vp` at t = 1) or
        `eta(t)` is infinite or negative. A traced one gives NaN there.

    Example:
      >>> from fmjax.paths.schedules import cond_ot
      >>> drift = langevin_drift(cond_ot(), lambda t, x: -x, 0.5)
      >>> drift(jnp.array(0.5), jnp.ones((1, 2)))
      Array([[-1.75, -1.75]], dtype=float32)

    Source: arXiv 2303.08797.
    """
    check_path(path)
    rate, function = _rate(eta), checked(velocity)
    sign = -1 if reverse else 1

    def drift(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        t, alpha, _, alpha_dot, _, w = schedule_with_w(path, t)
        signed = sign * rate(t)
        broadcast_time(t, x)
        refuse_singular("langevin_drift", t, signed, alpha_dot, w, fix=FIX)
        u = function(t, x).astype(x.dtype)
        return combine(1 + signed * alpha, u, -signed * alpha_dot, x)

    return drift


def langevin_diffusion(path: AffinePath, eta: float | Schedule) -> Callable[[jax.Array], jax.Array]:
    """The diffusion g(t) = sqrt(2 eta sigma W) that belongs to `langevin_drift`, either direction.

    On `cond_ot()` it is sqrt(2 eta (1 - t)).

    Args:
      path: the path.
      eta: the rate, as for `langevin_drift`.

    Returns:
      A function of t, whose shape it returns, for `sample_sde`.

    Raises:
      ValueError: as `langevin_drift` does.

    Example:
      >>> from fmjax.paths.schedules import cond_ot
      >>> langevin_diffusion(cond_ot(), 0.5)(jnp.array(0.75))
      Array(0.5, dtype=float32)
    """
    check_path(path)
    rate = _rate(eta)

    def diffusion(t: jax.Array) -> jax.Array:
        t, _, sigma, alpha_dot, _, w = schedule_with_w(path, t)
        value = rate(t)
        refuse_singular("langevin_diffusion", t, value, alpha_dot, w, fix=FIX)
        return jnp.sqrt(2 * value * sigma * w)

    return diffusion


def _rate(eta: Any) -> Schedule:
    """eta as a function of time, refused as far as it is known to be negative."""
    if not callable(eta):
        check_number("eta", eta, "0 is the flow, 1 is usual")

    function: Any = eta if callable(eta) else lambda t: jnp.asarray(eta, t.dtype)

    def rate(t: jax.Array) -> jax.Array:
        value = coefficient("eta", function, t)
        if is_concrete(value) and np.min(known := np.asarray(value), initial=0) < 0:
            raise ValueError(
                f"eta must not be negative; got eta(t) = {known.min()}. 0 is the flow."
            )
        return value

    return rate
