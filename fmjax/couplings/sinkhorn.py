"""The entropic coupling: an x0 drawn for every x1, in proportion to an entropic plan.

Given the plan P between x0 and x1 with uniform weights (`plans`), x1_j draws x0_i with probability
n P_ij. The pairs are then a sample of P, in which each x1 stands once.

Source: Tong et al. 2023, arXiv 2302.00482 (SB-CFM); Cuturi 2013, arXiv 1306.0895.
"""

import jax
import jax.numpy as jnp

from ..types import Coupling
from .plans import check, entropic_plan
from .points import as_pair


def sinkhorn(epsilon: float, *, max_iterations: int = 2000, threshold: float = 1e-3) -> Coupling:
    """Pairs drawn from the entropic plan: x1 stays, and each x1_j draws an x0_i by P_ij / b_j.

    The draws are with replacement: some x0 come several times, others not at all (37 % of them
    unless epsilon is tiny), and the law of x0 is kept in expectation only. At small epsilon the
    pairs are those of `minibatch_ot`, at large ones independent; `coupling_entropy` of
    `entropic_plan` says where between. An epsilon relative to the batch is the caller's product,
    such as `0.05 * float(np.var(x0) + np.var(x1))`.

    Its time grows as epsilon falls: measure it against `minibatch_ot`, exact, which on a CPU is
    quicker for most. Memory: a few matrices `[batch, batch]`. On a mesh the rows of the matrices
    are split as those of x0 are.

    Args:
      epsilon: weight of the entropy, positive, in units of |x0 - x1|^2; 2 sigma^2 for a
        Schroedinger bridge of noise sigma.
      max_iterations: of Sinkhorn's; as in OTT.
      threshold: the marginals may be wrong by so much, summed; as in OTT.

    Returns:
      A coupling `(key, x0, x1) -> x0`: rows of x0, `[batch, *event]`, in its dtype. A NaN or an
      infinity in either leaves all of it NaN, as under `jax.jit` does a plan that doesn't
      converge. An empty batch comes back as it is.

    Raises:
      ValueError: if `epsilon`, `max_iterations` or `threshold` isn't positive and finite; by the
        coupling, if OTT isn't installed, the shapes disagree or either is not floating.
      RuntimeError: by the coupling, outside `jax.jit`, where Sinkhorn doesn't converge.

    Example:
      >>> x0, x1 = jnp.array([[5.0], [0.0]]), jnp.array([[1.0], [4.0]])
      >>> sinkhorn(epsilon=0.5)(jax.random.key(0), x0, x1)
      Array([[0.],
             [5.]], dtype=float32)

    Source: arXiv 2302.00482, section 3.3.3.
    """
    check(epsilon, max_iterations, threshold)

    def coupling(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        x0, x1 = as_pair(x0, x1)
        if not x0.size:
            return x0
        plan = entropic_plan(x0, x1, epsilon, max_iterations=max_iterations, threshold=threshold)
        rows = draw_rows(key, plan)
        return jnp.where(jnp.isfinite(plan[0, 0]), x0[rows], jnp.nan)

    return coupling


def draw_rows(key: jax.Array, mass: jax.Array) -> jax.Array:
    """For each column of masses `[n, num]` a row, in proportion to them: `[num]`, int32."""
    # By Gumbel's maximum, n numbers for a row: a cumulative sum is quicker, but of rows that are
    # split over devices it would gather them all.
    return jax.random.categorical(key, jnp.log(mass), axis=0).astype(jnp.int32)
