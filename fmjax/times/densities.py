"""Densities of training times on [0, 1]: from which t the loss is drawn.

Time runs from the source (t = 0) to the data (t = 1). A time sampler is `(key, shape) -> t`; any
function of that form can be trained with. The density weighs the loss and moves no optimum.

A sampler may carry the quantile function of its density, `times.quantile(u) -> t`, the inverse of
its distribution function:

    uniform        t = u
    logit_normal   t = sigmoid(mean + std Phi^-1(u))
    edm_skewed     the same of (-mean, std), clipped
    power          t = u^(1 / (1 + exponent))
    u_shaped       t = 1/2 + arsinh((2 u - 1) sinh(a / 2)) / a
    beta           none: its inverse has no closed form
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from ..types import TimeSampler, is_concrete
from .samplers import QuantileSampler, carried, check_finite, from_quantile


def _with_quantile(
    quantile: Callable[[jax.Array], jax.Array],
) -> Callable[[TimeSampler], QuantileSampler]:
    return lambda times: QuantileSampler(times, quantile)


@_with_quantile(lambda u: u)
def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """t ~ U[0, 1), the density of the paper (arXiv 2210.02747).

    Args:
      key: random key.
      shape: the shape to draw, usually `(batch,)`.

    Returns:
      Times in [0, 1), float32, of shape `shape`.
    """
    return jax.random.uniform(key, shape, jnp.float32)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> QuantileSampler:
    """t = sigmoid(mean + std n), n ~ N(0, 1): more training in the middle of the path.

    Args:
      mean: location on the logit scale; above 0 it moves the times towards the data.
      std: scale, positive.

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `mean` or `std` is no finite number, or `std` not positive.

    Example:
      >>> t = logit_normal(0.0, 1.0)(jax.random.key(0), (128,))

    Source: Esser et al. 2024, arXiv 2403.03206, section 3.1.
    """
    check_finite("mean", mean)
    check_finite("std", std)
    if is_concrete(std) and not float(std) > 0:
        raise ValueError(f"std must be positive; got {std}. The usual value is 1.")

    def times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))

    return QuantileSampler(times, lambda u: jax.nn.sigmoid(mean + std * ndtri(u)))


def edm_skewed(mean: float = -1.2, std: float = 1.2, t_min: float = 1e-4) -> TimeSampler:
    """t = 1 / (1 + s), s = exp(mean + std n), n ~ N(0, 1), clipped to [t_min, 1].

    EDM's density of noise levels, carried to flow times: s is the ratio sigma / alpha of `cond_ot`.
    It is `logit_normal(-mean, std)` but for the clip, and leans towards the data.

    Args:
      mean: mean of log s.
      std: standard deviation of log s, positive.
      t_min: the smallest time, in [0, 1).

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `mean` or `std` is no finite number, `std` is not positive, or `t_min` is
        outside [0, 1).

    Source: Karras et al. 2022, arXiv 2206.00364, table 1.
    """
    check_finite("mean", mean)
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min must be in [0, 1); got {t_min}. The usual value is 1e-4.")
    return carried(logit_normal(-mean, std), lambda t: jnp.clip(t, t_min, 1.0))


def power(exponent: float = 0.0) -> QuantileSampler:
    """Density (1 + exponent) t^exponent: more training near the data, or near the source.

    Args:
      exponent: above -1; 0 is `uniform`, above 0 leans towards the data.

    Returns:
      A time sampler `(key, shape) -> t` with a quantile function.

    Raises:
      ValueError: if `exponent` is no finite number, or not above -1.

    Example:
      >>> t = power(4.0)(jax.random.key(0), (128,))

    Source: Wildberger et al. 2023, arXiv 2305.17161.
    """
    check_finite("exponent", exponent)
    if is_concrete(exponent) and not float(exponent) > -1:
        raise ValueError(
            f"exponent must be above -1, where t^exponent has an integral; got {exponent}. 0 is "
            "the uniform density."
        )
    return from_quantile(lambda u: u ** (1 / (1 + exponent)))


def u_shaped(a: float = 4.0) -> QuantileSampler:
    """Density proportional to e^(a t) + e^(a (1 - t)): more training near both ends.

    The paths between a flow's own pairs are almost straight, and what is left to learn is at the
    ends.

    Args:
      a: in (0, 100]; towards 0 the density becomes uniform.

    Returns:
      A time sampler `(key, shape) -> t` with a quantile function.

    Raises:
      ValueError: if `a` is no number in (0, 100].

    Example:
      >>> t = u_shaped()(jax.random.key(0), (128,))

    Source: Lee et al. 2024, arXiv 2405.20320.
    """
    check_finite("a", a)
    if is_concrete(a) and not 0 < float(a) <= 100:  # float32 ends at sinh(89)
        raise ValueError(f"a must be in (0, 100]; got {a}. The usual value is 4.")

    def quantile(u: jax.Array) -> jax.Array:
        t = 0.5 + jnp.arcsinh((2 * u - 1) * jnp.sinh(jnp.asarray(a / 2, u.dtype))) / a
        return jnp.clip(t, 0.0, 1.0)  # rounding goes beyond

    return from_quantile(quantile)


def beta(a: float, b: float) -> TimeSampler:
    """The beta density, proportional to t^(a - 1) (1 - t)^(b - 1).

    It carries no quantile function: its inverse has no closed form.

    Args:
      a: positive; large ones lean towards the data.
      b: positive; large ones lean towards the source.

    Returns:
      A time sampler `(key, shape) -> t`.

    Raises:
      ValueError: if `a` or `b` is no finite number, or not positive.

    Example:
      >>> t = beta(1.0, 1.5)(jax.random.key(0), (128,))

    Source: Black et al. 2024, arXiv 2410.24164.
    """
    for name, value in (("a", a), ("b", b)):
        check_finite(name, value)
        if is_concrete(value) and not float(value) > 0:
            raise ValueError(f"{name} must be positive; got {value}. 1 and 1 is uniform.")
    return lambda key, shape: jax.random.beta(key, a, b, shape, jnp.float32)
