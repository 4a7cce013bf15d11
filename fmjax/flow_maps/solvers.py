"""Non-stationary solvers: every step has times and coefficients of its own, which can be learned.

With n evaluations of the velocity u a solver carries x_0 at t = 0 to x_n at t = 1 by

    x_{i+1} = a_i x_0 + sum_{j <= i} b_ij u(t_j, x_j),    i = 0..n-1.

Every explicit Runge-Kutta or multistep method on any grid is of this form, after a change of scale
and time too: a method of n evaluations is a point of this space, and `fit_solver` finds a better
one for a given velocity. With t_0 = 0 there are n - 1 + n + n (n + 1) / 2 numbers, 51 for n = 8,
fewer than 200 up to n = 17.

Source: Shaul et al. 2024, arXiv 2403.01329, section 3.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..types import Velocity, as_batch, as_floating, checked, is_concrete, kind, wider


class NonStationary(NamedTuple):
    """A solver of n evaluations: x_{i+1} = a_i x_0 + sum_{j <= i} b_ij u(t_j, x_j).

    Attributes:
      ts: times of the evaluations, `[n]`, increasing, in [0, 1).
      a: weights of the source sample, `[n]`.
      b: weights of the velocities, `[n, n]`; zero above the diagonal.
    """

    ts: jax.Array
    a: jax.Array
    b: jax.Array


def from_euler(num_evaluations: int) -> NonStationary:
    """Euler's method in equal steps: t_i = i / n, a_i = 1, b_ij = 1 / n.

    Args:
      num_evaluations: n, one for each step.

    Returns:
      The solver, in float32.

    Raises:
      ValueError: if `num_evaluations` is no whole number from 1 on.

    Example:
      >>> from_euler(2).b.tolist()
      [[0.5, 0.0], [0.5, 0.5]]
    """
    n = _count(num_evaluations)
    return _solver(np.tril(np.full((n, n), 1 / n)))


def from_midpoint(num_evaluations: int) -> NonStationary:
    """The midpoint method in n / 2 equal steps h = 2 / n of two evaluations each.

    x_{2k+1} = x_{2k} + h/2 u(t_{2k}, x_{2k}) and x_{2k+2} = x_{2k} + h u(t_{2k+1}, x_{2k+1}), with
    t_i = i / n.

    Args:
      num_evaluations: n, an even number.

    Returns:
      The solver, in float32.

    Raises:
      ValueError: if `num_evaluations` is no whole number from 1 on, or is odd.

    Example:
      >>> from_midpoint(2).b.tolist()
      [[0.5, 0.0], [0.0, 1.0]]
    """
    n = _count(num_evaluations)
    if n % 2:
        raise ValueError(
            f"num_evaluations must be even, two for each midpoint step; got {n}. Take {n + 1}, or "
            "from_euler."
        )
    # Whole steps up to each row, at the midpoints; a row that ends halfway adds half a step.
    b = np.tril(np.tile(np.arange(n) % 2 * (2 / n), (n, 1)))
    halfway = np.arange(0, n, 2)
    b[halfway, halfway] = 1 / n
    return _solver(b)


def apply_solver(velocity: Velocity, solver: NonStationary, x0: jax.Array) -> jax.Array:
    """The end point x_n of a solver, which approximates the flow's phi(0, 1, x0).

    Args:
      velocity: `(t, x) -> u`, evaluated n times, at times `[]`.
      solver: `NonStationary(ts, a, b)`.
      x0: source samples, `[batch, *event]`. The solve runs in their dtype, in float32 at least.

    Returns:
      `[batch, *event]`, in the dtype of `x0`.

    Raises:
      ValueError: as `check_solver` does, and if the velocity returns anything but a floating array
        of the shape of `x0`.

    Example:
      >>> apply_solver(lambda t, x: jnp.ones_like(x), from_euler(4), jnp.zeros((1, 2)))
      Array([[1., 1.]], dtype=float32)

    Source: arXiv 2403.01329, equation 12.
    """
    check_solver(solver)
    given = as_batch("x0", x0)
    dtype = wider(given.dtype, jnp.float32)
    ts, a, b = (jnp.asarray(part, dtype) for part in solver)
    velocity, x0 = checked(velocity, dtype), given.astype(dtype)

    # A scan: the velocity is compiled once. The slopes that are still to come are zero.
    def step(carry: tuple[jax.Array, jax.Array], i: jax.Array):
        x, slopes = carry
        slopes = slopes.at[i].set(velocity(ts[i], x))
        moved = jnp.tensordot(b[i], slopes, 1, precision=jax.lax.Precision.HIGHEST)
        return (a[i] * x0 + moved, slopes), None

    slopes = jnp.zeros((len(ts), *x0.shape), dtype)
    (x, _), _ = jax.lax.scan(step, (x0, slopes), jnp.arange(len(ts)))
    return x.astype(given.dtype)


def check_solver(solver: NonStationary) -> None:
    """Refuses what is no `NonStationary` solver, as far as its values are known.

    Args:
      solver: ts `[n]`, a `[n]` and b `[n, n]`.

    Raises:
      ValueError: if the shapes are of different numbers of evaluations; if ts do not increase or
        leave [0, 1); if b is not zero above the diagonal; if a number is not finite.

    Example:
      >>> check_solver(from_euler(3))
    """
    if not isinstance(solver, NonStationary):
        raise ValueError(
            "solver must be NonStationary(ts, a, b), as from_euler(8) is; got "
            f"{kind(solver)}. fm.sample takes the solvers of Diffrax."
        )
    ts, a, b = (as_floating(name, part) for name, part in zip("t a b".split(), solver, strict=True))
    n = ts.shape[0] if ts.ndim else 0
    if not n or ts.ndim != 1 or a.shape != (n,) or b.shape != (n, n):
        raise ValueError(
            "A solver of n evaluations has ts [n], a [n] and b [n, n]; got "
            f"{ts.shape}, {a.shape} and {b.shape}. For another number of evaluations fit another "
            "solver: its parts can't be cut or joined."
        )
    if not is_concrete(*solver):
        return
    ts, a, b = (np.asarray(part, np.float64) for part in (ts, a, b))
    if not (np.isfinite(ts).all() and np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(
            f"A solver's numbers must be finite; got {solver}. Start the fit from from_euler."
        )
    if ts[0] < 0 or ts[-1] >= 1 or (np.diff(ts) <= 0).any():
        raise ValueError(
            f"ts must increase within [0, 1); got {ts}. Sort them; equal times need one evaluation."
        )
    if np.triu(b, 1).any():
        raise ValueError(
            "b must be zero above its diagonal, since u(t_j, x_j) with j > i is not known at step "
            "i; got others. jnp.tril(b) cuts them off."
        )


def _count(num_evaluations: int) -> int:
    whole = isinstance(num_evaluations, int | np.integer) and not isinstance(num_evaluations, bool)
    if not whole or num_evaluations < 1:
        raise ValueError(
            f"num_evaluations must be a whole number from 1 on; got {kind(num_evaluations)}. 8 is "
            "usual."
        )
    return int(num_evaluations)


def _solver(b: np.ndarray) -> NonStationary:
    n = len(b)
    ts, a = jnp.arange(n, dtype=jnp.float32) / n, jnp.ones(n, jnp.float32)
    return NonStationary(ts, a, jnp.asarray(b, jnp.float32))
