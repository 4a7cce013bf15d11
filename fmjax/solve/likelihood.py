"""Exact log-densities by the instantaneous change of variables.

Along dx/dt = v(t, x), from the source (t = 0) to the data (t = 1), d/dt log p_t(x_t) = -div v, so

    log p_1(x_1) = log p_0(x_0) - int_0^1 div v(t, x_t) dt,

solved together with x, from the data back to the source in `log_prob`, forwards in
`sample_and_log_prob`. An adaptive step is chosen for the mean square of the errors of x and of the
integral, each averaged over its own numbers, so that the integral is as good in 3,072 dimensions as
in two. Log-densities are in nats per example; only `bits_per_dim` speaks in bits.

Source: Chen et al. 2018, arXiv 1806.07366 (theorem 1).
"""

import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from ..sources import check_source, source_at, standard_normal_log_prob
from ..types import (
    Divergence,
    SourceLogProb,
    Velocity,
    as_batch,
    as_floating,
    at_least_float32,
    checked,
    refuse_explicit_mesh,
    wider,
)
from .call import SolveOptions, backwards, solve
from .divergences import EXACT, divergence_at


class LogProb(NamedTuple):
    """A solved likelihood.

    Attributes:
      log_prob: log p_1(x1) in nats, `[batch]`; `[num_estimates, batch]` where the divergence gives
        a leading axis of estimates.
      x0: where the data came from, `[batch, *event]`.
      num_evaluations: calls of the velocity together with its Jacobian products, `[]`, int32.
    """

    log_prob: jax.Array
    x0: jax.Array
    num_evaluations: jax.Array


class LikelihoodOptions(SolveOptions, total=False):
    """The options of every log-density: those of the solve, and these.

    Attributes:
      source_log_prob: log-density of the source, `[batch, *event]` -> `[batch]`;
        `standard_normal_log_prob` by default.
      divergence: `exact_divergence(...)`, the default, `hutchinson_divergence(key, num_probes)`, or
        `hutchinson_estimates(key, num_probes)` for each probe's value on its own.
    """

    source_log_prob: SourceLogProb
    divergence: Divergence


def log_prob(velocity: Velocity, x1: jax.Array, **options: Unpack[LikelihoodOptions]) -> jax.Array:
    """log p_1(x1): the flow is solved from `x1` at `t1` back to the source at `t0`.

    Differentiable with respect to `x1` and to whatever `velocity` closes over. Wrap it in
    `jax.jit`: outside of it every call compiles anew.

    Args:
      velocity: `(t, x) -> u`. Activations with continuous second derivatives (SiLU, GELU, tanh)
        solve in far fewer steps than ones with a kink (ReLU, SELU), whose divergence jumps. For
        these pass `solver=diffrax.Dopri5()`, which makes far fewer calls there than Tsit5.
      x1: data, `[batch, *event]`.
      **options: `LikelihoodOptions`: source_log_prob, divergence, and those of `integrate`.

    Returns:
      `[batch]`, in nats, in at least float32; of the shape of what `divergence` returns.

    Raises:
      ValueError, RuntimeError: as `integrate` does; a `source_log_prob` or a `divergence` that
        returns another shape.

    Example:
      >>> log_p = log_prob(lambda t, x: jnp.zeros_like(x), jnp.zeros((5, 2)))  # -log(2 pi)
    """
    return integrate_log_prob(velocity, x1, **options).log_prob


def integrate_log_prob(
    velocity: Velocity,
    x1: jax.Array,
    *,
    source_log_prob: SourceLogProb = standard_normal_log_prob,
    divergence: Divergence = EXACT,
    **options: Unpack[SolveOptions],
) -> LogProb:
    """`log_prob` with its cost and the source points that the data came from.

    Arguments and errors are those of `log_prob`.

    Returns:
      `LogProb(log_prob, x0, num_evaluations)`.

    Example:
      >>> int(integrate_log_prob(lambda t, x: -x, jnp.ones((3, 2)), num_steps=4).num_evaluations)
      25
    """
    x1 = as_batch("x1", x1)
    check_source(source_log_prob, x1)
    x0, log_det, num_evaluations = _solve(velocity, x1, divergence, backwards(options))
    # Backwards, log_det is -int_0^1 div v dt.
    log_p = source_at(source_log_prob, x0, log_det) + log_det
    return LogProb(log_p, x0.astype(x1.dtype), num_evaluations)


