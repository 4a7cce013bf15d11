"""Bounds on the probability of discrete images, from a density of continuous ones.

An image of levels v in {0, ..., L - 1} is the box of all x whose pixels are in the bins of these
levels (`fmjax.data.pixels`: L of them fill [low, high), by default [-1, 1)), and a density p of x
gives it the probability P(v) = int_box p(x) dx. With x drawn from a density q(x | v) on that box, a
dequantiser, and K independent draws,

    log P(v) >= E log (1/K) sum_k w_k,    w_k = p(x_k) / q(x_k | v),

by Jensen's inequality. The bound grows with K and tends to log P(v); K = 1 is the usual one. For
the uniform dequantiser log q = D log(L / (high - low)) in D dimensions. The truncated normal one
draws more often from the middle of a level; it fits a density that is peaked there.

Log-densities are in nats per example. `bits_per_dim(log_P, shape, num_levels=L, low=0, high=L)`
makes bits of the bound: in units of levels a box has the volume 1.

With an unbiased but noisy estimate of log p the mean of the w_k is too large, by half the variance
of the noise that differs between the draws, and the bound may fail. The same Hutchinson probes for
all draws of an image leave the smaller part of that noise, not none.

Sources: Theis et al. 2015, arXiv 1511.01844 (section 3.1); Burda et al. 2015, arXiv 1509.00519
(the bound in K); Zheng et al. 2023, arXiv 2305.03935 (truncated normal).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..types import as_floating, at_least_float32
from .pixels import check_range, dequantize

Dequantizer = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def uniform_dequantizer(
    num_levels: int = 256, *, low: float = -1.0, high: float = 1.0
) -> Dequantizer:
    """Draws x evenly from an image's box: `fmjax.data.pixels.dequantize`, with its log-density.

    Args:
      num_levels: L, from 2 to 256.
      low: where the bin of level 0 begins.
      high: where the last bin ends.

    Returns:
      `(key, images) -> (x, log_q)`: integers `[batch, *event]` to floats in [low, high) of that
      shape and log q(x | v) `[batch]`, in nats.

    Raises:
      ValueError: unless low < high; by the dequantiser, as `fmjax.data.pixels.dequantize` does.

    Example:
      >>> x, log_q = uniform_dequantizer()(jax.random.key(0), jnp.zeros((4, 8, 8, 1), jnp.uint8))
      >>> log_q.shape
      (4,)
    """
    check_range(low, high)

    def draw(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = dequantize(key, images, num_levels, low=low, high=high)
        log_q = math.prod(x.shape[1:]) * math.log(num_levels / (high - low))
        return x, jnp.full(x.shape[:1], log_q)

    return draw


def truncated_normal_dequantizer(
    num_levels: int = 256, *, std: float = 0.5, low: float = -1.0, high: float = 1.0
) -> Dequantizer:
    """Draws x around the middle of each level: v + 1/2 + std z, z normal, kept within the level.

    Args:
      num_levels: L, from 2 to 256.
      std: of the normal before it is truncated, in levels. A model of alpha x + sigma z with x at
        the middles, stopped short of the data, needs std = sigma L / (alpha (high - low)); as std
        grows the dequantiser becomes the uniform one.
      low: where the bin of level 0 begins.
      high: where the last bin ends.

    Returns:
      `(key, images) -> (x, log_q)`, as `uniform_dequantizer` returns it.

    Raises:
      ValueError: if `std` is not positive and finite, or unless low < high; by the dequantiser, as
        `fmjax.data.pixels.dequantize` does.

    Source: Zheng et al. 2023, arXiv 2305.03935 (section 4.1).
    """
    if not 0 < std < math.inf:
        raise ValueError(f"std must be positive, in levels; got {std}.")
    check_range(low, high)
    bound, levels_per_unit = 0.5 / std, num_levels / (high - low)

    def draw(key: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The uniform draw is the quantile that becomes the normal one: same box, same checks.
        x = dequantize(key, images, num_levels, low=low, high=high)
        middle = (jnp.asarray(images).astype(jnp.float32) + 0.5) / levels_per_unit + low
        u = (x - middle) * levels_per_unit + 0.5
        inside = math.erf(bound / math.sqrt(2))  # float32 would lose it for a large std
        z = jax.scipy.special.ndtri((1 - inside) / 2 + inside * u)
        z = jnp.clip(z, -bound * (1 - 1e-4), bound * (1 - 1e-4))  # rounding must not leave the box
        log_density = -0.5 * (z**2 + math.log(2 * math.pi)) - math.log(std * inside)
        log_density = log_density + math.log(levels_per_unit)
        return middle + std * z / levels_per_unit, jnp.sum(log_density, range(1, x.ndim))

    return draw


def importance_weighted_bound(log_weights: jax.Array) -> jax.Array:
    """log (1/K) sum_k exp(log w_k), a lower bound on log P(v) in expectation.

    Args:
      log_weights: log p(x_k) - log q(x_k | v) of K independent draws, `[K, *rest]`, in nats.

    Returns:
      `[*rest]`, in nats, in at least float32.

    Raises:
      ValueError: if there is no draw, or the weights are not floating.

    Example:
      >>> importance_weighted_bound(jnp.log(jnp.array([[1.0], [3.0]])))  # log 2
      Array([0.6931472], dtype=float32)
    """
    log_weights = at_least_float32(as_floating("log_weights", log_weights))
    if log_weights.ndim < 1 or log_weights.shape[0] < 1:
        raise ValueError(
            f"log_weights must be [K, ...] with K of at least 1; got the shape {log_weights.shape}."
        )
    return jax.nn.logsumexp(log_weights, axis=0) - math.log(log_weights.shape[0])
