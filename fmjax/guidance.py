"""Guidance: functions from velocities to a velocity, and the dropping of labels that it needs.

The score of p(x | c)^scale p(x)^(1 - scale) is a straight combination of two scores, and for an
affine path and independent pairs so is the velocity: u + scale (c - u), with c the conditional
velocity and u the unconditional one. That holds at each t for the densities p_t on the way; the
densities in which the guided flow ends are others. For scalar Gaussians with a source of standard
deviation 1 and sigma(1) = 0, standard deviations tau_c and tau_u and means m_c and m_u, it ends in
a Gaussian of standard deviation

    tau_c^w tau_u^(1 - w),        not  (w / tau_c^2 + (1 - w) / tau_u^2)^(-1/2),

and, where tau_c = tau_u, of mean m_u + w (m_c - m_u). For other spreads the mean is that standard
deviation times the integral over r from 0 to infinity of

    [w m_c / (1 + r^2 tau_c^2) + (1 - w) m_u / (1 + r^2 tau_u^2)]
        (1 + r^2 tau_c^2)^(-w / 2) (1 + r^2 tau_u^2)^((w - 1) / 2).

A network learns u beside c where labels are dropped in training, each example's by itself.

Source: Ho and Salimans 2022, arXiv 2207.12598; Zheng et al. 2023, arXiv 2311.13443.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .types import (
    Velocity,
    as_array,
    as_floating,
    broadcast_time,
    check_velocity,
    checked,
    is_concrete,
    wider,
)


def classifier_free_guidance(
    conditional: Velocity, unconditional: Velocity, scale: float | jax.Array
) -> Velocity:
    """Classifier-free guidance: u + scale (c - u).

    Args:
      conditional: velocity with its condition closed over, `c`.
      unconditional: velocity of the null condition, `u`.
      scale: 0 is unconditional, 1 conditional, above 1 guided. A number or an array `[]`, or
        `[batch]`, one for each example.

    Returns:
      A velocity `(t, x) -> u`; each call costs one of either.

    Raises:
      ValueError: by the velocity, if `scale` is neither `[]` nor `[batch]`, or a branch returns
        another shape than that of x.

    Example:
      >>> velocity = classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, 3.0)

    Source: Ho and Salimans 2022, arXiv 2207.12598; Zheng et al. 2023, arXiv 2311.13443.
    """
    guided = checked(conditional, what="the conditional velocity")
    plain = checked(unconditional, what="the unconditional velocity")
    scale = _as_scale(scale)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        return _combine(plain(t, x), guided(t, x), scale)

    return velocity


def batched_guidance(
    velocity: Callable[[jax.Array, jax.Array, Any], Any],
    condition: Any,
    null: Any,
    scale: float | jax.Array,
) -> Velocity:
    """Classifier-free guidance in one call of a network on twice the batch.

    Equal to `classifier_free_guidance` for a network whose examples don't influence each other:
    half the calls, each on [x; x] with the conditions [condition; null].

    Args:
      velocity: `(t, x, condition) -> u`, with one condition for each row of x.
      condition: an array or a pytree of arrays, each `[batch, ...]`; labels `[batch]`, say.
      null: the null condition that the network was trained with: the same structure, each leaf
        `[batch, ...]`, or without the batch axis, one for all. For the labels of `models.UNet` and
        `models.MLP` it is `num_classes`.
      scale: as in `classifier_free_guidance`.

    Returns:
      A velocity `(t, x) -> u` for batches of as many rows as the condition.

    Raises:
      ValueError: if the structures of condition and null, or the shapes of their leaves, disagree;
        by the velocity, if x has another number of rows, and as `classifier_free_guidance` does.

    Example:
      >>> def network(t, x, labels):
      ...     return x * labels[:, None]
      >>> guided = batched_guidance(network, jnp.array([2.0]), 1.0, scale=3.0)
      >>> guided(jnp.array(0.5), jnp.ones((1, 2)))
      Array([[4., 4.]], dtype=float32)
    """
    check_velocity("velocity", velocity, "(t, x, condition) -> u")
    scale, both = _as_scale(scale), _stack(condition, null)
    num_rows = len(jax.tree.leaves(both)[0]) // 2

    def guided(t: jax.Array, x: jax.Array) -> jax.Array:
        if np.shape(x)[:1] != (num_rows,):
            raise ValueError(
                f"x must have one row for each of the {num_rows} conditions; got {np.shape(x)}. "
                "Where examples are solved one by one, close over one condition."
            )
        twice = jnp.concatenate([t, t]) if np.ndim(t) else t
        network = checked(lambda t, x: velocity(t, x, both), what="the velocity")
        c, u = jnp.split(network(twice, jnp.concatenate([x, x])), 2)
        return _combine(u, c, scale)

    return guided


def guidance_interval(
    guided: Velocity, plain: Velocity, t_lo: float | jax.Array, t_hi: float | jax.Array
) -> Velocity:
    """Guidance for a part of the time alone: `guided` for t_lo <= t <= t_hi, else `plain`.

    A solver's time costs a call of one of the two. The velocity jumps at both ends, where equal
    steps lose their order; an adaptive solver is told of them by
    `diffrax.ClipStepSizeController(controller, jump_ts=[t_lo, t_hi])`.

    Args:
      guided: velocity within the interval.
      plain: velocity outside it, the conditional one as a rule.
      t_lo: where it begins, in [0, 1]; time runs from the noise to the data.
      t_hi: where it ends, in [t_lo, 1].

    Returns:
      A velocity `(t, x) -> u`.

    Raises:
      ValueError: if the ends are not 0 <= t_lo <= t_hi <= 1.

    Example:
      >>> velocity = guidance_interval(lambda t, x: 2 * x, lambda t, x: x, 0.2, 0.8)

    Source: Kynkaanniemi et al. 2024, arXiv 2404.07724.
    """
    if np.ndim(t_lo) or np.ndim(t_hi):
        raise ValueError(
            f"The ends must be numbers, one for all; got {np.shape(t_lo)} and {np.shape(t_hi)}."
        )
    if is_concrete(t_lo, t_hi) and not 0 <= float(t_lo) <= float(t_hi) <= 1:
        raise ValueError(f"The ends must be 0 <= t_lo <= t_hi <= 1; got {t_lo} and {t_hi}.")
    inner, outer = checked(guided, what="guided"), checked(plain, what="plain")

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        def cast(branch: Velocity) -> Velocity:
            return lambda t, x: branch(t, x).astype(x.dtype)

        inside = (t >= t_lo) & (t <= t_hi)
        if np.ndim(t) == 0:
            return jax.lax.cond(inside, cast(inner), cast(outer), t, x)
        return jnp.where(broadcast_time(inside, x), cast(inner)(t, x), cast(outer)(t, x))

    return velocity


def autoguidance(main: Velocity, bad: Velocity, scale: float | jax.Array) -> Velocity:
    """Guidance of a model by a worse one of the same task: bad + scale (main - bad).

    Needs no labels: `bad` is a smaller network, or the same after fewer steps, under the same
    condition. For Gaussians with a bad model too wide by a factor b the spread shrinks by
    b^(1 - scale).

    Args:
      main: velocity of the model.
      bad: velocity of the worse one.
      scale: 1 is the model itself, above 1 guided. A number or an array `[]`, or `[batch]`.

    Returns:
      A velocity `(t, x) -> u`; each call costs one of either.

    Raises:
      ValueError: as `classifier_free_guidance` does.

    Example:
      >>> velocity = autoguidance(lambda t, x: 2 * x, lambda t, x: x, 2.0)

    Source: Karras et al. 2024, arXiv 2406.02507.
    """
    good, worse = checked(main, what="main"), checked(bad, what="bad")
    scale = _as_scale(scale)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        return _combine(worse(t, x), good(t, x), scale)

    return velocity


def drop_labels(key: jax.Array, labels: Any, null: Any, rate: float | jax.Array) -> Any:
    """Labels or other conditions of which a part, each with probability `rate`, is made null.

    Each example's is dropped or kept by itself, all leaves of a pytree together.

    Args:
      key: random key.
      labels: an array or a pytree of arrays, each `[batch, ...]`.
      null: the null condition: the same structure, each leaf without the batch axis or `[]`.
      rate: probability, in [0, 1]; 0.1 is usual.

    Returns:
      What `labels` is, in its dtypes.

    Raises:
      ValueError: if the rate is no probability, if structures or shapes disagree, or if a dtype of
        the labels can't hold the null.

    Example:
      >>> drop_labels(jax.random.key(0), jnp.array([3, 1, 4]), null=10, rate=1.0)
      Array([10, 10, 10], dtype=int32)

    Source: Ho and Salimans 2022, arXiv 2207.12598, algorithm 1.
    """
    if np.ndim(rate):
        raise ValueError(f"rate must be a number, one for all; got {np.shape(rate)}.")
    if is_concrete(rate) and not 0 <= float(rate) <= 1:
        raise ValueError(f"rate must be a probability in [0, 1]; got {rate}.")
    labels, null = _conditions(labels, null)
    num = len(jax.tree.leaves(labels)[0])
    dropped = jax.random.uniform(key, (num,)) < rate

    def drop(label: jax.Array, null: jax.Array) -> jax.Array:
        return jnp.where(broadcast_time(dropped, label), null, label)

    return jax.tree.map(drop, labels, null)


def _as_scale(scale: Any) -> jax.Array:
    scale = as_array("scale", scale)
    if jnp.issubdtype(scale.dtype, jnp.integer):
        scale = scale.astype(jnp.float32)
    return as_floating("scale", scale)


def _combine(u: jax.Array, c: jax.Array, scale: jax.Array) -> jax.Array:
    """u + scale (c - u), in at least float32 and then in the wider of the two dtypes."""
    if scale.ndim > 1 or (scale.ndim and scale.shape != u.shape[:1]):
        raise ValueError(
            "scale must be a number or [batch], one for each example; got "
            f"{scale.shape} for x {u.shape}."
        )
    dtype = wider(u.dtype, c.dtype)
    wide = wider(dtype, jnp.float32)
    u, c = u.astype(wide), c.astype(wide)
    return (u + broadcast_time(scale, u).astype(wide) * (c - u)).astype(dtype)


def _conditions(condition: Any, null: Any) -> tuple[Any, Any]:
    """Conditions and their null, leaf by leaf arrays of one dtype that broadcast over the batch."""
    leaves, tree = jax.tree.flatten(condition)
    nulls, null_tree = jax.tree.flatten(null)
    if tree != null_tree or not leaves:
        raise ValueError(
            "The condition and its null must be pytrees of one structure, and not empty; got "
            f"{tree} and {null_tree}."
        )
    arrays = [_held("condition", leaf) for leaf in leaves]
    sizes = {leaf.shape[:1] for leaf in arrays}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "The leaves of a condition must share their batch axis, [batch, ...]; got "
            f"{[leaf.shape for leaf in arrays]}."
        )
    found = [_null(leaf, value) for leaf, value in zip(arrays, nulls, strict=True)]
    return jax.tree.unflatten(tree, arrays), jax.tree.unflatten(tree, found)


def _held(what: str, value: Any) -> jax.Array:
    """`as_array` that refuses whole numbers which JAX would cut to its 32 bits."""
    array = as_array(what, value)
    if isinstance(value, np.ndarray | np.generic) and jnp.issubdtype(array.dtype, jnp.integer):
        if (np.asarray(array) != value).any():
            raise ValueError(f"{what} must be numbers that {array.dtype} holds; got {value}.")
    return array


def _null(leaf: jax.Array, value: Any) -> jax.Array:
    value = _held("null", value)
    if value.shape not in ((), leaf.shape[1:], leaf.shape):
        raise ValueError(
            f"null must have the shape [], {leaf.shape[1:]} or {leaf.shape}, as its condition; "
            f"got {value.shape}."
        )
    whole = not jnp.issubdtype(leaf.dtype, jnp.inexact)
    cut = whole and jnp.issubdtype(value.dtype, jnp.inexact)
    if is_concrete(value) and (whole or not jnp.issubdtype(value.dtype, jnp.inexact)):
        cast = np.asarray(value).astype(leaf.dtype)
        cut |= not np.array_equal(np.asarray(value, np.float64), np.asarray(cast, np.float64))
    if cut:
        raise ValueError(
            f"null must be a number that the condition's dtype can hold; got {value} for "
            f"{leaf.dtype}. labels.astype(jnp.int32) holds all classes and the null class."
        )
    return value.astype(leaf.dtype)


def _stack(condition: Any, null: Any) -> Any:
    """[condition; null] along the batch, leaf by leaf."""
    condition, null = _conditions(condition, null)
    return jax.tree.map(
        lambda leaf, null: jnp.concatenate([leaf, jnp.broadcast_to(null, leaf.shape)]),
        condition,
        null,
    )
