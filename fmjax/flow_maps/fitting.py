"""Fits a non-stationary solver to the exact end points of a flow, by Levenberg-Marquardt.

The numbers theta of a solver are fitted to pairs (x0, x1), x1 = phi(0, 1, x0):

    min over theta of  rms(theta)^2 = mean over pairs and coordinates of |x_n(theta, x0) - x1|^2,

with theta = (z, a, b): t_i = t_0 + (1 - t_0) sum_{k <= i} softmax(z, 0)_k keeps times in order.

There are few numbers and many residuals r. All that the method asks about the Jacobian J `[number
of residuals, P]` is in the triangle R of the QR decomposition of (J, r): with R = (S, s; 0, d) and
the residual (s, d) of length P + 1 every norm, gradient and step is the same. J itself is taken by
forward mode, a few columns in parallel: reverse mode would keep the activations of n evaluations.
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optimistix as optx
from jax.flatten_util import ravel_pytree

from ..types import Velocity, as_batch, check_same_shape, checked, kind, wider
from .solvers import NonStationary, apply_solver, check_solver


class FittedSolver(NamedTuple):
    """A solver that was fitted, and how.

    Attributes:
      solver: the best of all steps on the held-out pairs, or on all where none are held out.
      rms: of the fitted pairs after 0, 1, ... steps, `[num_steps + 1]`, in units of x. It never
        rises: a step that does not pay is taken back.
      held_out_rms: of the held-out pairs, `[num_steps + 1]`; without any, as `rms`.
    """

    solver: NonStationary
    rms: jax.Array
    held_out_rms: jax.Array


def fit_solver(
    velocity: Velocity,
    solver: NonStationary,
    x0: jax.Array,
    x1: jax.Array,
    *,
    num_steps: int = 30,
    num_held_out: int = 0,
    num_columns: int = 4,
) -> FittedSolver:
    """Fits the times and coefficients of a solver, so that it ends where the flow does.

    Every step evaluates the velocity about 2 n P times on the whole batch, P being the number of
    coefficients. Wrap it in `jax.jit`, the parameters of the velocity being an argument.

    Args:
      velocity: `(t, x) -> u`; what it closes over may be of the batch of `x0`, labels for instance.
      solver: where the fit starts, `from_euler(8)` or `from_midpoint(8)`; its t_0 stays.
      x0: source samples, `[num, *event]`.
      x1: the exact end points, `[num, *event]`, as `flow_pairs` gives them.
      num_steps: of Levenberg and Marquardt's method.
      num_held_out: the last so many pairs are not fitted but decide which step was best.
      num_columns: of the Jacobian in parallel; memory is that of so many batches.

    Returns:
      `FittedSolver(solver, rms, held_out_rms)`. The solver is never worse than the start.

    Raises:
      ValueError: as `apply_solver` does; if `x1` has another shape than `x0`; if a number is no
        whole number in its range; if the fitted pairs have fewer coordinates than the solver.

    Example:
      >>> from fmjax.flow_maps import from_euler
      >>> x0 = jnp.array([[-1.0], [0.5], [2.0]])
      >>> fitted = fit_solver(lambda t, x: -x, from_euler(1), x0, x0 / jnp.e)
      >>> bool(fitted.rms[-1] < 1e-5)
      True

    Source: arXiv 2403.01329, algorithm 1, with another optimiser and no logarithm.
    """
    check_solver(solver)
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    dtype = wider(x0.dtype, jnp.float32)
    x0, x1 = x0.astype(dtype), x1.astype(dtype)
    num_fitted = len(x0) - num_held_out
    theta, to_solver = _coordinates(NonStationary(*(jnp.asarray(p, dtype) for p in solver)))
    _check_numbers(
        num_steps, num_held_out, num_columns, num_fitted * math.prod(x0.shape[1:]), theta.size
    )
    velocity = checked(velocity, dtype)

    def errors(theta: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Residuals whose squares sum to the mean square, and the held-out pairs' rms."""
        apart = apply_solver(velocity, to_solver(theta), x0) - x1
        fitted, rest = apart[:num_fitted].reshape(-1), apart[num_fitted:].reshape(-1)
        rms = jnp.sqrt(jnp.mean(jnp.square(rest if num_held_out else fitted)))
        return fitted / jnp.sqrt(jnp.asarray(fitted.size, dtype)), rms

    thetas, rms, held_out_rms = _levenberg_marquardt(
        _compressed(errors, num_columns), theta, num_steps
    )
    best = jnp.nanargmin(held_out_rms)
    return FittedSolver(to_solver(thetas[best]), rms, held_out_rms)


