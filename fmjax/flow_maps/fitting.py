"""Fits a non-stationary solver to the exact end points of a flow, by Levenberg-Marquardt.

The numbers theta of a solver are fitted to pairs (x0, x1), x1 = phi(0, 1, x0):

    min over theta of  rms(theta)^2 = mean over pairs and coordinates of |x_n(theta, x0) - x1|^2,

with theta = (z, a, b): t_i = t_0 + (1 - t_0) sum_{k <= i} softmax(z, 0)_k keeps times in order.

There are few numbers and many errors e = x_n - x1 `[num, *event]`. Of every pair `num_projections`
residuals stand for all: s . e with fixed random signs s, whose mean square over signs is |e|^2;
where the event has no more coordinates than that, they are the coordinates and nothing is lost. One
backward pass per projection gives all derivatives, since every example is handed theta as its own:
the gradient of the sum is a row of the Jacobian J for each example.

All that the method asks about J `[number of residuals, P]` is in the triangle R of the QR
decomposition of (J, r): with R = (S, s; 0, d) and the residual (s, d) of length P + 1 every norm,
gradient and step is the same.
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

from ..types import Velocity, as_batch, check_same_shape, checked, is_concrete, kind, wider
from .solvers import NonStationary, check_solver


class FittedSolver(NamedTuple):
    """A solver that was fitted, and how.

    Attributes:
      solver: the best of all steps on the held-out pairs, or on all where none are held out.
      rms: of the fitted pairs after 0, 1, ... steps, `[num_steps + 1]`, in units of x. A step that
        does not pay, by the projections, is taken back.
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
    num_projections: int = 2,
) -> FittedSolver:
    """Fits the times and coefficients of a solver, so that it ends where the flow does.

    Every step costs n evaluations of the velocity, and n backward passes through it for each
    projection, in the memory of 3 n batches and one such pass. Wrap it in `jax.jit`, the
    parameters of the velocity being an argument.

    Args:
      velocity: `(t, x) -> u`, with t `[batch]`, as in training; what it closes over may be of the
        batch of `x0`, labels for instance.
      solver: where the fit starts, `from_euler(8)` or `from_midpoint(8)`; its t_0 stays.
      x0: source samples, `[num, *event]`.
      x1: the exact end points, `[num, *event]`, as `flow_pairs` gives them.
      num_steps: of Levenberg and Marquardt's method.
      num_held_out: the last so many pairs are not fitted but decide which step was best.
      num_projections: residuals of every pair.

    Returns:
      `FittedSolver(solver, rms, held_out_rms)`. The solver is never worse than the start.

    Raises:
      ValueError: as `apply_solver` does; if `x1` has another shape than `x0`; if a number is no
        whole number in its range; if the fitted pairs have fewer residuals than the solver numbers;
        for pairs that are known not to be finite. Traced ones give a solver of NaN.

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
    if is_concrete(x0, x1) and not all(np.isfinite(np.asarray(x)).all() for x in (x0, x1)):
        raise ValueError("x0 and x1 must be finite; got pairs that are not. Leave them out.")
    theta, to_solver = _coordinates(NonStationary(*(jnp.asarray(p, dtype) for p in solver)))
    _check_numbers(num_steps, num_held_out, num_projections)
    num_fitted = len(x0) - num_held_out
    _check_enough(num_fitted * min(math.prod(x0.shape[1:]), num_projections), theta.size)
    velocity = checked(velocity, dtype)

    residual = _compressed(velocity, to_solver, (x0, x1), num_fitted, num_projections)
    thetas, rms, held_out_rms = _levenberg_marquardt(residual, theta, num_steps)
    best = thetas[jnp.nanargmin(held_out_rms)]
    finite = jnp.isfinite(x0).all() & jnp.isfinite(x1).all()
    return FittedSolver(to_solver(jnp.where(finite, best, jnp.nan)), rms, held_out_rms)


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

    The residuals' squares sum to what is minimised.
    """
    x0, x1 = data
    axes, dim = tuple(range(1, x0.ndim)), math.prod(x0.shape[1:])
    directions = _directions(x0, num_fitted, size)
    scale = math.sqrt(num_fitted * (dim if len(directions) == dim else dim * size))

    def triangle(theta: jax.Array) -> tuple[jax.Array, Any]:
        thetas = jnp.broadcast_to(theta, (len(x0), theta.size))
        end, pullback = jax.vjp(lambda thetas: _ends(velocity, to_solver, thetas, x0), thetas)
        apart = end - x1

        def rows(direction: jax.Array) -> jax.Array:
            """The errors along a direction and their derivatives, `[num_fitted, P + 1]`."""
            along = jnp.sum(direction * apart, axis=axes)[:num_fitted, None]
            return jnp.concatenate([pullback(direction)[0][:num_fitted], along], axis=1)

        found = jax.lax.map(rows, directions).reshape(-1, theta.size + 1)
        r = jnp.linalg.qr(found / scale, mode="r")
        fitted, rest = (jnp.square(part) for part in (apart[:num_fitted], apart[num_fitted:]))
        rms = jnp.sqrt(jnp.mean(fitted))
        return r, (rms, jnp.sqrt(jnp.mean(rest)) if rest.size else rms)

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


def _directions(x0: jax.Array, num_fitted: int, num: int) -> jax.Array:
    """What errors are projected on, `[num, *x0.shape]`: the axes where they are as few, else signs.

    Held-out pairs have none.
    """
    dim, known = math.prod(x0.shape[1:]), jnp.arange(len(x0)) < num_fitted
    if dim <= num:
        found = jnp.eye(dim, dtype=x0.dtype).reshape(dim, 1, *x0.shape[1:])
    else:
        found = jax.random.rademacher(jax.random.key(0), (num, *x0.shape), x0.dtype)
    return found * known.reshape(1, -1, *[1] * (x0.ndim - 1)).astype(x0.dtype)


def _ends(velocity: Any, to_solver: Any, thetas: jax.Array, x0: jax.Array) -> jax.Array:
    """x_n of every example by a solver of its own, whose numbers are `thetas [num, P]`."""
    ts, a, b = jax.vmap(to_solver, out_axes=-1)(thetas)  # the examples' axis last
    velocity = jax.checkpoint(velocity)  # else the backward pass keeps n of them

    def times(weights: jax.Array, x: jax.Array) -> jax.Array:
        return weights.reshape(weights.shape + (1,) * (x0.ndim - 1)) * x

    # Every slope is added to all states that it is a part of, and need not be kept itself.
    def step(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> Any:
        x, sums = carry
        sums += times(b[:, i], velocity(ts[i], x)[None])
        return (times(a[i], x0) + sums[i], sums), None

    sums = jnp.zeros((len(ts), *x0.shape), x0.dtype)
    (x, _), _ = jax.lax.scan(step, (x0, sums), jnp.arange(len(ts)))
    return x


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


def _check_numbers(steps: int, held_out: int, projections: int) -> None:
    for name, value, least in (
        ("num_steps", steps, 1),
        ("num_held_out", held_out, 0),
        ("num_projections", projections, 1),
    ):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
            raise ValueError(
                f"{name} must be a whole number from {least} on; got {kind(value)}. The defaults "
                "are 30 steps, 0 pairs and 2 projections."
            )


def _check_enough(num_residuals: int, size: int) -> None:
    if num_residuals < size:
        raise ValueError(
            "The pairs that are fitted must have at least as many residuals as the solver has "
            f"numbers; got {max(num_residuals, 0)} and {size}. Give more pairs or projections, or "
            "hold out fewer."
        )
