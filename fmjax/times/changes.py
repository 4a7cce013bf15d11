"""Samplers made of samplers: the same times shifted, or drawn evenly over their density."""

import math

import jax
import jax.numpy as jnp

from ..types import TimeSampler, is_concrete, kind
from .samplers import carried, check_finite, check_sampler


def shifted(times: TimeSampler, shift: float) -> TimeSampler:
    """Times t / (t + shift (1 - t)) of the times t of a sampler: more noise at the same draw.

    On `cond_ot` the ratio sigma / alpha of every time is multiplied by `shift`, so that shifting
    twice is shifting by the product. Above 1 it moves the times towards the source, as larger
    images want it. The same shift of a solver's grid is
    `match_times(AffinePath(lambda t: t, lambda t: shift * (1 - t)), cond_ot(), ts)`.

    Args:
      times: a time sampler, such as `uniform` or `logit_normal()`.
      shift: positive and finite; 1 leaves the times as they are.

    Returns:
      A time sampler `(key, shape) -> t`, with a quantile function if `times` has one.

    Raises:
      ValueError: if `times` can't be called, or `shift` is no finite number or not positive.

    Example:
      >>> from fmjax.times import uniform
      >>> t = shifted(uniform, 3.0)(jax.random.key(0), (128,))

    Source: Esser et al. 2024, arXiv 2403.03206, section 5.3.2, with time reversed.
    """
    check_sampler(times)
    check_finite("shift", shift)
    if is_concrete(shift) and not float(shift) > 0:
        raise ValueError(f"shift must be positive; got {shift}. 1 shifts nothing.")
    return carried(times, lambda t: t / (t + shift * (1 - t)))


def stratified(times: TimeSampler) -> TimeSampler:
    """The times of a sampler, one from each of as many strata of equal weight as are drawn.

        t_i = quantile((p_i + U_i) / n),   U_i ~ U[0, 1),   p a random order of 0..n-1

    Every single time has the sampler's density, as before, so that no mean changes. Together they
    cover it evenly, and the mean over a batch of what depends on time alone has a variance of the
    order n^-3 instead of n^-1: 1 / (12 n^3) for the mean of uniform times. The order is random,
    since a row of a batch may have a role: a first quarter with s = t, a part on another device.

    Args:
      times: a sampler with a quantile function: `uniform`, `logit_normal()`, `edm_skewed()`,
        `power()`, `u_shaped()`, or `shifted` of one.

    Returns:
      A time sampler `(key, shape) -> t`; n is the number of times in `shape`.

    Raises:
      ValueError: if `times` can't be called or has no quantile function.

    Example:
      >>> from fmjax.times import uniform
      >>> t = stratified(uniform)(jax.random.key(0), (4,))
      >>> jnp.sort(jnp.floor(4 * t)).tolist()
      [0.0, 1.0, 2.0, 3.0]

    Source: Kingma et al. 2021, arXiv 2107.00630, whose batches share one draw.
    """
    check_sampler(times)
    quantile = getattr(times, "quantile", None)
    if not callable(quantile):
        raise ValueError(
            f"stratified needs a sampler with a quantile function; got {kind(times)}. beta has "
            "none; your own gets one by times.QuantileSampler(times, quantile)."
        )

    def strata(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        key_order, key_u = jax.random.split(key)
        num = math.prod(shape)
        low = jax.random.permutation(key_order, num).astype(jnp.float32)
        # Rounding must not carry a number into the next stratum, the last one's to 1.
        end = jnp.nextafter((low + 1) / num, jnp.zeros_like(low))
        u = jnp.minimum((low + jax.random.uniform(key_u, (num,), jnp.float32)) / num, end)
        return jnp.asarray(quantile(u)).reshape(shape)

    return strata
