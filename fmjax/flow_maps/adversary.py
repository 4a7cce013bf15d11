"""An adversary on top of a generator: relativistic losses, a gradient penalty, a transport cost.

A discriminator D gives every example one number, larger for what looks real. Paired examples, a
real x and a generated G(z), have

    L_D = softplus(-(D(x) - D(G(z)))),      L_G = softplus(-(D(G(z)) - D(x))),

to both of which only the difference matters. The penalty g/2 (|grad D(x)|^2 + |grad D(G(z))|^2)
belongs to L_D; without it training does not converge. At the optimum D is constant and both losses
are log 2. It has many generators: all that map the source to the data. Among them the transport
cost |G(z) - z|^2, as a part of the generator's loss, chooses the optimal map, which for normal
data N(m, tau^2 I) is that of the flow: G(z) = m + tau z = phi(0, 1, z).

Source: Huang et al. 2025, arXiv 2501.05441; Lin et al. 2025, arXiv 2511.22475.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..types import as_batch, as_floating, at_least_float32, check_same_shape, returned


class RelativisticLosses(NamedTuple):
    """The two sides' losses of a batch of pairs.

    Attributes:
      generator: softplus(-(D(G(z)) - D(x))), `[batch]`.
      discriminator: softplus(-(D(x) - D(G(z)))), `[batch]`, without the gradient penalty.
    """

    generator: jax.Array
    discriminator: jax.Array


def relativistic_losses(d_real: jax.Array, d_fake: jax.Array) -> RelativisticLosses:
    """The relativistic losses of pairs of a real and a generated example.

    Args:
      d_real: what the discriminator says of real examples, `[batch]`.
      d_fake: of generated ones, `[batch]`, paired with them.

    Returns:
      `RelativisticLosses(generator, discriminator)`, `[batch]` each, in at least float32.

    Raises:
      ValueError: if the two have different shapes or are not `[batch]`.

    Example:
      >>> relativistic_losses(jnp.ones(1), jnp.ones(1)).generator
      Array([0.6931472], dtype=float32)

    Source: arXiv 2501.05441, equation 2.
    """
    d_real, d_fake = as_floating("d_real", d_real), as_floating("d_fake", d_fake)
    check_same_shape("d_real and d_fake", d_real, d_fake)
    if d_real.ndim != 1:
        raise ValueError(
            f"A discriminator gives one number per example, [batch]; got {d_real.shape}. A column "
            "needs [:, 0]."
        )
    lead = at_least_float32(d_real) - at_least_float32(d_fake)
    return RelativisticLosses(jax.nn.softplus(lead), jax.nn.softplus(-lead))


def gradient_penalty(discriminator: Callable[[jax.Array], Any], x: jax.Array) -> jax.Array:
    """|grad D(x)|^2 per example, summed over the event: the zero-centred penalty, unweighted.

    Args:
      discriminator: `x -> [batch]`, which treats examples apart, as one without batch statistics
        does; it is differentiated twice in training.
      x: real or generated examples, `[batch, *event]`.

    Returns:
      `[batch]`, in at least float32.

    Raises:
      ValueError: if the discriminator returns anything but a floating array `[batch]`.

    Example:
      >>> gradient_penalty(lambda x: 3 * x[:, 0] + 4 * x[:, 1], jnp.zeros((1, 2)))
      Array([25.], dtype=float32)

    Source: Mescheder et al. 2018, arXiv 1801.04406, equation 9.
    """
    x = as_batch("x", x)

    def checked(x: jax.Array) -> jax.Array:
        fix = "One number per example."
        return returned("the discriminator", discriminator(x), x.shape[:1], fix)

    value, pullback = jax.vjp(checked, x)
    (gradient,) = pullback(jnp.ones_like(value))
    return jnp.sum(jnp.square(at_least_float32(gradient)), axis=range(1, x.ndim))


def transport_cost(x0: jax.Array, x1: jax.Array) -> jax.Array:
    """|x1 - x0|^2 / D, the mean square over the event, per example.

    Args:
      x0: where examples come from, `[batch, *event]`.
      x1: where they go, `[batch, *event]`.

    Returns:
      `[batch]`, in at least float32, in the unit of x squared.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> transport_cost(jnp.zeros((1, 2)), jnp.full((1, 2), 3.0))
      Array([9.], dtype=float32)

    Source: arXiv 2511.22475, the optimal transport loss.
    """
    x0, x1 = as_batch("x0", x0), as_batch("x1", x1)
    check_same_shape("x0 and x1", x0, x1)
    apart = at_least_float32(x1) - at_least_float32(x0)
    return jnp.mean(jnp.square(apart), axis=range(1, apart.ndim))
