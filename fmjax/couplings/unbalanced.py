"""The unbalanced pairing: both rows drawn from a plan whose marginals are free.

Populations that grow and die, and outliers, have no partners of equal mass. In the plan P of
`plans` with finite tau0 and tau1 a point's mass is what suits the others, and pairs (i, j) are
drawn with probability P_ij / sum P.

Source: Chizat et al. 2016, arXiv 1607.05816.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from ..types import Pairing, Pairs
from .plans import as_weights, check, check_taus, entropic_plan
from .sinkhorn import draw_rows


def unbalanced(
    epsilon: float,
    tau0: float,
    tau1: float,
    *,
    weights0: Any = None,
    weights1: Any = None,
    num_pairs: int | None = None,
    max_iterations: int = 2000,
    threshold: float = 1e-3,
) -> Pairing:
    """Pairs drawn from a plan whose marginals are free: mass grows, dies, or is an outlier.

    Both rows are drawn with replacement, in proportion to P. The path samples of the pairs are
    those of `sample_path(path, x0[pairs.rows0], x1[pairs.rows1], t)`. How much mass a point of x0
    grows to is the sum of its row of `entropic_plan`, over its weight.

    Args:
      epsilon: as in `sinkhorn`.
      tau0: what it costs to change the weights of x0, positive, in the unit of epsilon; infinite
        keeps them.
      tau1: the same of x1.
      weights0: masses of x0, `[n]`; None for 1 / n each.
      weights1: masses of x1, `[m]`; None for 1 / m each.
      num_pairs: how many are drawn; None for as many as there are x1.
      max_iterations: as in `sinkhorn`.
      threshold: as in `sinkhorn`, where finite taus bound the change of the potentials.

    Returns:
      A pairing `(key, x0, x1) -> Pairs`, for x0 `[n, *event]` and x1 `[m, *event]`.

    Raises:
      ValueError: as `entropic_plan` does; for weights as soon as they are given, where their
        values are known.
      RuntimeError: by the pairing, when the program runs, where Sinkhorn doesn't converge, or a
        number of x0 or x1 isn't finite. A program on several devices may end its process there.

    Example:
      >>> x0, x1 = jnp.zeros((1, 1)), jnp.array([[1.0], [-1.0]])
      >>> pairs = unbalanced(0.1, 10.0, 10.0, weights1=[1.0, 3.0])(jax.random.key(0), x0, x1)
      >>> pairs.rows0
      Array([0, 0], dtype=int32)

    Source: arXiv 1607.05816.
    """
    check(epsilon, max_iterations, threshold)
    check_taus(tau0, tau1)
    for name, weights in (("weights0", weights0), ("weights1", weights1)):
        if weights is not None:
            as_weights(name, weights)  # refused here, and not in a training step
    if num_pairs is not None and not (isinstance(num_pairs, int) and num_pairs >= 1):
        raise ValueError(f"num_pairs must be a whole number from 1 on; got {num_pairs}.")

    def pairing(key: jax.Array, x0: jax.Array, x1: jax.Array) -> Pairs:
        key_rows1, key_rows0 = jax.random.split(key)
        plan = entropic_plan(
            x0, x1, epsilon, tau0=tau0, tau1=tau1, weights0=weights0, weights1=weights1,
            max_iterations=max_iterations, threshold=threshold,
        )  # fmt: skip
        num = plan.shape[1] if num_pairs is None else num_pairs
        mass = jnp.broadcast_to(jnp.sum(plan, axis=0)[:, None], (plan.shape[1], num))
        rows1 = draw_rows(key_rows1, mass)
        rows0 = draw_rows(key_rows0, plan[:, rows1])
        # Rows can't be NaN, and any others would be wrong pairs.
        return eqx.error_if(
            Pairs(rows0, rows1),
            ~jnp.isfinite(plan[0, 0]),
            "x0 and x1 must be finite, and Sinkhorn must converge; got a NaN or an infinity, or "
            f"not after {max_iterations} iterations. entropic_plan outside jax.jit says which.",
        )

    return pairing
