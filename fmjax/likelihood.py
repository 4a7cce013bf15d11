"""Exact log-densities by the instantaneous change of variables.

Along dx/dt = v(t, x), from the source (t = 0) to the data (t = 1), d/dt log p_t(x_t) = -div v, so

    log p_1(x_1) = log p_0(x_0) - int_0^1 div v(t, x_t) dt,

solved together with x, from the data back to the source in `log_prob`, forwards in
`sample_and_log_prob`. Log-densities are in nats per example; only `bits_per_dim` speaks in bits.

Sources: Chen et al. 2018, arXiv 1806.07366 (theorem 1); Grathwohl et al. 2018, arXiv 1810.01367
(Hutchinson's estimator with a probe that stays fixed during the solve).
"""

import math

import diffrax
import jax
import jax.numpy as jnp

from ._solve import checked, solve
from .types import Divergence, SourceLogProb, Velocity, as_floating, wider


def standard_normal_log_prob(x: jax.Array) -> jax.Array:
    """log N(x; 0, I) summed over the event: `[batch, *event]` -> `[batch]`, in nats."""
    event_size = math.prod(x.shape[1:])
    square = jnp.sum(jnp.square(x), axis=range(1, x.ndim))
    return -0.5 * (square + event_size * math.log(2 * math.pi))


def exact_divergence(chunk_size: int = 16) -> Divergence:
    """The trace of the Jacobian, one forward-mode product per dimension of the event.

    Args:
      chunk_size: how many products run at once. Memory grows with it, the result does not change;
        time mostly shrinks with it until the machine is full.

    Returns:
      A divergence `(velocity, t, x) -> (u, div)`, for any event shape.

    Raises:
      ValueError: if `chunk_size < 1`.

    Example:
      >>> u, div = exact_divergence()(lambda t, x: 3 * x, jnp.zeros(()), jnp.ones((2, 4)))
      >>> div
      Array([12., 12.], dtype=float32)
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")

    def divergence(velocity: Velocity, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, jacobian_product = jax.linearize(lambda x: velocity(t, x), x)
        batch, event_size = x.shape[0], math.prod(x.shape[1:])

        def diagonal(i: jax.Array) -> jax.Array:
            # Batch members don't see one another, so one tangent serves them all.
            basis = jax.nn.one_hot(i, event_size, dtype=x.dtype).reshape(1, *x.shape[1:])
            column = jacobian_product(jnp.broadcast_to(basis, x.shape))
            return column.reshape(batch, event_size)[:, i]

        indices = jnp.arange(event_size)
        if event_size <= chunk_size:
            return u, jnp.sum(jax.vmap(diagonal)(indices), axis=0)
        return u, jnp.sum(jax.lax.map(diagonal, indices, batch_size=chunk_size), axis=0)

    return divergence


def hutchinson_divergence(key: jax.Array, num_probes: int = 1) -> Divergence:
    """Hutchinson's estimate: the mean over probes e of e . (J e), e of random signs.

    Unbiased, with variance 2 / num_probes times the sum of squares of the off-diagonal of the
    symmetric part of J. The probes depend on `key` alone, so they stay fixed during a solve, which
    thereby estimates the integral without bias.

    Args:
      key: random key.
      num_probes: probes per example; the cost grows in proportion.

    Returns:
      A divergence `(velocity, t, x) -> (u, div)`, for any event shape.

    Raises:
      ValueError: if `num_probes < 1`.

    Source: Hutchinson 1989, doi 10.1080/03610918908812806.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1; got {num_probes}.")

    def divergence(velocity: Velocity, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        u, jacobian_product = jax.linearize(lambda x: velocity(t, x), x)
        probes = jax.random.rademacher(key, (num_probes, *x.shape), x.dtype)

        def quadratic_form(probe: jax.Array) -> jax.Array:
            return jnp.sum(probe * jacobian_product(probe), axis=range(1, x.ndim))

        return u, jnp.mean(jax.vmap(quadratic_form)(probes), axis=0)

    return divergence


def log_prob(
    velocity: Velocity,
    x1: jax.Array,
    *,
    source_log_prob: SourceLogProb = standard_normal_log_prob,
    divergence: Divergence = exact_divergence(),  # noqa: B008 (a pure function)
    t0: float = 0.0,
    t1: float = 1.0,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),  # noqa: B008
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    num_steps: int | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
) -> jax.Array:
    """log p_1(x1): the flow is solved from `x1` at `t1` back to the source at `t0`.

    Differentiable with respect to `x1` and to whatever `velocity` closes over. Wrap it in
    `jax.jit`: outside of it every call compiles anew.

    Args:
      velocity: `(t, x) -> u`. Activations with continuous second derivatives (SiLU, GELU, tanh)
        solve in far fewer steps than ones with a kink, whose divergence jumps.
      x1: data, `[batch, *event]`.
      source_log_prob: log-density of the source, `[batch, *event]` -> `[batch]`.
      divergence: `exact_divergence(...)` or `hutchinson_divergence(key, num_probes)`.
      t0: time of the source.
      t1: time of the data.
      solver, stepsize_controller, num_steps, max_steps, adjoint: as for `integrate`.

    Returns:
      `[batch]`, in nats, in at least float32.

    Raises:
      ValueError, RuntimeError: as `integrate` does.

    Example:
      >>> log_p = log_prob(lambda t, x: jnp.zeros_like(x), jnp.zeros((5, 2)))  # -log(2 pi)
    """
    x0, log_det = _solve_with_divergence(
        velocity, x1, divergence, t1, t0, solver, stepsize_controller, num_steps, max_steps, adjoint
    )
    # Backwards, log_det is -int_0^1 div v dt.
    return source_log_prob(x0) + log_det


