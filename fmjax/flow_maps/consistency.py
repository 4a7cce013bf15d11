"""Consistency models: the flow map to the data, f(t, x) = x + (1 - t) U(t, 1, x), by its constancy.

Along a path of the exact flow f(t, x_t) is one point, the path's end at t = 1. The loss asks it of
two points of one conditional path, at t and at a later t', the later one without gradient. For
t' = t + d and d to 0 its gradient is (1 - t) d times that of `mean_flow_loss` with s = 1.

**Easy consistency tuning** (ECT) starts from a trained flow and brings t' to t by stages. Its
formulas are in EDM's noise level, which in the time of `cond_ot` is sigma = (1 - t) / t:

    ln sigma ~ N(-1.1, 2),    sigma' = sigma max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma))),
    weight = 1 / sigma^2 + 1 / data_std^2,    a distance that is not squared.

In code, on `cond_ot` and with dropout under one key in all calls:

    t = ect_times()(key, (batch,))
    loss = consistency_loss(U, cond_ot(), x0, x1, t, ect_next(t, stage))
    loss = ect_weight(t) * adaptive_weight(loss, power=0.5, epsilon=1e-8)

Source: Song et al. 2023, arXiv 2303.01469; Geng et al. 2024, arXiv 2406.14548 (ECT).
"""

import jax
import jax.numpy as jnp
import numpy as np

from ..paths.affine import AffinePath, as_time, sample_path
from ..times import logit_normal
from ..types import TimeSampler, broadcast_time, check_number, is_concrete, known_number, wider
from .average import AverageVelocity, as_times, checked_average


def consistency_loss(
    average_velocity: AverageVelocity,
    path: AffinePath,
    x0: jax.Array,
    x1: jax.Array,
    t: jax.Array,
    t_next: jax.Array,
) -> jax.Array:
    """The consistency of two points of a path: f(t, x_t) against f(t', x_t') without gradient.

        loss = |f(t, x_t) - sg(f(t', x_t'))|^2 / D,   f(t, x) = x + (1 - t) U(t, 1, x)

    At t' = 1 the target is the path's end, x1 where sigma(1) = 0, whatever the network says.

    Args:
      average_velocity: `(t, s, x) -> U`, called twice, with s = 1.
      path: the path of both points.
      x0: source, `[batch, *event]`.
      x1: data, `[batch, *event]`.
      t: times in [0, 1], `[]` or `[batch]`.
      t_next: later times t', not before t, `[]` or `[batch]`.

    Returns:
      `[batch]`, mean squares over the event, in at least float32.

    Raises:
      ValueError: for t_next < t where both are known, for times of a wrong shape or outside [0, 1],
        if U has not the shape of x1, and as `fm.sample_path` does.

    Example:
      >>> from fmjax.paths import cond_ot
      >>> x0, x1 = jnp.zeros((2, 3)), jnp.ones((2, 3))
      >>> consistency_loss(
      ...     lambda t, s, x: 0.0 * x, cond_ot(), x0, x1, jnp.full(2, 0.5), jnp.ones(2)
      ... )
      Array([0.25, 0.25], dtype=float32)

    Source: Song et al. 2023, arXiv 2303.01469, equation 10, with time reversed.
    """
    now = sample_path(path, x0, x1, t)
    t, t_next = as_times(now.t, t_next, now.x_t, "t_next")
    later = sample_path(path, x0, x1, t_next).x_t
    wide = wider(wider(now.x_t.dtype, t.dtype), jnp.float32)
    call = checked_average(average_velocity, wide)

    def end(t: jax.Array, x: jax.Array) -> jax.Array:
        h = broadcast_time(1 - t, x).astype(wide)
        # A network's U need have no value at t = 1.
        return jnp.where(h == 0, x.astype(wide), x.astype(wide) + h * call(t, jnp.ones_like(t), x))

    error = end(t, now.x_t) - jax.lax.stop_gradient(end(t_next, later))
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))