def _coordinates(solver: NonStationary) -> tuple[jax.Array, Any]:
    """Free coordinates theta `[P]` of a solver, and the way back from them."""
    n, t_0 = len(solver.ts), solver.ts[0]
    gaps = jnp.log(jnp.diff(solver.ts, append=jnp.ones_like(t_0)[None]))
    rows, columns = jnp.tril_indices(n)
    free = (gaps[:-1] - gaps[-1], solver.a, solver.b[rows, columns])
    theta, unravel = ravel_pytree(free)

    def to_solver(theta: jax.Array) -> NonStationary:
        logits, a, below = unravel(theta)
        shares = jax.nn.softmax(jnp.concatenate([logits, jnp.zeros_like(t_0)[None]]))
        ts = t_0 + (1 - t_0) * jnp.concatenate([jnp.zeros_like(a[:1]), jnp.cumsum(shares)[:-1]])
        return NonStationary(ts, a, jnp.zeros_like(solver.b).at[rows, columns].set(below))

    return theta, to_solver


def _compressed(errors: Any, num_columns: int) -> Any:
    """`theta -> (residual [P + 1], (rms, held-out rms))`, whose derivative comes with its value."""

    def triangle(theta: jax.Array) -> tuple[jax.Array, Any]:
        def column(tangent: jax.Array) -> jax.Array:
            return jax.jvp(lambda theta: errors(theta)[0], (theta,), (tangent,))[1]

        residual, held_out = errors(theta)
        eye = jnp.eye(theta.size, dtype=theta.dtype)
        columns = jax.lax.map(column, eye, batch_size=num_columns)
        r = jnp.linalg.qr(jnp.concatenate([columns, residual[None]]).T, mode="r")
        return r, (jnp.linalg.norm(residual), held_out)

    @jax.custom_jvp
    def compressed(theta: jax.Array) -> tuple[jax.Array, Any]:
        r, figures = triangle(theta)
        return r[:, -1], figures

    @compressed.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        r, figures = triangle(*primals)
        moved = jnp.matmul(r[:, :-1], tangents[0], precision=jax.lax.Precision.HIGHEST)
        return (r[:, -1], figures), (moved, jax.tree.map(jnp.zeros_like, figures))

    return compressed


def _levenberg_marquardt(
    residual: Any, theta: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All accepted points `[num_steps + 1, P]`, their rms and their held-out rms."""
    # Steps are counted, not judged: the tolerances play no part.
    method = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-6)

    def function(theta: jax.Array, args: Any) -> Any:
        return residual(theta)

    step = functools.partial(method.step, function, args=None, options={}, tags=frozenset())
    structure, figures = jax.eval_shape(residual, theta)
    state = method.init(function, theta, None, {}, structure, figures, frozenset())
    dynamic, static = eqx.partition(state, eqx.is_array)

    def body(carry: Any, _: Any) -> Any:
        theta, dynamic = carry
        theta, state, _ = step(theta, state=eqx.combine(dynamic, static))
        return (theta, eqx.filter(state, eqx.is_array)), (theta, *state.aux)

    _, found = jax.lax.scan(body, (theta, dynamic), length=num_steps + 1)
    return found


def _check_numbers(steps: int, held_out: int, columns: int, num_residuals: int, size: int) -> None:
    for name, value, least in (
        ("num_steps", steps, 1),
        ("num_held_out", held_out, 0),
        ("num_columns", columns, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name} must be a whole number from {least} on; got {kind(value)}. The defaults "
                "are 30 steps, 0 pairs and 4 columns."
            )
    if num_residuals < size:
        raise ValueError(
            "The pairs that are fitted must have at least as many coordinates as the solver has "
            f"numbers; got {max(num_residuals, 0)} and {size}. Give more pairs, or hold out fewer."
        )
