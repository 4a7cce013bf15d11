"""Bridges: paths between any two distributions, with noise on the way and none at the ends.

Given a pair (x0, x1) and z ~ N(0, I), which is independent of the pair,

    x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) z,      gamma(0) = gamma(1) = 0.

The velocity of x_t, alpha' x1 + sigma' x0 + gamma' z, has an infinite mean square where gamma' is
infinite, as it is at both ends of a Brownian bridge. Two fields are bounded instead, each the
minimum of a regression (`bridge_loss`):

    w(t, x) = E[alpha' x1 + sigma' x0 | x_t = x],      z_hat(t, x) = E[z | x_t = x].

All else follows from them. For any diffusion g(t) >= 0, with the score s = -z_hat / gamma of x_t:

    flow            dx = u dt                      u = w + gamma' z_hat
    forwards        dx = (u + g^2 s / 2) dt + g dB     = w + ((gamma^2)' - g^2) / (2 gamma) z_hat
    backwards       dx = (u - g^2 s / 2) dt + g dB     = w + ((gamma^2)' + g^2) / (2 gamma) z_hat

The flow and both equations, the last solved from t = 1 to t = 0, have the marginals of x_t. The
conditional velocity of a whole bridge is nowhere needed.

The Brownian bridge of the reference sigma dB has gamma^2 = sigma^2 t (1 - t). With g = sigma its
equation is the Markovian projection of the bridges between the pairs, one step of iterative
Markovian fitting (Shi et al. 2023). Where the pairs are those of the entropic optimal transport of
cost |x0 - x1|^2 at epsilon = 2 sigma^2 it is the Schroedinger bridge (Tong et al. 2023); with other
pairs it is not, though its marginals are right.

At the ends of a Brownian bridge z_hat tends to 0 as gamma does, and gamma' to infinity. What begins
there with the matching diffusion, g^2 = |(gamma^2)'|, does not see z_hat at all: its coefficient is
0. Elsewhere within `NEAREST` of an end a drift is that at `NEAREST` from it.

Sources: Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797 (interpolants, the two fields,
the score and the equations for any diffusion); Tong et al. 2023, arXiv 2307.03672 (score and flow
from entropic pairs); Shi et al. 2023, arXiv 2303.16852 (iterative Markovian fitting).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..types import (
    PathSample,
    Velocity,
    as_batch,
    at_least_float32,
    broadcast_time,
    check_same_shape,
    checked,
    is_concrete,
    kind,
    returned,
    wider,
)
from .affine import AffinePath, Schedule, as_time, coefficient, refuse_singular, schedule

NEAREST = 1e-5
"""How near to t = 0 and t = 1 a drift is evaluated."""


FIX = "The equation of bridge_drift is solved from end to end."


class BridgePath(NamedTuple):
    """The path x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) z; three functions of one's own make one.

    Like an `AffinePath` it is no pytree of arrays: close over it.

    Attributes:
      alpha: weight of x1, a differentiable elementwise function of `t`.
      sigma: weight of x0, likewise.
      gamma: weight of the noise, likewise; 0 at t = 0 and at t = 1.

    Example:
      >>> path = BridgePath(lambda t: t, lambda t: 1 - t, lambda t: jnp.sin(jnp.pi * t) ** 2)
    """

    alpha: Schedule
    sigma: Schedule
    gamma: Schedule


class BridgeSample(NamedTuple):
    """A point of a bridge with both targets: two path samples at one t and x_t.

    Attributes:
      mean: its `u_t` is alpha' x1 + sigma' x0, whose expectation given x_t is w.
      noise: its `u_t` is z, whose expectation given x_t is z_hat.
    """

    mean: PathSample
    noise: PathSample


class BridgeFields(Protocol):
    """`fields(t, x) -> (w, z_hat)`: both fields of a bridge, each `[batch, *event]` as x."""

    def __call__(self, t: jax.Array, x: jax.Array, /) -> Any: ...


def brownian_bridge(sigma: float) -> BridgePath:
    """Straight lines with a Brownian bridge on them: gamma(t)^2 = sigma^2 t (1 - t).

    Args:
      sigma: the reference process is sigma times a Brownian motion, so that x_{1/2} has the
        standard deviation sigma / 2 about the middle of x0 and x1.

    Raises:
      ValueError: if `sigma` is not positive and finite.

    Source: arXiv 2307.03672, section 3.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(
            f"sigma must be positive and finite; got {sigma}. Without noise cond_ot() and "
            "sample_path make straight lines."
        )
    return BridgePath(
        alpha=lambda t: t, sigma=lambda t: 1 - t, gamma=lambda t: sigma * jnp.sqrt(t * (1 - t))
    )


