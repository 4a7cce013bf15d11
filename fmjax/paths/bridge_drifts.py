"""What a bridge is solved with: flow, score and drifts, from w and z_hat.

With w = E[alpha' x1 + sigma' x0 | x_t] and z_hat = E[z | x_t] of a bridge, the score of x_t is
s = -z_hat / gamma, and for any diffusion g(t) >= 0

    flow            dx = u dt                      u = w + gamma' z_hat
    forwards        dx = (u + g^2 s / 2) dt + g dB     = w + ((gamma^2)' - g^2) / (2 gamma) z_hat
    backwards       dx = (u - g^2 s / 2) dt + g dB     = w + ((gamma^2)' + g^2) / (2 gamma) z_hat

all have the marginals of x_t, the last solved from t = 1 to t = 0. On the Brownian bridge of sigma,
with g = sigma, the equation is the Markovian projection of the bridges between the pairs, one step
of iterative Markovian fitting (Shi et al. 2023).

At the ends of a Brownian bridge z_hat tends to 0 as gamma does, and gamma' to infinity. What begins
there with the matching diffusion, g^2 = |(gamma^2)'|, does not see z_hat at all: its coefficient is
0. Elsewhere within `NEAREST` of an end a drift is that at `NEAREST` from it.

Sources: Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797 (the score, and the equations for
any diffusion); Tong et al. 2023, arXiv 2307.03672 (score and flow from entropic pairs); Shi et al.
2023, arXiv 2303.16852 (iterative Markovian fitting).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, broadcast_time, checked, is_concrete, kind
from .affine import as_time, coefficient, refuse_singular
from .bridges import BridgePath, check_bridge, weighted_sum

NEAREST = 1e-5
"""How near to t = 0 and t = 1 a drift is evaluated."""

FIX = "The equation of bridge_drift is solved from end to end."


def bridge_flow(path: BridgePath, w: Velocity, z_hat: Velocity) -> Velocity:
    """u = w + gamma' z_hat, whose flow has the marginals of the bridge.

    Where gamma' is infinite it is solved between other times. To solve a Brownian bridge's from
    t0 = d to t1 = 1 - d, beginning at x0 itself, costs an error of the order of d in the
    distribution: x_d has another variance than x0. A drift (`bridge_drift`) is solved from end to
    end.

    Args:
      path: the path.
      w: `(t, x) -> w`.
      z_hat: `(t, x) -> z_hat`. Under `jax.jit` a network that gives both is called once.

    Returns:
      A velocity `(t, x) -> u`.

    Raises:
      ValueError: if gamma is not 0 at both ends; by the velocity, if a field returns another shape
        than that of x, or at a concrete `t` where gamma' is infinite (a traced one gives infinity
        or NaN there).

    Source: arXiv 2303.08797, section 2.
    """
    check_bridge(path)
    w, z_hat = checked(w, what="w"), checked(z_hat, what="z_hat")

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        t, _, gamma_dot = _noise(path, t)
        broadcast_time(t, x)
        refuse_singular("bridge_flow", t, gamma_dot, fix=FIX)
        return weighted_sum((jnp.ones_like(t), w(t, x)), (gamma_dot, z_hat(t, x))).astype(x.dtype)

    return velocity


def bridge_score(path: BridgePath, z_hat: Velocity) -> Velocity:
    """s = -z_hat / gamma, the gradient in x of log p_t(x), for every coupling of x0 and x1.

    Args:
      path: the path.
      z_hat: `(t, x) -> z_hat`.

    Returns:
      The score `(t, x) -> s`, `[batch, *event]`.

    Raises:
      ValueError: as `bridge_flow` does; by the score, at a concrete `t` where gamma is 0.

    Source: arXiv 2303.08797, section 2.
    """
    check_bridge(path)
    z_hat = checked(z_hat, what="z_hat")

    def score(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        t, gamma, _ = _noise(path, t)
        broadcast_time(t, x)
        refuse_singular("bridge_score", t, 1 / gamma, fix=FIX)
        return weighted_sum((-1 / gamma, z_hat(t, x))).astype(x.dtype)

    return score


def bridge_drift(
    path: BridgePath,
    w: Velocity,
    z_hat: Velocity,
    diffusion: Callable[[jax.Array], Any],
    *,
    reverse: bool = False,
) -> Velocity:
    """The drift of the equation with this diffusion that has the marginals of the bridge.

    b = w + ((gamma^2)' - g^2) / (2 gamma) z_hat forwards, with the sign of g^2 turned backwards.

    Args:
      path: the path.
      w: `(t, x) -> w`.
      z_hat: `(t, x) -> z_hat`. Under `jax.jit` a network that gives both is called once.
      diffusion: `t -> g`, a number; `lambda t: sigma` for a Schroedinger bridge.
      reverse: for solves from t = 1 to t = 0.

    Returns:
      The drift `(t, x) -> b`, `[batch, *event]`; both fields are evaluated at t, no nearer to an
      end than `NEAREST`. Where a solve begins with g^2 = |(gamma^2)'| it is w alone. Where it ends,
      b holds g^2 times the score, so that an error of z_hat counts 1 / gamma(NEAREST) times, and of
      data on points it is infinite: a solver without a stage at the end, such as Euler's, avoids
      that.

    Raises:
      ValueError: as `bridge_flow` does, or if `diffusion` is no function; by the drift, at a
        concrete t where gamma is 0 unless g^2 = |(gamma^2)'| there, at the ends to a few
        thousandths of 4 max(gamma^2) (a traced one gives NaN).

    Example:
      >>> from fmjax import brownian_bridge
      >>> w, z_hat = lambda t, x: jnp.ones_like(x), lambda t, x: x
      >>> drift = bridge_drift(brownian_bridge(2.0), w, z_hat, lambda t: 2.0)
      >>> drift(jnp.array(0.5), jnp.ones((1, 2)))  # 1 - 2 sqrt(t / (1 - t))
      Array([[-1., -1.]], dtype=float32)

    Source: arXiv 2303.08797, section 2.
    """
    check_bridge(path)
    w, z_hat = checked(w, what="w"), checked(z_hat, what="z_hat")
    if not callable(diffusion):
        raise ValueError(
            f"diffusion must be a function t -> g; got {kind(diffusion)}. A constant is lambda t: "
            "1.0."
        )

    def drift(t: jax.Array, x: jax.Array) -> jax.Array:
        x, t = as_batch("x", x), as_time(t)
        broadcast_time(t, x)
        inside, gamma, gamma_dot = _noise(path, jnp.clip(t, NEAREST, 1 - NEAREST))
        slope, square = 2 * gamma * gamma_dot, coefficient("diffusion", diffusion, t) ** 2
        unmatched = _unmatched(path, t, slope, square)
        _refuse_unmatched(unmatched, t, slope, square)
        excess = slope + square if reverse else slope - square
        begins = t >= 1 if reverse else t <= 0
        weight = jnp.where(begins | (excess == 0), 0, excess / (2 * gamma))
        fix = "Where gamma is 0 diffusion^2 must be |(gamma^2)'|."
        refuse_singular("bridge_drift", t, weight, fix=fix)
        weight = jnp.where(unmatched, jnp.nan, weight)
        fields = w(inside, x), z_hat(inside, x)
        return weighted_sum((jnp.ones_like(t), fields[0]), (weight, fields[1])).astype(x.dtype)

    return drift


def _noise(path: BridgePath, t: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """t as an array of at least float32, gamma and gamma' there."""
    t = as_time(t)
    gamma, gamma_dot = jax.jvp(
        lambda t: coefficient("gamma", path.gamma, t), (t,), (jnp.ones_like(t),)
    )
    return t, gamma, gamma_dot


def _unmatched(path: BridgePath, t: jax.Array, slope: jax.Array, square: jax.Array) -> jax.Array:
    """Whether t is an end and g^2 is not |(gamma^2)'| there."""
    inner = coefficient("gamma", path.gamma, jnp.array([0.25, 0.5, 0.75], t.dtype))
    # The slope is that at NEAREST from the end, and may be 0 at the end itself: what it is near to
    # is measured by the slope that leads to the bridge's largest noise.
    near = 1e-3 * (abs(slope) + 4 * jnp.max(inner**2))
    return ((t <= 0) | (t >= 1)) & ~(abs(square - abs(slope)) <= near)


def _refuse_unmatched(
    unmatched: jax.Array, t: jax.Array, slope: jax.Array, square: jax.Array
) -> None:
    if not is_concrete(unmatched) or not unmatched.any():
        return
    first = jnp.argmax(jnp.ravel(unmatched))
    at, want, got = (jnp.ravel(a)[first] for a in (t, abs(slope), square))
    raise ValueError(
        f"At an end of a bridge diffusion^2 must be |(gamma^2)'| = {want:.4g}; got {got:.4g} at "
        f"t = {at}. Take t inside (0, 1), from 1e-5 to 1 - 1e-5 for instance, or the diffusion "
        "that matches."
    )
