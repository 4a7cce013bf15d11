"""Entropic plans: who shares how much mass with whom, balanced or not.

The plan P between weights a on x0 and b on x1, for C_ij = |x0_i - x1_j|^2, minimises

    <P, C> + epsilon KL(P | a b^T) + tau0 KL(P 1 | a) + tau1 KL(P^T 1 | b),

KL(p | q) = sum p log(p / q) - p + q. Infinite tau0 and tau1 keep the marginals (Sinkhorn's own
problem); finite ones let mass appear and vanish. Epsilon and tau are absolute, in units of
|x0 - x1|^2: the static Schroedinger bridge of the reference sigma dB has epsilon = 2 sigma^2.

Between uniform weights on n points each the renormalised entropy H(P) / log n - 1 is 0 for a
permutation and 1 for independent pairs. In general it is 1 - I / min(H(a'), H(b')), with I the
mutual information of P and a', b' its marginals.

C is computed from products of matrices, in float32 where the points are. x0 and x1 are centred
first, each by its own mean: that changes C by terms of a row or of a column, hence no balanced
plan.

Source: Cuturi 2013, arXiv 1306.0895; Chizat et al. 2016, arXiv 1607.05816 (unbalanced). The solver
is OTT-JAX's, extra `ot`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..types import (
    as_batch,
    as_floating,
    at_least_float32,
    is_concrete,
    kind,
    known_number,
    refuse_explicit_mesh,
)
from .points import as_points


def entropic_plan(
    x0: jax.Array,
    x1: jax.Array,
    epsilon: float,
    *,
    tau0: float = math.inf,
    tau1: float = math.inf,
    weights0: Any = None,
    weights1: Any = None,
    max_iterations: int = 2000,
    threshold: float = 1e-3,
) -> jax.Array:
    """The plan P of the module's formula.

    Args:
      x0: source, `[n, *event]`, floating.
      x1: data, `[m, *event]`, floating.
      epsilon: as in `sinkhorn`.
      tau0: as in `unbalanced`.
      tau1: as in `unbalanced`.
      weights0: as in `unbalanced`.
      weights1: as in `unbalanced`.
      max_iterations: as in `sinkhorn`.
      threshold: as in `unbalanced`.

    Returns:
      `[n, m]`, in at least float32. All NaN where x0 or x1 hold a NaN or an infinity, and under
      `jax.jit` where Sinkhorn doesn't converge.

    Raises:
      ValueError: if OTT isn't installed; if `epsilon` or a tau isn't positive, the event shapes
        differ, or a batch is empty; for weights of another length, that are negative, all zero or
        not finite; with both taus infinite also for weights of different sums.
      RuntimeError: outside `jax.jit`, where Sinkhorn doesn't converge.

    Example:
      >>> entropic_plan(jnp.zeros((2, 1)), jnp.zeros((2, 1)), 1.0)
      Array([[0.25, 0.25],
             [0.25, 0.25]], dtype=float32)
    """
    check(epsilon, max_iterations, threshold)
    check_taus(tau0, tau1)
    geometry, linear = _ott()
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    refuse_explicit_mesh("x0", x0)
    if x0.shape[1:] != x1.shape[1:] or not (x0.size and x1.size):
        raise ValueError(
            "x0 and x1 must have one event shape and at least one row; got shapes "
            f"{x0.shape} and {x1.shape}."
        )
    a, b = (
        jnp.full(len(x), 1 / len(x)) if w is None else as_weights(name, w, len(x))
        for (name, w), x in zip(
            (("weights0", weights0), ("weights1", weights1)), (x0, x1), strict=True
        )
    )
    _check_sums(a, b, tau0, tau1)
    points = as_points(x0, x1)
    centred0, centred1 = (x - jnp.mean(x, axis=0)[None] for x in (points.x0, points.x1))
    dtype = centred0.dtype
    a, b = (jax.lax.stop_gradient(w).astype(dtype) for w in (a, b))
    product = jnp.matmul(centred0, centred1.T, precision=jax.lax.Precision.HIGHEST)
    norm0, norm1 = (jnp.sum(x**2, axis=1) for x in (centred0, centred1))
    cost = norm0[:, None] + norm1[None] - 2 * product
    # Its square root, which no float32 underflows at.
    epsilon_in_unit = jnp.square(jnp.asarray(math.sqrt(epsilon), dtype) / points.unit)
    if math.isfinite(tau0) or math.isfinite(tau1):
        # The mass depends on the costs themselves: what the means hide is put back.
        shift = jnp.mean(points.x0, axis=0) - jnp.mean(points.x1, axis=0)
        along0, along1 = (
            jnp.matmul(x, shift, precision=jax.lax.Precision.HIGHEST) for x in (centred0, centred1)
        )
        cost += jnp.sum(shift**2) + 2 * along0[:, None] - 2 * along1[None]
        # And OTT's entropy is relative to 1, not to a b^T, whatever its documentation says.
        logs0, logs1 = (jnp.log(jnp.maximum(w, jnp.finfo(dtype).tiny)) for w in (a, b))
        cost -= epsilon_in_unit * (logs0[:, None] + logs1[None])
    # OTT promotes ranks and dtypes as NumPy does, whatever the caller wants of its own code.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        solved = linear.solve(
            geometry.Geometry(cost_matrix=cost, epsilon=epsilon_in_unit),
            a=a,
            b=b,
            tau_a=_relative(tau0, float(epsilon)),
            tau_b=_relative(tau1, float(epsilon)),
            max_iterations=max_iterations,
            threshold=threshold,
            recenter_potentials=True,  # or large taus would take tau / epsilon iterations
        )
        plan = solved.matrix
    # No error in a running program: of several devices it would end the process.
    if is_concrete(points.finite, solved.converged) and points.finite and not solved.converged:
        raise RuntimeError(
            "Sinkhorn must converge; got marginals that are wrong by more than "
            f"threshold={threshold} after {max_iterations} iterations. Take a larger epsilon or "
            "more iterations, or minibatch_ot, which is exact."
        )
    return jnp.where(points.finite & solved.converged, plan, jnp.nan)


def coupling_entropy(plan: jax.Array) -> jax.Array:
    """How far from a permutation a plan is: 0 for one, 1 for independent pairs.

    1 - I / min(H(a), H(b)), where I is the mutual information of the plan and a, b are its
    marginals; between uniform weights on n points each it is H(plan) / log n - 1.

    Args:
      plan: `[n, m]`, non-negative; of any sum, as unbalanced ones are.

    Returns:
      A number in [0, 1], `[]`; NaN where the plan holds a NaN or all of its mass is on one point.

    Raises:
      ValueError: if the plan is no floating matrix of two rows and two columns or more; where its
        values are known, also if it is negative somewhere.

    Example:
      >>> coupling_entropy(jnp.eye(3)), coupling_entropy(jnp.ones((3, 3)))
      (Array(0., dtype=float32), Array(1., dtype=float32))

    Source: Zhang et al. 2025, arXiv 2506.05526 (the renormalised entropy).
    """
    plan = at_least_float32(as_floating("plan", plan))
    if plan.ndim != 2 or min(plan.shape) < 2:
        raise ValueError(
            f"plan must be [n, m] with n and m at least 2; got {plan.shape}. One point is paired "
            "with all others whatever the coupling."
        )
    if is_concrete(plan) and plan.is_fully_addressable and (least := np.asarray(plan).min()) < 0:
        raise ValueError(f"plan must not be negative; got {least}.")
    if is_concrete(plan) and plan.is_fully_addressable and not np.asarray(plan).any():
        raise ValueError("plan must hold some mass; got zeros alone.")
    plan = plan / jnp.sum(plan)
    of0, of1 = (jnp.sum(jax.scipy.special.entr(jnp.sum(plan, axis=axis))) for axis in (1, 0))
    both = jnp.sum(jax.scipy.special.entr(plan))
    # Rounding may leave a number below 0 or above 1 by 1e-7.
    return jnp.clip(1 - (of0 + of1 - both) / jnp.minimum(of0, of1), 0, 1)


def _ott() -> tuple[Any, Any]:
    """OTT's geometry and solvers: late, since to import them takes seconds."""
    try:
        from ott.geometry import geometry
        from ott.solvers import linear
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Entropic plans need OTT-JAX; got {error}. pip install 'fmjax[ot]' brings it."
        ) from error
    return geometry, linear


