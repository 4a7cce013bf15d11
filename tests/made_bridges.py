"""Bridges that several test files solve and measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianBridge

import fmjax as fm

BRIDGES = {
    "brownian_1": fm.brownian_bridge(1.0),
    "brownian_0.3": fm.brownian_bridge(0.3),
    "trigonometric": fm.BridgePath(
        lambda t: jnp.sin(0.5 * jnp.pi * t),
        lambda t: jnp.sin(0.5 * jnp.pi * (1 - t)),
        lambda t: jnp.sqrt(2 * t * (1 - t)),
    ),
    "smooth": fm.BridgePath(lambda t: t**2, lambda t: 1 - t**2, lambda t: jnp.sin(jnp.pi * t) ** 2),
    "no noise": fm.BridgePath(lambda t: t, lambda t: 1 - t, lambda t: 0.0),
}

NOISY = [name for name in BRIDGES if name != "no noise"]

noisy_bridges = pytest.mark.parametrize("name", NOISY)

INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])

UNIT = np.eye(1)


def draw(event_shape=(3,), batch=5, dtype=None):
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, batch, *event_shape))
    return jnp.asarray(x0, dtype), jnp.asarray(x1, dtype)


def unit_bridge(cross, sigma=1.0):
    """One coordinate, unit variances, means that differ."""
    return GaussianBridge(np.array([-0.1]), UNIT, np.array([0.1]), UNIT, np.array([[cross]]), sigma)


def drift_of(bridge, diffusion=None, **kwargs):
    path = fm.brownian_bridge(bridge.sigma)
    diffusion = diffusion or (lambda t: bridge.sigma)
    return fm.bridge_drift(path, bridge.w, bridge.z_hat, diffusion, **kwargs)


def matrix_of(field, dim):
    """`t -> A` of a field that is affine in x."""
    return lambda t: jax.jacfwd(lambda x: field(t, x[None])[0])(jnp.zeros(dim))


class Pairs:
    """Three pairs in the plane: everything about x_t from the density of their mixture."""

    def __init__(self, path):
        rng = np.random.default_rng(4)
        self.path, self.x0, self.x1 = path, *(jnp.asarray(rng.standard_normal((2, 3, 2))))

    def centred(self, t, x):
        """`[batch, pair, dim]`: x less the mean of each pair's bridge."""
        mean = self.path.alpha(t) * self.x1 + self.path.sigma(t) * self.x0
        return x[:, None] - mean[None]

    def log_p(self, t, x):
        square, variance = (self.centred(t, x[None])[0] ** 2).sum(1), self.path.gamma(t) ** 2
        return jax.nn.logsumexp(-square / (2 * variance)) - jnp.log(variance)  # up to a constant

    def shares(self, t, x):
        return jax.nn.softmax(-(self.centred(t, x) ** 2).sum(2) / (2 * self.path.gamma(t) ** 2))

    def w(self, t, x):
        one = jnp.ones_like(t)
        alpha_dot, sigma_dot = (jax.jvp(f, (t,), (one,))[1] for f in self.path[:2])
        return self.shares(t, x) @ (alpha_dot * self.x1 + sigma_dot * self.x0)

    def z_hat(self, t, x):
        each = self.centred(t, x) / self.path.gamma(t)
        return (self.shares(t, x)[..., None] * each).sum(1)
