"""The flow-matching loss: regression of a velocity on the conditional velocity of a path.

    loss = |v(t, x_t) - u_t|^2 / D,     averaged by the caller over t, x0 and x1.

Its gradient in the parameters of v is that of the regression on the marginal velocity, which
nobody can draw from (theorem 2 of Lipman et al. 2022, arXiv 2210.02747). The target along the
straight path x_t = (1 - t) x0 + t x1 is x1 - x0, not (x1 - x0) / t.
"""

import jax
import jax.numpy as jnp

from .types import PathSample, Velocity, check_same_shape, wider


def cfm_loss(velocity: Velocity, path_sample: PathSample) -> jax.Array:
    """Conditional flow matching: the mean square over the event of v(t, x_t) - u_t, per example.

    Args:
      velocity: `(t, x) -> u`, called once at `t` and `x_t`.
      path_sample: whatever makes one: `sample_path`, or a construction of one's own.

    Returns:
      `[batch]`, in at least float32. The caller weights, masks and averages.

    Raises:
      ValueError: if the velocity returns another shape than that of `u_t`.

    Example:
      >>> from fmjax import cond_ot, sample_path
      >>> x0, x1, t = jnp.zeros((4, 2)), jnp.ones((4, 2)), jnp.full(4, 0.5)
      >>> cfm_loss(lambda t, x: jnp.ones_like(x), sample_path(cond_ot(), x0, x1, t))
      Array([0., 0., 0., 0.], dtype=float32)

    Source: arXiv 2210.02747, equation 9.
    """
    prediction = velocity(path_sample.t, path_sample.x_t)
    check_same_shape("the velocity and its target u_t", prediction, path_sample.u_t)
    dtype = wider(path_sample.u_t.dtype, jnp.float32)
    error = prediction.astype(dtype) - path_sample.u_t.astype(dtype)
    return jnp.mean(jnp.square(error), axis=range(1, error.ndim))
