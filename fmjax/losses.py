"""The flow-matching loss: regression of a velocity on the conditional velocity of a path.

    loss = |v(t, x_t) - u_t|^2 / D,     averaged by the caller over t, x0 and x1.

Its gradient in the parameters of v is that of the regression on the marginal velocity, which
nobody can draw from (theorem 2 of Lipman et al. 2022, arXiv 2210.02747). The target along the
straight path x_t = (1 - t) x0 + t x1 is x1 - x0, not (x1 - x0) / t.
"""

import jax
import jax.numpy as jnp

from .types import PathSample, Velocity, as_batch, at_least_float32, check_same_shape, checked


def cfm_loss(velocity: Velocity, path_sample: PathSample) -> jax.Array:
    """Conditional flow matching: the mean square over the event of v(t, x_t) - u_t, per example.

    Args:
      velocity: `(t, x) -> u`, called once at `t` and `x_t`.
      path_sample: whatever makes one: `sample_path`, or a construction of one's own.

    Returns:
      `[batch]`, in at least float32. The caller weights, masks and averages.

    Raises:
      ValueError: if the velocity returns anything but a floating array of the shape of `u_t`.

    Example:
      >>> from fmjax import cond_ot, sample_path
      >>> x0, x1, t = jnp.zeros((4, 2)), jnp.ones((4, 2)), jnp.full(4, 0.5)
      >>> cfm_loss(lambda t, x: jnp.ones_like(x), sample_path(cond_ot(), x0, x1, t))
      Array([0., 0., 0., 0.], dtype=float32)

    Source: arXiv 2210.02747, equation 9.
    """
    x_t, u_t = as_batch("x_t", path_sample.x_t), as_batch("u_t", path_sample.u_t)
    check_same_shape("x_t and u_t", x_t, u_t)
    u_t = at_least_float32(u_t)
    error = checked(velocity, u_t.dtype)(path_sample.t, x_t) - u_t
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))