def sample_bridge(
    key: jax.Array, path: BridgePath, x0: jax.Array, x1: jax.Array, t: jax.Array
) -> BridgeSample:
    """The point x_t of the bridge from `x0` to `x1` at time `t`, and what w and z_hat regress on.

    Args:
      key: of the noise z.
      path: the path.
      x0: source, `[batch, *event]`, of any distribution and any coupling with x1.
      x1: data, `[batch, *event]`.
      t: times in [0, 1], `[]` or `[batch]`.

    Returns:
      `BridgeSample(mean, noise)`, two path samples with one `t` and `x_t`; `x_t` and both `u_t` are
      `[batch, *event]` in the dtype of `x1`.

    Raises:
      ValueError: as `sample_path` does, or if gamma is not 0 at both ends.

    Example:
      >>> path, x = brownian_bridge(1.0), jnp.zeros((2, 3))
      >>> mean, noise = sample_bridge(jax.random.key(0), path, x, x, jnp.full(2, 0.5))
      >>> bool(jnp.allclose(mean.x_t, 0.5 * noise.u_t)) and mean.x_t is noise.x_t
      True
    """
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    check_bridge(path)
    t, alpha, sigma, alpha_dot, sigma_dot = schedule(AffinePath(path.alpha, path.sigma), t)
    broadcast_time(t, x1)  # a wrong shape is named before a singular value
    refuse_singular("sample_bridge", t, alpha_dot, sigma_dot)
    z = jax.random.normal(key, x1.shape, wider(x1.dtype, jnp.float32))
    gamma = coefficient("gamma", path.gamma, t)
    dtype = x1.dtype
    x_t = _sum((alpha, x1), (sigma, x0), (gamma, z)).astype(dtype)
    mean_dot = _sum((alpha_dot, x1), (sigma_dot, x0)).astype(dtype)
    return BridgeSample(PathSample(t, x_t, mean_dot), PathSample(t, x_t, z.astype(dtype)))


def bridge_loss(fields: BridgeFields, bridge_sample: BridgeSample) -> jax.Array:
    """|w - (alpha' x1 + sigma' x0)|^2 / D + |z_hat - z|^2 / D, per example, in one call.

    It is `cfm_loss` of w on the one path sample plus that of z_hat on the other, which weights them
    otherwise if you take the two.

    Args:
      fields: `(t, x) -> (w, z_hat)`, one network of twice the channels for instance, called once.
      bridge_sample: from `sample_bridge`.

    Returns:
      `[batch]`, in at least float32.

    Raises:
      ValueError: if the fields are no two floating arrays of the shape of `x_t`.

    Example:
      >>> x0, x1, t = jnp.zeros((4, 2)), jnp.ones((4, 2)), jnp.full(4, 0.5)
      >>> sample = sample_bridge(jax.random.key(0), brownian_bridge(1.0), x0, x1, t)
      >>> loss = bridge_loss(lambda t, x: (jnp.ones_like(x), 2 * x - 1), sample)
      >>> bool(jnp.allclose(loss, 0, atol=1e-6))
      True

    Source: arXiv 2303.08797, section 2.
    """
    mean, noise = bridge_sample
    if not callable(fields):
        raise ValueError(f"fields must be a function (t, x) -> (w, z_hat); got {kind(fields)}.")
    both = fields(mean.t, mean.x_t)
    if not isinstance(both, tuple | list) or len(both) != 2:
        raise ValueError(
            f"fields must return two arrays, (w, z_hat); got {kind(both)}. "
            "jnp.split(u, 2, axis=-1) makes two of one with twice the channels."
        )

    def square_error(name: str, got: Any, target: jax.Array) -> jax.Array:
        target = at_least_float32(target)
        error = returned(name, got, target.shape).astype(target.dtype) - target
        return jnp.mean(jnp.square(error), axis=range(1, error.ndim))

    return square_error("w", both[0], mean.u_t) + square_error("z_hat", both[1], noise.u_t)


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
        return _sum((jnp.ones_like(t), w(t, x)), (gamma_dot, z_hat(t, x))).astype(x.dtype)

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
        return _sum((-1 / gamma, z_hat(t, x))).astype(x.dtype)

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
        concrete t = 0 or 1 unless g^2 = |(gamma^2)'| there (a traced one gives NaN).

    Example:
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
        _refuse_unmatched(t, slope, square)
        excess = slope + square if reverse else slope - square
        begins = t >= 1 if reverse else t <= 0
        weight = jnp.where(begins | (excess == 0), 0, excess / (2 * gamma))
        weight = jnp.where(_unmatched(t, slope, square), jnp.nan, weight)
        fields = w(inside, x), z_hat(inside, x)
        return _sum((jnp.ones_like(t), fields[0]), (weight, fields[1])).astype(x.dtype)

    return drift


