"""Networks that predict x1, x0 or a preconditioned output, as velocities.

A velocity is u = alpha'(t) x1 + sigma'(t) x0 with its predictions x1 and x0, the expectations of
the data and of the source given x_t, which determine one another by x_t = alpha x1 + sigma x0:

    from_x1:  x0 = (x_t - alpha x1) / max(sigma, floor)        from a network for the data
    from_x0:  x1 = (x_t - sigma x0) / max(alpha, floor)        from a network for the noise

Above the floor these are `x1_to_velocity` and `x0_to_velocity`. Below it the prediction that is
derived is too small by the factor sigma / floor (alpha / floor), and nothing else changes: the
error of u is sigma' x0 (1 - sigma / floor), which vanishes with x0 at the data, and
alpha' x1 (1 - alpha / floor), of the size of the data's mean at the source.

`precondition` takes the best linear velocity for data of a given standard deviation S out of the
network and scales what is left to unit variance. With q = alpha^2 S^2 + sigma^2 and
W = alpha' sigma - alpha sigma',

    u(t, x) = (alpha' alpha S^2 + sigma' sigma) / q x + W S / sqrt(q) F(t, x / sqrt(q)).

Sources: Ho et al. 2020, arXiv 2006.11239 (noise prediction); Li and He 2025, arXiv 2511.13720
(prediction of x1 with a floor); Karras et al. 2022, arXiv 2206.00364 (preconditioning).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, broadcast_time, check_number, checked
from .affine import (
    AffinePath,
    check_path,
    combine,
    refuse_singular,
    scaled,
    schedule,
    schedule_with_w,
)
from .conversions import convert

Predictor = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)  # a tuple can't be given to jax.jit as a function
class PredictedVelocity:
    """The velocity u = alpha' x1 + sigma' x0 of predictions x1 and x0, which it keeps.

    It is a `Velocity`, called as `(t, x) -> u`. `change_path` takes its predictions instead of u,
    since they stay finite where u does not (`vp` at t = 1). A function around it, guidance for
    instance, hides them: guide the network instead, before `from_x0` or `from_x1`.

    Attributes:
      path: the path, whose alpha' and sigma' make the velocity.
      predict: `(t, x) -> (x1, x0)`, both `[batch, *event]` as x.
    """

    path: AffinePath
    predict: Predictor

    def __call__(self, t: jax.Array, x: jax.Array) -> jax.Array:
        t, _, _, alpha_dot, sigma_dot = schedule(self.path, t)
        broadcast_time(t, x)  # a wrong shape is named before a singular value
        refuse_singular("the velocity", t, alpha_dot, sigma_dot)
        x1, x0 = self.predict(t, x)
        return combine(alpha_dot, x1, sigma_dot, x0)


def from_x1(path: AffinePath, f: Velocity, *, floor: float) -> PredictedVelocity:
    """The velocity of a network that predicts the data: u = alpha' x1 + sigma' x0.

    x1 = f(t, x) and x0 = (x - alpha x1) / max(sigma, floor). Training and sampling use the same
    velocity; above the floor `cfm_loss` of it is the squared error of f times (W / sigma)^2.

    Args:
      path: the path.
      f: `(t, x) -> x1`, called as a velocity is.
      floor: the sigma below which x0 is no longer divided by it, 0.05 for instance. With 0 the
        velocity has no value where sigma = 0, at t = 1 on most paths.

    Returns:
      A velocity `(t, x) -> u`, whose `predict(t, x)` is (x1, x0). On `vp` and `linear_vp`, where
      sigma' is infinite, it has no value at t = 1 whatever the floor; its predictions have.

    Raises:
      ValueError: if `path` is none, `f` can't be called, or `floor` is no number from 0 on; by the
        velocity, if f returns another shape than that of x, or at a concrete t without a value.

    Example:
      >>> from fmjax.paths.schedules import cond_ot
      >>> velocity = from_x1(cond_ot(), lambda t, x: jnp.ones_like(x), floor=0.05)
      >>> velocity(jnp.array(0.5), jnp.zeros((1, 2)))
      Array([[2., 2.]], dtype=float32)

    Source: arXiv 2511.13720, whose floor scales both terms of u and so makes u wrong by
    alpha' x1 (1 - sigma / floor) below it.
    """
    return _from("x1", path, f, floor)


def from_x0(path: AffinePath, f: Velocity, *, floor: float) -> PredictedVelocity:
    """The velocity of a network that predicts the source: u = alpha' x1 + sigma' x0.

    x0 = f(t, x), DDPM's epsilon, and x1 = (x - sigma x0) / max(alpha, floor).

    Args:
      path: the path.
      f: `(t, x) -> x0`, called as a velocity is.
      floor: the alpha below which x1 is no longer divided by it, 1e-3 for instance. With 0 the
        velocity has no value where alpha = 0: at t = 0, where every solve begins, on all paths but
        `vp`, whose alpha(0) is 0.0066.

    Returns:
      A velocity `(t, x) -> u`, whose `predict(t, x)` is (x1, x0). On `vp` and `linear_vp`, where
      sigma' is infinite, it has no value at t = 1 whatever the floor; its predictions have, so that
      `change_path` of it to `cond_ot()` is finite at both ends.

    Raises:
      ValueError: as `from_x1` does.

    Source: arXiv 2006.11239.
    """
    return _from("x0", path, f, floor)


def _from(which: str, path: AffinePath, f: Velocity, floor: float) -> PredictedVelocity:
    check_path(path)
    function = checked(f, what="f")
    check_number("floor", floor, "0.05 is usual for x1, 1e-3 for x0")

    def predict(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = as_batch("x", x)
        t, alpha, sigma, *_ = schedule(path, t)
        known, other = (alpha, sigma) if which == "x1" else (sigma, alpha)
        scale = 1 / jnp.maximum(other, floor)
        fix = f"A floor above 0 bounds 1 / {'sigma' if which == 'x1' else 'alpha'}."
        broadcast_time(t, x)
        refuse_singular(f"from_{which}", t, scale, fix=fix)
        given = function(t, x).astype(x.dtype)
        derived = combine(scale, x, -known * scale, given)
        return (given, derived) if which == "x1" else (derived, given)

    return PredictedVelocity(path, predict)


def predictor(name: str, path: AffinePath, velocity: Velocity) -> Predictor:
    """The predictions (x1, x0) of a velocity along `path`: those that it keeps, else converted."""
    if isinstance(velocity, PredictedVelocity):
        return velocity.predict
    function = checked(velocity)

    def predict(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        t, alpha, sigma, alpha_dot, sigma_dot, w = schedule_with_w(path, t)
        fix = "A velocity made by from_x0 or from_x1 has predictions there."
        broadcast_time(t, x)
        refuse_singular(name, t, sigma_dot / w, alpha_dot / w, fix=fix)
        u = function(t, x)
        x1 = convert(name, t, -sigma_dot / w, x, sigma / w, u)
        return x1, convert(name, t, alpha_dot / w, x, -alpha / w, u)

    return predict


def precondition(path: AffinePath, f: Velocity, data_std: float) -> Velocity:
    """The velocity of a network F whose inputs and targets have unit variance.

    u(t, x) = (alpha' alpha S^2 + sigma' sigma) / q x + W S / sqrt(q) F(t, x / sqrt(q)), with
    q = alpha^2 S^2 + sigma^2. Where F = 0 it is the exact velocity to N(0, S^2 I), the best linear
    one for centred data. On `cosine()` with S = 1 it is (pi / 2) F(t, x): F is then the network
    of EDM at sigma = S_EDM / tan(pi t / 2), x being EDM's scaled input and x1 its data divided by
    S_EDM.

    Args:
      path: the path.
      f: the network F, `(t, x) -> [batch, *event]`.
      data_std: S, the standard deviation of the data, around a mean of 0.

    Returns:
      A velocity `(t, x) -> u`.

    Raises:
      ValueError: if `path` is none, `f` can't be called, or `data_std` is not positive; by the
        velocity, if f returns another shape than that of x, or at a concrete t at which the path is
        singular.

    Example:
      >>> from fmjax.paths.schedules import cond_ot
      >>> velocity = precondition(cond_ot(), lambda t, x: jnp.zeros_like(x), data_std=0.5)
      >>> velocity(jnp.array(0.0), jnp.ones((1, 2)))
      Array([[-1., -1.]], dtype=float32)

    Source: arXiv 2206.00364, section 5 and table 1.
    """
    check_path(path)
    function = checked(f, what="f")
    check_number("data_std", data_std, "0.5 is usual for images in [-1, 1]", positive=True)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        t, alpha, sigma, alpha_dot, sigma_dot, w = schedule_with_w(path, t)
        q = (alpha * data_std) ** 2 + sigma**2
        skip = (alpha_dot * alpha * data_std**2 + sigma_dot * sigma) / q
        scale, inner = w * data_std / jnp.sqrt(q), 1 / jnp.sqrt(q)
        broadcast_time(t, x)
        refuse_singular("precondition", t, skip, scale, inner)
        return combine(skip, x, scale, function(t, scaled(inner, x)))

    return velocity