def sample_and_log_prob(
    velocity: Velocity,
    x0: jax.Array,
    *,
    source_log_prob: SourceLogProb = standard_normal_log_prob,
    divergence: Divergence = EXACT,
    **options: Unpack[SolveOptions],
) -> tuple[jax.Array, jax.Array]:
    """Samples x1 from source samples `x0`, and their log-densities, in one solve.

    Arguments and errors are those of `log_prob`, with `x0` `[batch, *event]` in place of `x1`.

    Returns:
      x1 `[batch, *event]` in the dtype of `x0`, and log p_1(x1) `[batch]` in nats.
    """
    x0 = as_batch("x0", x0)
    check_source(source_log_prob, x0)
    x1, log_det, _ = _solve(velocity, x0, divergence, options)
    log_p = source_at(source_log_prob, x0.astype(x1.dtype), log_det) - log_det
    return x1.astype(x0.dtype), log_p


def _solve(
    velocity: Velocity, x: jax.Array, divergence: Divergence, options: SolveOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x at the end, the integral of the divergence on the way there, and the evaluations."""
    refuse_explicit_mesh("x", x)
    dtype = wider(x.dtype, jnp.float32)

    def vector_field(t: jax.Array, y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return divergence_at(divergence, checked(velocity, dtype), t, y[0])

    start = jnp.zeros((), dtype)
    _, div = jax.eval_shape(vector_field, start, (x.astype(dtype), start))
    y_start = (x.astype(dtype), jnp.zeros(div.shape, dtype))
    _, (x_end, log_det), num_evaluations = solve(vector_field, y_start, **options)
    return x_end[-1], log_det[-1], num_evaluations


def bits_per_dim(
    log_prob: jax.Array,
    event_shape: tuple[int, ...],
    *,
    num_levels: int = 256,
    low: float = -1.0,
    high: float = 1.0,
) -> jax.Array:
    """Bits per dimension of discrete data, from log-densities of uniformly dequantised data.

    The data take the values v = 0, ..., num_levels - 1 in each of D dimensions. The model saw
    x = low + (high - low) (v + u) / num_levels with u ~ U[0, 1). By Jensen's inequality
    log P(v) >= E_u log p(v + u), whose density is that of x times the slope per level, so

        bits/dim = -(log_prob / D + log((high - low) / num_levels)) / log 2

    is, averaged over u, an upper bound on the negative log-likelihood of the discrete data.

    Args:
      log_prob: log-densities of x in nats, any shape, `[batch]` as a rule.
      event_shape: shape of one example; D is its product.
      num_levels: number of values, 256 for 8-bit images.
      low: where level 0 begins.
      high: where the last level ends.

    Returns:
      Bits per dimension, of the shape of `log_prob`, in at least float32.

    Raises:
      ValueError: if the event is empty, `num_levels < 2` or not low < high, both finite.

    Example:
      >>> bits_per_dim(jnp.zeros(1), (32, 32, 3))  # a density of 1 everywhere on [-1, 1]: 7 bits
      Array([7.], dtype=float32)

    Source: Theis et al. 2015, arXiv 1511.01844 (section 3.1); Ho et al. 2019, arXiv 1902.00275.
    """
    event_size = math.prod(event_shape)
    if event_size < 1 or not num_levels >= 2 or not -math.inf < low < high < math.inf:
        raise ValueError(
            "bits_per_dim needs a non-empty event, two levels and low < high; got event_shape="
            f"{event_shape}, num_levels={num_levels}, low={low}, high={high}."
        )
    log_prob = at_least_float32(as_floating("log_prob", log_prob))
    return -(log_prob / event_size + math.log((high - low) / num_levels)) / math.log(2)