def check_bridge(path: Any) -> None:
    """Refuses what is no bridge, and a gamma that leaves noise at an end."""
    if callable(path):
        name = getattr(path, "__name__", type(path).__name__)
        raise ValueError(f"path must be a path; got {kind(path)}, which makes one: {name}(1.0).")
    if not isinstance(path, tuple) or len(path) != 3 or not all(map(callable, path)):
        raise ValueError(
            "path must be BridgePath(alpha, sigma, gamma), three functions of time; got "
            f"{kind(path)}. fmjax.brownian_bridge(1.0) is one."
        )
    with jax.ensure_compile_time_eval():
        ends = coefficient("gamma", path[2], jnp.array([0.0, 1.0]))
        if is_concrete(ends) and not (abs(ends) < 1e-5).all():
            raise ValueError(
                f"gamma must be 0 at t = 0 and t = 1; got {ends[0]} and {ends[1]}. With noise at "
                "an end x_t would not begin at x0 and end at x1: multiply gamma by sqrt(t (1 - t))."
            )


def _noise(path: BridgePath, t: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """t as an array of at least float32, gamma and gamma' there."""
    t = as_time(t)
    gamma, gamma_dot = jax.jvp(
        lambda t: coefficient("gamma", path.gamma, t), (t,), (jnp.ones_like(t),)
    )
    return t, gamma, gamma_dot


def _unmatched(t: jax.Array, slope: jax.Array, square: jax.Array) -> jax.Array:
    """Whether t is an end and g^2 is not |(gamma^2)'| there."""
    # The slope is that at NEAREST from the end, which differs in the fifth digit.
    apart = abs(square - abs(slope)) > 1e-3 * square + 1e-6
    return ((t <= 0) | (t >= 1)) & apart


def _refuse_unmatched(t: jax.Array, slope: jax.Array, square: jax.Array) -> None:
    if not is_concrete(t, slope, square):
        return
    wrong = jnp.ravel(_unmatched(t, slope, square))
    if wrong.any():
        at, want, got = (jnp.ravel(a)[jnp.argmax(wrong)] for a in (t, abs(slope), square))
        raise ValueError(
            f"At an end of a bridge diffusion^2 must be |(gamma^2)'| = {want:.4g}; got {got:.4g} "
            f"at t = {at}. Take t inside (0, 1), from 1e-5 to 1 - 1e-5 for instance, or the "
            "diffusion that matches."
        )


def _sum(*terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sum of a x over terms (a, x), a a function of time, in the widest of their dtypes."""
    dtype = jnp.float32
    for a, x in terms:
        dtype = wider(dtype, wider(a.dtype, x.dtype))
    products = [broadcast_time(a, x).astype(dtype) * x.astype(dtype) for a, x in terms]
    return sum(products[1:], start=products[0])
