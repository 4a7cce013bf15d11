"""Samples in a few steps: one call of the average velocity each, and no solver.

The exact flow map gives x1 in one step, and in any number. A trained one errs in each step:
`sample_steps` carries the error along, `sample_renoised` forgets a part of it with the noise that
it adds anew. More steps need not be better; show 1, 2, 4 and 8.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..paths.affine import AffinePath, as_time, check_path, weights
from ..types import as_batch, broadcast_time, is_concrete, kind, wider
from .average import AverageVelocity, flow_map


def sample_steps(average_velocity: AverageVelocity, x0: jax.Array, ts: jax.Array) -> jax.Array:
    """Samples by one jump after another: x(ts[n + 1]) = x(ts[n]) + (ts[n + 1] - ts[n]) U.

    Args:
      average_velocity: `(t, s, x) -> U`, called `num_steps` times with t and s of shape `[]`.
      x0: the state at ts[0], `[batch, *event]`. The state is kept in at least float32.
      ts: ascending times in [0, 1], `[num_steps + 1]`; [0, 1] is the one-step generator.

    Returns:
      The state at ts[-1], `[batch, *event]` in the dtype of `x0`.

    Raises:
      ValueError: for ts of another shape or, where they are known, not ascending or outside [0, 1];
        as `flow_map` does.

    Example:
      >>> sample_steps(lambda t, s, x: jnp.ones_like(x), jnp.zeros((1, 2)), jnp.array([0.0, 1.0]))
      Array([[1., 1.]], dtype=float32)

    Source: Geng et al. 2025, arXiv 2505.13447, algorithm 2.
    """
    x0, ts = as_batch("x0", x0), _as_grid(ts)
    jump = flow_map(average_velocity)

    def step(x: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return jump(*pair, x), None

    x, _ = jax.lax.scan(step, x0.astype(wider(x0.dtype, jnp.float32)), (ts[:-1], ts[1:]))
    return x.astype(x0.dtype)


def sample_renoised(
    key: jax.Array,
    average_velocity: AverageVelocity,
    path: AffinePath,
    x0: jax.Array,
    ts: jax.Array,
) -> jax.Array:
    """Multi-step consistency sampling: jump to the data, add fresh noise up to the next time.

    From a jump's end y at t = 1 the next state has the law of the path,

        x_t = a y + (sigma(t)^2 - a^2 sigma(1)^2)^(1/2) z,   a = alpha(t) / alpha(1),   z ~ N(0, I).

    Args:
      key: random key.
      average_velocity: `(t, s, x) -> U`, called `num_steps` times, with s = 1.
      path: the path that it was trained on, with a standard normal source.
      x0: the state at ts[0], `[batch, *event]`. The state is kept in at least float32.
      ts: ascending times from 0, as a rule, to 1, `[num_steps + 1]`. A jump starts at each but the
        last.

    Returns:
      The state at t = 1, `[batch, *event]` in the dtype of `x0`.

    Raises:
      ValueError: as `sample_steps` does, and for ts that are known not to end at 1.

    Example:
      >>> from fmjax.paths import cond_ot
      >>> ts = jnp.array([0.0, 0.5, 1.0])
      >>> sample_renoised(
      ...     jax.random.key(0), lambda t, s, x: jnp.ones_like(x), cond_ot(), jnp.zeros((4, 2)), ts
      ... ).shape
      (4, 2)

    Source: Song et al. 2023, arXiv 2303.01469, algorithm 1.
    """
    x0, ts = as_batch("x0", x0), _as_grid(ts)
    check_path(path)
    if is_concrete(ts) and not np.isclose(last := np.asarray(ts)[-1], 1.0, atol=1e-5):
        raise ValueError(f"ts must end at 1, where every jump leads; got {last}. Append a 1.")
    jump, num_steps = flow_map(average_velocity), len(ts) - 1

    def step(x: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, t_next, key = inputs
        y = jump(t, jnp.ones_like(t), x)
        scale, noise = (broadcast_time(c, x).astype(x.dtype) for c in _renoising(path, t_next))
        return scale * y + noise * jax.random.normal(key, x.shape, x.dtype), None

    inputs = (ts[:-1], ts[1:].at[-1].set(1.0), jax.random.split(key, num_steps))
    x, _ = jax.lax.scan(step, x0.astype(wider(x0.dtype, jnp.float32)), inputs)
    return x.astype(x0.dtype)


def _renoising(path: AffinePath, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weights of a state at t = 1 and of fresh noise that make a state at t."""
    alpha, sigma = weights(path, t)
    alpha_end, sigma_end = weights(path, jnp.ones_like(t))
    scale = alpha / alpha_end
    kept = scale * sigma_end
    # A path whose noise grows with t would want less than none: a NaN.
    return scale, jnp.sqrt((sigma - kept) * (sigma + kept))


def _as_grid(ts: Any) -> jax.Array:
    if np.ndim(ts) != 1 or len(ts) < 2:
        raise ValueError(
            f"ts must be [num_steps + 1], at least two times; got {kind(ts)}. "
            "jnp.linspace(0, 1, num_steps + 1) makes equal steps."
        )
    ts = as_time(ts, "ts")
    if is_concrete(ts) and (np.asarray(ts)[1:] < np.asarray(ts)[:-1]).any():
        raise ValueError(f"ts must ascend, from the source to the data; got {ts}. Try ts[::-1].")
    return ts
