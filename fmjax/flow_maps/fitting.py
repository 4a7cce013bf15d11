"""Fits a non-stationary solver to the exact end points of a flow, by Levenberg-Marquardt.

The numbers theta of a solver are fitted to pairs (x0, x1), x1 = phi(0, 1, x0):

    min over theta of  rms(theta)^2 = mean over pairs and coordinates of |x_n(theta, x0) - x1|^2,

with theta = (z, a, b): t_i = t_0 + (1 - t_0) sum_{k <= i} softmax(z, 0)_k keeps times in order.

There are few numbers and many residuals r. All that the method asks about the Jacobian J `[number
of residuals, P]` is in the triangle R of the QR decomposition of (J, r): with R = (S, s; 0, d) and
the residual (s, d) of length P + 1 every norm, gradient and step is the same. J itself is taken in
forward mode, a few columns in parallel: reverse mode would keep the activations of n evaluations.
A number of step i is felt from the next evaluation on, so that of n P columns a third is computed.
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.flatten_util import ravel_pytree

from ..types import Velocity, as_batch, check_same_shape, checked, kind, wider
from .solvers import NonStationary, check_solver


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

    Every step costs about n^3 / 6 + n^2 directional derivatives of the velocity on the whole batch,
    140 at n = 8. Wrap it in `jax.jit`, the parameters of the velocity being an argument.

    Args:
      velocity: `(t, x) -> u`; what it closes over may be of the batch of `x0`, labels for instance.
      solver: where the fit starts, `from_euler(8)` or `from_midpoint(8)`; its t_0 stays.
      x0: source samples, `[num, *event]`.
      x1: the exact end points, `[num, *event]`, as `flow_pairs` gives them.
      num_steps: of Levenberg and Marquardt's method.
      num_held_out: the last so many pairs are not fitted but decide which step was best.
      num_columns: of the Jacobian in parallel. Memory is that of so many batches in the network,
        and of n P batches of `x0`.

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

    residual = _compressed(velocity, to_solver, (x0, x1), num_fitted, num_columns)
    thetas, rms, held_out_rms = _levenberg_marquardt(residual, theta, num_steps)
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


def _compressed(velocity: Any, to_solver: Any, data: Any, num_fitted: int, size: int) -> Any:
    """`theta -> (residual [P + 1], (rms, held-out rms))`, whose derivative comes with its value.

    The residuals' squares sum to the mean square of the fitted pairs.
    """
    x0, x1 = data

    def triangle(theta: jax.Array) -> tuple[jax.Array, Any]:
        solver = to_solver(theta)
        end, moved = _end_and_derivatives(velocity, solver, x0, size)
        # By the solver's numbers, then by theta, in which the times are not free.
        inner = jax.jacfwd(lambda theta: _in_order(to_solver(theta)))(theta)
        apart = (end - x1)[None]
        fitted = [part[:, :num_fitted].reshape(len(part), -1) for part in (moved, apart)]
        scale = jnp.sqrt(jnp.asarray(fitted[1].size, theta.dtype))
        columns = jnp.matmul(inner.T, fitted[0], precision=jax.lax.Precision.HIGHEST)
        r = jnp.linalg.qr(jnp.concatenate([columns, fitted[1]]).T / scale, mode="r")
        rms = jnp.linalg.norm(fitted[1]) / scale
        rest = apart[0, num_fitted:]
        return r, (rms, jnp.sqrt(jnp.mean(jnp.square(rest))) if rest.size else rms)

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


def _places(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where t_i `[n]`, a_i `[n]` and b_ij `[n, n]` are among the numbers of `_in_order`.

    In the order in which they are first felt, so that the derivatives of x_i are zero from a known
    place on: a_0, b_00; t_1, a_1, b_10, b_11; ... t_0 is not among them.
    """
    t, a, b, place = np.zeros(n, int), np.zeros(n, int), np.zeros((n, n), int), 0
    for i in range(n):
        if i:
            t[i], place = place, place + 1
        a[i], b[i, : i + 1] = place, place + 1 + np.arange(i + 1)
        place += i + 2
    return t, a, b


def _in_order(solver: NonStationary) -> jax.Array:
    """The numbers of a solver, `[P]`, in the order of `_places`."""
    n = len(solver.ts)
    t, a, b = _places(n)
    below = np.tril_indices(n)
    numbers = jnp.concatenate([solver.ts[1:], solver.a, solver.b[below]])
    return numbers[np.argsort(np.concatenate([t[1:], a, b[below]]))]


def _end_and_derivatives(
    velocity: Any, solver: NonStationary, x0: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """x_n and its derivatives by the numbers of `_in_order`, `[P, *x0.shape]`, in forward mode.

    Of every evaluation only those columns are taken that are not zero there, a third of all.
    """
    ts, a, b = solver
    n = len(ts)
    t_place, a_place, b_place = (jnp.asarray(part) for part in _places(n))
    num = 2 * n - 1 + n * (n + 1) // 2
    padded = -(-num // size) * size

    def slope(i: jax.Array, x: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
        """u_i and its derivatives, `size` columns in parallel."""
        active = jnp.where(i > 0, t_place[i] + 1, 0)  # t_i is the last that is felt

        def columns(k: jax.Array, found: Any) -> Any:
            begin = k * size
            in_t = (begin + jnp.arange(size) == t_place[i]) & (i > 0)
            tangents = in_t.astype(x.dtype), jax.lax.dynamic_slice_in_dim(moved, begin, size)

            def column(dt: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array]:
                return jax.jvp(velocity, (ts[i], x), (dt, dx))

            u, part = jax.vmap(column, out_axes=(None, 0))(*tangents)
            return u, jax.lax.dynamic_update_slice_in_dim(found[1], part, begin, 0)

        # At t_0 nothing is felt, but u_0 is needed.
        rounds = jnp.maximum(1, -(-active // size))
        return jax.lax.fori_loop(0, rounds, columns, (x, jnp.zeros_like(moved)))

    def step(carry: Any, i: jax.Array) -> Any:
        x, moved, slopes, slopes_moved = carry
        u, u_moved = slope(i, x, moved)
        slopes, slopes_moved = slopes.at[i].set(u), slopes_moved.at[i].set(u_moved)
        dot = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        x, moved = a[i] * x0 + dot(b[i], slopes), dot(b[i], slopes_moved)
        moved = moved.at[a_place[i]].set(x0)
        # A b_ij with j > i is not there: its place is out of range, and nothing is set.
        own = jnp.where(jnp.arange(n) <= i, b_place[i], padded)
        return (x, moved.at[own].set(slopes, mode="drop"), slopes, slopes_moved), None

    zeros = [jnp.zeros((*shape, *x0.shape), x0.dtype) for shape in ((padded,), (n,), (n, padded))]
    (x, moved, _, _), _ = jax.lax.scan(step, (x0, *zeros), jnp.arange(n))
    return x, moved[:num]


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
