"""Losses of one network U(t, s, x), by what they compare it with.

With h = s - t >= 0, a conditional path sample (t, x_t, u_t), sg for `stop_gradient`, and jvp for
the derivative of U(t, s, x) along (1, 0, w), as t moves and x with it at the rate w:

    MeanFlow            |U - sg(u_t + h jvp(u_t))|^2
    improved MeanFlow   |U - h sg(jvp(v)) - u_t|^2,                     v = v(t, x_t), the marginal
    alpha-flow          |U - sg(a w + (1 - a) U(r, s, x_t + (r - t) w))|^2 / a,       r = t + a h
    terminal velocity   |U + h d_s U - sg(v(s, x_t + h U))|^2

all as means over the event. In the first the conditional u_t stands for the marginal velocity
without bias, since a jvp is linear in its tangent. The plus sign is that of a time which ends at
the data; see `average`. Where s = t the gradient of each is that of `fm.cfm_loss`.

Where s = t only the data can say what U is: there every target is u_t. A batch needs such examples,
which `ordered_times(equal=...)` makes.

Targets are computed in at least float32, whatever the network's dtype. A network with dropout
closes over one key, `rngs={"dropout": key}`, so that all of its calls have one mask. The time
derivative of a network is as large as its highest frequency: `time_scale` 1 to 16, not 1000.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..types import (
    PathSample,
    Velocity,
    as_batch,
    at_least_float32,
    broadcast_time,
    check_number,
    check_same_shape,
    checked,
    known_number,
    wider,
)
from .average import AverageVelocity, as_times, checked_average

Call = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def mean_flow_loss(
    average_velocity: AverageVelocity, path_sample: PathSample, s: jax.Array
) -> jax.Array:
    """MeanFlow: regression on u_t + (s - t) dU/dt, the derivative along (1, 0, u_t).

        loss = |U(t, s, x_t) - sg(u_t + (s - t) dU/dt)|^2 / D

    One `jax.jvp` gives U and dU/dt; the gradient goes through U alone.

    Args:
      average_velocity: `(t, s, x) -> U`, called once.
      path_sample: as for `fm.cfm_loss`.
      s: ends, not before t, `[]` or `[batch]`; s = t is flow matching.

    Returns:
      `[batch]`, mean squares over the event, in at least float32.

    Raises:
      ValueError: for s < t where both are known, for times of a wrong shape or outside [0, 1], if
        x_t and u_t differ in shape, and if U has not their shape.

    Example:
      >>> zeros, ones = jnp.zeros((2, 3)), jnp.ones((2, 3))
      >>> sample = PathSample(jnp.zeros(2), zeros, ones)
      >>> mean_flow_loss(lambda t, s, x: 0.5 * x + 1.0, sample, jnp.ones(2))
      Array([0.25, 0.25], dtype=float32)

    Source: Geng et al. 2025, arXiv 2505.13447, equations 9 to 11, with time reversed.
    """
    batch = _prepare(path_sample, s)
    call = checked_average(average_velocity, batch.u_t.dtype)
    u, slope = _along(call, batch, batch.u_t)
    return _mean_square(u - jax.lax.stop_gradient(batch.u_t + batch.h * slope))


def improved_mean_flow_loss(
    average_velocity: AverageVelocity, velocity: Velocity, path_sample: PathSample, s: jax.Array
) -> jax.Array:
    """Improved MeanFlow: U - (s - t) dU/dt, a velocity, regressed on u_t.

        loss = |U(t, s, x_t) - (s - t) sg(dU/dt) - u_t|^2 / D,

    the derivative along (1, 0, v(t, x_t)). A v that is the marginal velocity takes the variance of
    u_t out of the derivative; one that is not biases it.

    Args:
      average_velocity: `(t, s, x) -> U`, called once.
      velocity: `(t, x) -> v`, called once and given no gradient: `instantaneous` of the same
        network, a head of its own, or a teacher.
      path_sample: as for `fm.cfm_loss`.
      s: ends, not before t, `[]` or `[batch]`; s = t is flow matching.

    Returns:
      `[batch]`, mean squares over the event, in at least float32.

    Raises:
      ValueError: as `mean_flow_loss` does, and if the velocity returns another shape than x_t's.

    Example:
      >>> from fmjax.flow_maps import instantaneous
      >>> def network(t, s, x):
      ...     return 0.5 * x + 1.0
      >>> sample = PathSample(jnp.zeros(2), jnp.zeros((2, 3)), jnp.ones((2, 3)))
      >>> improved_mean_flow_loss(network, instantaneous(network), sample, jnp.ones(2))
      Array([0.25, 0.25], dtype=float32)

    Source: Geng et al. 2025, arXiv 2512.02012, with time reversed.
    """
    batch = _prepare(path_sample, s)
    call = checked_average(average_velocity, batch.u_t.dtype)
    v = checked(velocity, batch.u_t.dtype)(batch.t, batch.x_t)
    u, slope = _along(call, batch, jax.lax.stop_gradient(v))
    return _mean_square(u - jax.lax.stop_gradient(batch.u_t + batch.h * slope))


def alpha_flow_loss(
    average_velocity: AverageVelocity,
    path_sample: PathSample,
    s: jax.Array,
    alpha: float | jax.Array,
    *,
    first: AverageVelocity | None = None,
) -> jax.Array:
    """alpha-flow: U over [t, s] against a first part at the velocity w and U over the rest.

        loss = |U(t, s, x_t) - sg(alpha w + (1 - alpha) U(r, s, x_t + (r - t) w))|^2 / (alpha D),

    with r = t + alpha (s - t). No derivative is taken of U. alpha = 1 with w = u_t regresses on u_t
    whatever s. As alpha falls to 0 the gradient tends to `mean_flow_loss`'s and the loss to 0; the
    difference of two U in it loses eps / alpha to rounding, so below 1e-2 take `mean_flow_loss`.

    **Shortcut models** are alpha = 1/2 and `first=average_velocity`, on horizons 2^-k at starts
    that are multiples of them and on a share (3/4, as published) of s = t. Where s > t the loss is
    twice theirs. Where s = t the first part is u_t whatever `first`, or U would be its own target:
    there the gradient is `fm.cfm_loss`'s, for every alpha.

    Args:
      average_velocity: `(t, s, x) -> U`, called twice.
      path_sample: as for `fm.cfm_loss`.
      s: ends, not before t, `[]` or `[batch]`.
      alpha: the first part's share of [t, s], in (0, 1], `[]`; may be traced, as a schedule from 1
        to 0 over the training is.
      first: `(t, r, x) -> w`, called once and given no gradient; None takes u_t.

    Returns:
      `[batch]`, mean squares over the event, in at least float32.

    Raises:
      ValueError: as `mean_flow_loss` does, for alpha outside (0, 1] where it is known, and if
        `first` returns another shape than x_t's.

    Example:
      >>> sample = PathSample(jnp.zeros(2), jnp.zeros((2, 3)), jnp.ones((2, 3)))
      >>> alpha_flow_loss(lambda t, s, x: x, sample, jnp.ones(2), 0.5)
      Array([1.125, 1.125], dtype=float32)

    Source: Zhang et al. 2025, arXiv 2510.20771; Frans et al. 2024, arXiv 2410.12557 (shortcut).
    """
    batch = _prepare(path_sample, s)
    dtype = batch.u_t.dtype
    a = _as_share(alpha, dtype)
    call = checked_average(average_velocity, dtype)
    # Rounding would carry r beyond s.
    r = jnp.minimum(batch.t + a.astype(batch.t.dtype) * (batch.s - batch.t), batch.s)
    w = batch.u_t
    if first is not None:
        w = jnp.where(batch.equal, w, checked_average(first, dtype)(batch.t, r, batch.x_t))
    moved = batch.x_t.astype(dtype) + broadcast_time(r - batch.t, w).astype(dtype) * w
    rest = call(r, batch.s, moved.astype(batch.x_t.dtype))
    target = jax.lax.stop_gradient(a * w + (1 - a) * rest)
    return _mean_square(call(batch.t, batch.s, batch.x_t) - target) / a


def terminal_velocity_loss(
    average_velocity: AverageVelocity, velocity: Velocity, path_sample: PathSample, s: jax.Array
) -> jax.Array:
    """Terminal velocity matching: the speed at which the end of the jump moves, against v there.

        loss = |d/ds (x_t + (s - t) U(t, s, x_t)) - sg(v(s, x_s))|^2 / D,   x_s = x_t + (s - t) U

    One `jax.jvp` in s gives x_s and the derivative, and the gradient goes through it. Where s = t
    the target is u_t.

    Args:
      average_velocity: `(t, s, x) -> U`, called once.
      velocity: `(t, x) -> v`, called once, at s and x_s, and given no gradient: `instantaneous` of
        the same network, or a teacher.
      path_sample: as for `fm.cfm_loss`.
      s: ends, not before t, `[]` or `[batch]`; s = t is flow matching.

    Returns:
      `[batch]`, mean squares over the event, in at least float32.

    Raises:
      ValueError: as `improved_mean_flow_loss` does.

    Example:
      >>> sample = PathSample(jnp.zeros(2), jnp.zeros((2, 3)), jnp.ones((2, 3)))
      >>> terminal_velocity_loss(
      ...     lambda t, s, x: jnp.ones_like(x), lambda t, x: x, sample, jnp.array([0.0, 0.5])
      ... )
      Array([0.  , 0.25], dtype=float32)

    Source: Zhou et al. 2025, arXiv 2511.19797, with time reversed.
    """
    batch = _prepare(path_sample, s)
    dtype = batch.u_t.dtype
    call = checked_average(average_velocity, dtype)

    def end(s: jax.Array) -> jax.Array:
        h = broadcast_time(s - batch.t, batch.x_t).astype(dtype)
        return batch.x_t.astype(dtype) + h * call(batch.t, s, batch.x_t)

    x_s, slope = jax.jvp(end, (batch.s,), (jnp.ones_like(batch.s),))
    v = checked(velocity, dtype)(batch.s, x_s.astype(batch.x_t.dtype))
    target = jax.lax.stop_gradient(jnp.where(batch.equal, batch.u_t, v))
    return _mean_square(slope - target)


def adaptive_weight(
    loss: jax.Array, *, power: float | jax.Array, epsilon: float | jax.Array
) -> jax.Array:
    """A loss per example, weighted by itself: loss / sg(loss + epsilon)^power.

    A large loss pulls less. power = 1/2 has, as epsilon falls to 0, twice the gradient of the root
    of the loss, the distance that is not squared; power = 1 that of its logarithm.

    The published epsilon belongs to the sum over the event, and the losses here are means. Divide
    it by the size D of the event, or it is D times too large and the weight does little: 1e-3 of
    CIFAR-10 is 1e-3 / 3072 = 3.3e-7. The weighted loss is then the published one times D^(power -
    1), a number that Adam does not see.

    Args:
      loss: `[batch]`, not negative.
      power: not negative; 0 is no weight, 0.75 (CIFAR-10) and 1 (ImageNet) are published.
      epsilon: positive, in the unit of the loss.

    Returns:
      `[batch]`, in at least float32.

    Raises:
      ValueError: for a loss that is not `[batch]`, and, where they are known, for a power that is
        negative or no finite number, and an epsilon that is not positive.

    Example:
      >>> adaptive_weight(jnp.array([1.0, 3.0]), power=1.0, epsilon=1.0)
      Array([0.5 , 0.75], dtype=float32)

    Source: Geng et al. 2025, arXiv 2505.13447, equation 22.
    """
    loss = at_least_float32(as_batch("loss", loss))
    if loss.ndim != 1:
        raise ValueError(
            f"loss must be [batch], one value per example; got {loss.shape}. Weight it before its "
            "mean is taken."
        )
    check_number("power", power, "0.75 and 1 are published")
    fix = "The published 1e-3 is that of a sum: take 1e-3 / D for a mean over D numbers"
    check_number("epsilon", epsilon, fix, positive=True)
    power, epsilon = (jnp.asarray(value, loss.dtype) for value in (power, epsilon))
    epsilon = jnp.maximum(epsilon, jnp.finfo(loss.dtype).tiny)  # which a cast may round to zero
    return loss / jax.lax.stop_gradient((loss + epsilon) ** power)


class _Batch(NamedTuple):
    """What every loss needs: u_t, h and `equal` (s = t) have the rank of x_t, u_t and h its width.

    `u_t` is in the wide dtype, in which targets are computed; `x_t` keeps its own.
    """

    t: jax.Array
    s: jax.Array
    x_t: jax.Array
    u_t: jax.Array
    h: jax.Array
    equal: jax.Array


def _prepare(path_sample: PathSample, s: Any) -> _Batch:
    x_t, u_t = as_batch("x_t", path_sample.x_t), as_batch("u_t", path_sample.u_t)
    check_same_shape("x_t and u_t", x_t, u_t)
    t, s = as_times(path_sample.t, s, x_t)
    u_t = u_t.astype(wider(wider(u_t.dtype, x_t.dtype), jnp.float32))
    h = broadcast_time(s - t, x_t)
    return _Batch(t, s, x_t, u_t, h.astype(u_t.dtype), h == 0)


def _along(call: Call, batch: _Batch, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """U(t, s, x_t) and its derivative along (1, 0, w)."""

    def at(t: jax.Array, x: jax.Array) -> jax.Array:
        return call(t, batch.s, x)

    tangents = (jnp.ones_like(batch.t), w.astype(batch.x_t.dtype))
    return jax.jvp(at, (batch.t, batch.x_t), tangents)


def _mean_square(error: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def _as_share(alpha: Any, dtype: Any) -> jax.Array:
    """alpha as a number in (0, 1]; a traced one is taken at its word."""
    fix = "1/2 makes shortcut models, and mean_flow_loss is the limit 0"
    check_number("alpha", alpha, fix, positive=True)
    number = known_number(alpha)
    if number is not None and number > 1:
        raise ValueError(f"alpha must be in (0, 1], a share of [t, s]; got {number}. {fix}.")
    return jnp.asarray(alpha, dtype)