def ect_times(mean: float = -1.1, std: float = 2.0) -> TimeSampler:
    """ECT's times: ln((1 - t) / t) ~ N(mean, std^2), which is `logit_normal(-mean, std)`.

    Args:
      mean: of the logarithm of EDM's noise level.
      std: of the same, positive.

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: as `logit_normal` does.

    Example:
      >>> t = ect_times()(jax.random.key(0), (128,))

    Source: Geng et al. 2024, arXiv 2406.14548, and the authors' code.
    """
    return logit_normal(-mean, std)


def ect_next(
    t: jax.Array,
    stage: int | jax.Array,
    *,
    q: float = 4.0,
    k: float = 8.0,
    b: float = 1.0,
) -> jax.Array:
    """ECT's later time t' for t: closer to t by each stage, t' = 1 for little noise.

    With sigma = (1 - t) / t and c = max(0, 1 - q^-(stage + 1) (1 + k sigmoid(-b sigma))),

        sigma' = c sigma,   that is   t' = t / (t + c (1 - t)).

    Args:
      t: times in [0, 1], `[]` or `[batch]`.
      stage: from 0 on; may be traced. Published: one more every 3.2 million images, 8 stages.
      q: above 1, by how much a stage divides the step.
      k: how much larger the step is where there is little noise, not negative.
      b: the noise level 1 / b below which it is, positive.

    Returns:
      Times t' >= t, of the shape of t, in at least float32.

    Raises:
      ValueError: for times outside [0, 1], a negative stage, q <= 1, k < 0 or b <= 0, where known.

    Example:
      >>> [f"{float(ect_next(jnp.array(0.5), stage)):.3f}" for stage in (0, 1, 2)]
      ['0.825', '0.555', '0.513']

    Source: Geng et al. 2024, arXiv 2406.14548, section 3, and the authors' code.
    """
    t = as_time(t)
    known = isinstance(stage, int)
    check_number("stage", stage if known else jnp.asarray(stage, t.dtype), "The first is 0")
    check_number("q", q, "4 is usual", positive=True)
    check_number("k", k, "8 is usual")
    check_number("b", b, "1 is usual", positive=True)
    number = known_number(q)
    if number is not None and number <= 1:
        raise ValueError(f"q must be above 1, or the stages lead away from t; got {q}. Try 4.")
    base, gain, slope, stage = (jnp.asarray(value, t.dtype) for value in (q, k, b, stage))
    near = jax.nn.sigmoid(-slope * (1 - t) / t)
    c = jnp.maximum(1 - base ** -(stage + 1) * (1 + gain * near), 0)
    later = t / (t + c * (1 - t))
    # 0 / 0 where t = 0 and c = 0; and rounding must not order the pair anew.
    return jnp.maximum(jnp.where(t == 0, t, later), t)


def ect_weight(t: jax.Array, *, data_std: float = 0.5) -> jax.Array:
    """ECT's weight of a time: 1 / sigma^2 + 1 / data_std^2, with sigma = (1 - t) / t.

    Args:
      t: times in [0, 1), `[]` or `[batch]`.
      data_std: standard deviation of the data, positive; 0.5 is EDM's for images in [-1, 1].

    Returns:
      Weights of the shape of t, in at least float32.

    Raises:
      ValueError: for times outside [0, 1), or a data_std that is not positive, where known.

    Example:
      >>> ect_weight(jnp.array([0.0, 0.5]))
      Array([4., 5.], dtype=float32)

    Source: Geng et al. 2024, arXiv 2406.14548, and the authors' code.
    """
    t = as_time(t)
    check_number("data_std", data_std, "0.5 is usual", positive=True)
    if is_concrete(t) and (np.asarray(t) >= 1).any():
        raise ValueError(
            "t must be below 1, where the weight is infinite; got a time of "
            f"{np.max(np.asarray(t))}. ect_times() draws none there."
        )
    return jnp.square(t / (1 - t)) + 1 / jnp.square(jnp.asarray(data_std, t.dtype))