def _relative(tau: float, epsilon: float) -> float:
    """OTT's tau, tau / (tau + epsilon); 1 keeps a marginal."""
    return 1.0 if math.isinf(tau) else tau / (tau + epsilon)


def check(epsilon: Any, max_iterations: int, threshold: float) -> None:
    for name, value, fix in (
        ("epsilon", epsilon, "0.05 times the variance of the points is small."),
        ("max_iterations", max_iterations, "2000 is usual."),
        ("threshold", threshold, "1e-3 is usual."),
    ):
        number = known_number(value)
        if number is None or not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive, finite number; got {kind(value)}. {fix}")


def check_taus(tau0: float, tau1: float) -> None:
    for name, tau in (("tau0", tau0), ("tau1", tau1)):
        number = known_number(tau)
        if number is None or not number > 0:
            raise ValueError(
                f"{name} must be positive, or infinite to keep the weights; got {kind(tau)}."
            )


def as_weights(name: str, weights: Any, num: int | None = None) -> jax.Array:
    """Weights `[num]`, refused where they are none."""
    weights = at_least_float32(as_floating(name, weights))
    if weights.ndim != 1 or num not in (None, len(weights)):
        raise ValueError(
            f"{name} must be [{'num' if num is None else num}], one for each point; got "
            f"{weights.shape}."
        )
    if is_concrete(weights) and weights.is_fully_addressable:
        known = np.asarray(weights)
        bad = ~(np.isfinite(known) & (known >= 0))
        if bad.any() or not known.any():
            got = known[np.argmax(bad)] if bad.any() else "zeros alone"
            raise ValueError(f"{name} must be finite, 0 or more, and not all zero; got {got}.")
    return weights


def _check_sums(a: jax.Array, b: jax.Array, tau0: float, tau1: float) -> None:
    """Refuses weights that no plan has for its marginals."""
    if math.isinf(tau0) and math.isinf(tau1) and is_concrete(a, b):
        sums = float(np.asarray(a).sum()), float(np.asarray(b).sum())
        if not math.isclose(*sums, rel_tol=1e-4):
            raise ValueError(
                f"weights0 and weights1 must have one sum; got {sums[0]:g} and {sums[1]:g}. A "
                "finite tau0 or tau1 lets mass appear; or divide each by its sum."
            )
