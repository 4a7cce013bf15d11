"""Couplings: who is paired with whom, from the source (t = 0) to the data (t = 1).

A coupling `(key, x0, x1) -> x0` re-pairs the source of a batch with its data. Only `x0` moves, so
labels and masks that belong to `x1` stay where they are. Whatever the pairing, each marginal stays
what it was: `x0` is a permutation of itself, without replacement.

Source: Tong et al. 2023, arXiv 2302.00482; Pooladian et al. 2023, arXiv 2304.14772.
"""

import jax
import jax.numpy as jnp

from .assignment import optimal_assignment
from .types import as_floating, check_same_shape


def independent(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Leaves the pairs as they are drawn: q(x0, x1) = q(x0) q(x1).

    Args:
      key: not used.
      x0: source, `[batch, *event]`.
      x1: data, `[batch, *event]`.

    Returns:
      `x0`.

    Raises:
      ValueError: if the shapes disagree.
    """
    del key
    check_same_shape("x0 and x1", x0, x1)
    return x0


def minibatch_ot(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
    """Pairs the batch by the exact optimal assignment for the squared Euclidean cost.

    The permutation pi minimises sum_i |x0[pi(i)] - x1[i]|^2, with products in float32. It runs
    inside `jax.jit`: on a CPU SciPy solves the assignment in a callback on the host, elsewhere
    Optax does on the device, in a sequential loop; measure that at large batches.

    On a mesh put both arrays whole on every device first, by `jax.lax.with_sharding_constraint` and
    `fmjax.sharding.replicated(mesh)`: split, they communicate at every turn of a loop.

    x0 and x1 are no longer independent then: a velocity trained on such pairs gives samples and
    likelihoods, but `velocity_to_score` of it is not the score.

    Args:
      key: not used, since the optimum needs no randomness.
      x0: source, `[batch, *event]`, floating.
      x1: data, `[batch, *event]`, floating.

    Returns:
      `x0` permuted along the batch, each row exactly once. A NaN or an infinity in either, or
      products that overflow float32, leave nothing to optimise: then all of it is NaN.

    Raises:
      ValueError: if the shapes disagree, or either is not floating.

    Example:
      >>> minibatch_ot(jax.random.key(0), jnp.array([[5.0], [0.0]]), jnp.array([[1.0], [4.0]]))
      Array([[0.],
             [5.]], dtype=float32)

    Source: arXiv 2302.00482, section 3.3.2; the solver is `fmjax.assignment`'s.
    """
    del key
    x0, x1 = as_floating("x0", x0), as_floating("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    flat0, flat1 = (x.reshape(x.shape[0], -1).astype(jnp.float32) for x in (x0, x1))
    # Either's mean adds the same to every permutation. Taken away, so that products of numbers far
    # from the origin don't round the distances away.
    flat0, flat1 = (x - jnp.mean(x, axis=0, keepdims=True) for x in (flat0, flat1))
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, and the squares add the same to every permutation.
    cost = -jnp.matmul(flat0, flat1.T, precision=jax.lax.Precision.HIGHEST)
    finite = jnp.all(jnp.isfinite(cost))
    rows = optimal_assignment(jnp.where(finite, cost, 0))
    return jnp.where(finite, x0[rows], jnp.nan)