def sample_and_log_prob(
    velocity: Velocity,
    x0: jax.Array,
    *,
    source_log_prob: SourceLogProb = standard_normal_log_prob,
    divergence: Divergence = exact_divergence(),  # noqa: B008
    t0: float = 0.0,
    t1: float = 1.0,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),  # noqa: B008
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    num_steps: int | None = None,
    max_steps: int = 4096,
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint(),  # noqa: B008
) -> tuple[jax.Array, jax.Array]:
    """Samples x1 from source samples `x0`, and their log-densities, in one solve.

    Arguments and errors are those of `log_prob`, with `x0` `[batch, *event]` in place of `x1`.

    Returns:
      x1 `[batch, *event]` in the dtype of `x0`, and log p_1(x1) `[batch]` in nats.
    """
    x1, log_det = _solve_with_divergence(
        velocity, x0, divergence, t0, t1, solver, stepsize_controller, num_steps, max_steps, adjoint
    )
    return x1.astype(x0.dtype), source_log_prob(x0.astype(x1.dtype)) - log_det


def _solve_with_divergence(
    velocity: Velocity,
    x: jax.Array,
    divergence: Divergence,
    t_start: float,
    t_end: float,
    solver: diffrax.AbstractSolver,
    stepsize_controller: diffrax.AbstractStepSizeController | None,
    num_steps: int | None,
    max_steps: int,
    adjoint: diffrax.AbstractAdjoint,
) -> tuple[jax.Array, jax.Array]:
    """The state at `t_end`, and the integral of the divergence from `t_start` to `t_end`."""
    x = as_floating("x", x)
    dtype = wider(x.dtype, jnp.float32)
    y_start = (x.astype(dtype), jnp.zeros(x.shape[:1], dtype))

    def vector_field(t: jax.Array, y: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        return divergence(checked(velocity, dtype), t, y[0])

    _, (x_end, log_det), _ = solve(
        vector_field,
        y_start,
        t0=t_start,
        t1=t_end,
        ts=None,
        solver=solver,
        stepsize_controller=stepsize_controller,
        num_steps=num_steps,
        max_steps=max_steps,
        adjoint=adjoint,
    )
    return x_end[-1], log_det[-1]


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
      Bits per dimension, of the shape of `log_prob`.

    Raises:
      ValueError: if the event is empty, `num_levels < 2` or `high <= low`.

    Example:
      >>> bits_per_dim(jnp.zeros(1), (32, 32, 3))  # a density of 1 everywhere on [-1, 1]: 7 bits
      Array([7.], dtype=float32)

    Source: Theis et al. 2015, arXiv 1511.01844 (section 3.1); Ho et al. 2019, arXiv 1902.00275.
    """
    event_size = math.prod(event_shape)
    if event_size < 1 or num_levels < 2 or high <= low:
        raise ValueError(
            "bits_per_dim needs a non-empty event, two levels and low < high; got event_shape="
            f"{event_shape}, num_levels={num_levels}, low={low}, high={high}."
        )
    return -(log_prob / event_size + math.log((high - low) / num_levels)) / math.log(2)
