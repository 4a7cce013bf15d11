"""Bridges: paths between any two distributions, with noise on the way and none at the ends.

Given a pair (x0, x1) and z ~ N(0, I), which is independent of the pair,

    x_t = alpha(t) x1 + sigma(t) x0 + gamma(t) z,      gamma(0) = gamma(1) = 0.

The velocity of x_t, alpha' x1 + sigma' x0 + gamma' z, has an infinite mean square where gamma' is
infinite, as it is at both ends of a Brownian bridge. Two fields are bounded instead, each the
minimum of a regression (`bridge_loss`):

    w(t, x) = E[alpha' x1 + sigma' x0 | x_t = x],      z_hat(t, x) = E[z | x_t = x].

All else follows from them (`bridge_flow`, `bridge_score`, `bridge_drift`): the conditional velocity
of a whole bridge is nowhere needed.

The Brownian bridge of the reference sigma dB has gamma^2 = sigma^2 t (1 - t). Where the pairs are
those of the entropic optimal transport of cost |x0 - x1|^2 at epsilon = 2 sigma^2 its equation is
the Schroedinger bridge (Tong et al. 2023); with other pairs it is not, though its marginals are
right.

Sources: Albergo, Boffi and Vanden-Eijnden 2023, arXiv 2303.08797 (interpolants, the two fields);
Tong et al. 2023, arXiv 2307.03672 (score and flow from entropic pairs).
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..types import (
    PathSample,
    as_batch,
    at_least_float32,
    broadcast_time,
    check_number,
    check_same_shape,
    is_concrete,
    kind,
    returned,
    wider,
)
from .affine import AffinePath, Schedule, coefficient, refuse_singular, schedule


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
    check_number("sigma", sigma, "Without noise cond_ot() makes straight lines", positive=True)
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
    x_t = weighted_sum((alpha, x1), (sigma, x0), (gamma, z)).astype(dtype)
    mean_dot = weighted_sum((alpha_dot, x1), (sigma_dot, x0)).astype(dtype)
    return BridgeSample(PathSample(t, x_t, mean_dot), PathSample(t, x_t, z.astype(dtype)))


def bridge_loss(fields: BridgeFields, bridge_sample: BridgeSample) -> jax.Array:
    """|w - (alpha' x1 + sigma' x0)|^2 / D + |z_hat - z|^2 / D, per example, in one call.

    It is `cfm_loss` of w on the one path sample plus that of z_hat on the other; take the two to
    weigh them otherwise. z is of unit variance whatever the data: where the data are much wider or
    the noise much weaker, one of the two drowns. In units in which data and gamma are about 1, or
    with w's loss over sigma^2 on a bridge of reference sigma dB, they weigh about the same.

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
    if len(bridge_sample) != 2:
        raise ValueError(
            "bridge_sample must be BridgeSample(mean, noise), of sample_bridge; got "
            f"{kind(bridge_sample)}. cfm_loss takes one path sample."
        )
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
        alpha, sigma = (
            abs(coefficient(name, f, jnp.array([0.0, 1.0])))
            for name, f in (("alpha", path[0]), ("sigma", path[1]))
        )
        if is_concrete(alpha, sigma) and not (alpha[0] < alpha[1] and sigma[1] < sigma[0]):
            raise ValueError(
                "A bridge must begin at x0 and end at x1, alpha growing and sigma falling; got "
                f"alpha from {alpha[0]:.3g} to {alpha[1]:.3g} and sigma from {sigma[0]:.3g} to "
                f"{sigma[1]:.3g}. Exchange the two."
            )


def weighted_sum(*terms: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The sum of a x over terms (a, x), a a function of time, in the widest of their dtypes."""
    dtype = jnp.float32
    for a, x in terms:
        dtype = wider(dtype, wider(a.dtype, x.dtype))
    products = [broadcast_time(a, x).astype(dtype) * x.astype(dtype) for a, x in terms]
    return sum(products[1:], start=products[0])
