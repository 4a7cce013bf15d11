"""The marginal velocity u_t(x) = E[u_t | x_t = x], exact for a finite data set.

It generates the data set (theorem 1 of the paper) and is the minimum of the flow-matching loss
(theorem 2): an oracle without a network.

Source: Lipman et al. 2022, arXiv 2210.02747, equation 8 and theorems 1 and 2.
"""

import jax
import jax.numpy as jnp

from ..types import Velocity, as_batch, broadcast_time, wider
from .affine import AffinePath, as_time, check_path, schedule
from .conversions import x1_to_velocity


def marginal_velocity(path: AffinePath, data: jax.Array) -> Velocity:
    """The exact velocity of the flow from a standard normal to a finite data set.

    u_t(x) = E[u_t | x_t = x], where the data point x1 has the posterior weight
    softmax(-|x - alpha x1|^2 / (2 sigma^2)). It generates the data set (theorem 1 of the paper)
    and is the minimum of the flow-matching loss (theorem 2): an oracle without a network.

    Args:
      path: the path. Where sigma(1) = 0 the velocity has no value at t = 1: for a solve up to
        t = 1 use a path that ends in some noise, such as `cond_ot(sigma_min=1e-2)`.
      data: `[num_data, *event]`.

    Returns:
      A velocity `(t, x) -> u`, `x` and `u` of shape `[batch, *event]`.

    Raises:
      ValueError: by the velocity, if the event shapes differ or as `x1_to_velocity` does.

    Source: arXiv 2210.02747, equation 8 and theorems 1 and 2.
    """

    data = as_batch("data", data)
    check_path(path)  # before a solve does

    def posterior_mean(
        alpha: jax.Array, sigma: jax.Array, x: jax.Array, data: jax.Array
    ) -> jax.Array:
        square_distance = jnp.sum(jnp.square(x[None] - alpha * data), range(1, data.ndim))
        weights = jax.nn.softmax(-square_distance / (2 * sigma**2))
        return jnp.tensordot(weights, data, 1, precision=jax.lax.Precision.HIGHEST)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        x = as_batch("x", x)
        if x.shape[1:] != data.shape[1:]:
            raise ValueError(
                "x and the data must have one event shape; got "
                f"{x.shape[1:]} and {data.shape[1:]}. Both have a leading batch axis."
            )
        dtype = wider(wider(x.dtype, data.dtype), jnp.float32)
        t = as_time(t).astype(dtype)
        broadcast_time(t, x)  # refuses a t that is neither [] nor [batch]
        alpha, sigma = (jnp.broadcast_to(a, x.shape[:1]) for a in schedule(path, t)[1:3])
        in_axes = (0, 0, 0, None)
        x1 = jax.vmap(posterior_mean, in_axes)(alpha, sigma, x.astype(dtype), data.astype(dtype))
        return x1_to_velocity(path, t, x, x1)

    return velocity
