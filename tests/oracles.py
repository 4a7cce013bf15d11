"""What several test files share: closed forms, the table of paths, fixtures, a quick `jit`.

The flow from N(0, I) to N(mean, diag(std^2)) with independent pairs is known exactly. Every
coordinate of x_t is normal, with mean mu_t = alpha m and variance S_t = alpha^2 s^2 + sigma^2, so

    u_t(x) = mu_t' + S_t' / (2 S_t) (x - mu_t),   x_t = mu_t + sqrt(S_t / S_0) (x_0 - mu_0).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm

# Unoptimised code compiles faster, and compiling is what these tests spend their time on.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

PATHS = {
    "cond_ot": fm.cond_ot(),
    "cond_ot_0.1": fm.cond_ot(sigma_min=0.1),
    "vp": fm.vp(),
    "linear_vp": fm.linear_vp(),
    "cosine": fm.cosine(),
    "polynomial_2": fm.polynomial(2),
    "polynomial_1.5": fm.polynomial(1.5),
    "own": fm.AffinePath(alpha=lambda t: t * (2 - t), sigma=lambda t: 1 - t),
}


def quick_on(*quick, names=tuple(PATHS)):
    """Each of these paths; the tests of all but a few take longer together."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names if name not in quick]
    return pytest.mark.parametrize("name", [*quick, *slow])


@pytest.fixture
def x64():
    """Float64 in one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def strict_dtypes():
    """Imported by a test file, it refuses every silent change of dtype in that file's tests."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def numerical_schedule(path: fm.AffinePath, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """alpha, sigma and their derivatives by central differences; float64, under `x64` only."""
    step = 1e-6
    values = [np.asarray(f(jnp.asarray(t))) for f in path]
    slopes = [np.asarray(f(jnp.asarray(t + step)) - f(jnp.asarray(t - step))) for f in path]
    assert values[0].dtype == np.float64
    return (*values, *(slope / (2 * step) for slope in slopes))


class GaussianFlow(NamedTuple):
    """N(0, I) to N(mean, diag(std^2)) along cond_ot(sigma_min), with every derivative written out.

    Attributes:
      mean: `[*event]`.
      std: `[*event]`.
      sigma_min: the noise that stays on the data.
    """

    mean: np.ndarray
    std: np.ndarray
    sigma_min: float = 0.0

    def variance(self, t):
        return t**2 * self.std**2 + (1 - (1 - self.sigma_min) * t) ** 2

    def velocity(self, t, x):
        mean, std = jnp.asarray(self.mean, x.dtype), jnp.asarray(self.std, x.dtype)
        sigma, sigma_dot = 1 - (1 - self.sigma_min) * t, -(1 - self.sigma_min)
        rate = (t * std**2 + sigma * sigma_dot) / (t**2 * std**2 + sigma**2)
        return (mean - t * rate * mean)[None] + rate[None] * x

    def flow(self, t, x0):
        """x_t from x_0, in numpy float64."""
        return t * self.mean + np.sqrt(self.variance(t)) * np.asarray(x0, np.float64)

    def log_prob(self, t, x):
        """log p_t(x) in nats, in numpy float64: `[batch]`."""
        variance, x = self.variance(t), np.asarray(x, np.float64)
        terms = (x - t * self.mean) ** 2 / variance + np.log(2 * np.pi * variance)
        return -0.5 * terms.reshape(len(x), -1).sum(1)


def gaussian_flow(event_shape: tuple[int, ...], sigma_min: float = 0.0) -> GaussianFlow:
    """A `GaussianFlow` whose means lie in [-1, 1] and standard deviations in [0.4, 1.6]."""
    rng = np.random.default_rng(0)
    return GaussianFlow(
        rng.uniform(-1, 1, event_shape), rng.uniform(0.4, 1.6, event_shape), sigma_min
    )


def gaussian_velocity(path: fm.AffinePath, mean: np.ndarray, std: np.ndarray) -> fm.Velocity:
    """The exact velocity to N(mean, diag(std^2)) along any path, from the mean and the variance.

    They are differentiated by themselves; neither W nor a conversion is used.
    """

    def velocity(t, x):
        m, s = jnp.asarray(mean, x.dtype)[None], jnp.asarray(std, x.dtype)[None]

        def moments(t):
            alpha, sigma = (f(t)[:, None] for f in path)
            return alpha * m, alpha**2 * s**2 + sigma**2

        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        (mu, variance), (mu_dot, variance_dot) = jax.jvp(moments, (t,), (jnp.ones_like(t),))
        return mu_dot + variance_dot / (2 * variance) * (x - mu)

    return velocity


def gaussian_average_velocity(path: fm.AffinePath, mean: np.ndarray, std: np.ndarray):
    """The exact `(t, s, x) -> U` to N(mean, diag(std^2)) along any path.

    The flow map is phi = alpha(s) m + S(s) / S(t) (x - alpha(t) m), S^2 = alpha^2 std^2 + sigma^2,
    by the standard deviations alone: no velocity is used but where s = t.
    """

    def average(t, s, x):
        m, tau = jnp.asarray(mean, x.dtype)[None], jnp.asarray(std, x.dtype)[None]

        def moments(t):
            alpha, sigma = (f(t)[:, None] for f in path)
            return alpha * m, jnp.sqrt(alpha**2 * tau**2 + sigma**2)

        t, s = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape[:1]) for a in (t, s))
        (mu_t, std_t), (mu_s, std_s) = moments(t), moments(s)
        phi = mu_s + std_s / std_t * (x - mu_t)
        h = (s - t)[:, None]
        moved = (phi - x) / jnp.where(h == 0, jnp.ones_like(h), h)
        return jnp.where(h == 0, gaussian_velocity(path, mean, std)(t, x), moved)

    return average


def gaussian_predictions(path: fm.AffinePath, mean: np.ndarray, std: np.ndarray) -> tuple:
    """E[x1 | x_t] and E[x0 | x_t] for data N(mean, diag(std^2)): two functions `(t, x)`."""

    def weights(t, x):
        m, s = jnp.asarray(mean, x.dtype)[None], jnp.asarray(std, x.dtype)[None]
        t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
        alpha, sigma = (f(t)[:, None] for f in path)
        return m, s, alpha, sigma, (x - alpha * m) / (alpha**2 * s**2 + sigma**2)

    def x1(t, x):
        m, s, alpha, _, residual = weights(t, x)
        return m + alpha * s**2 * residual

    def x0(t, x):
        *_, sigma, residual = weights(t, x)
        return sigma * residual

    return x1, x0


def whitened_normal(num: int, dim: int) -> np.ndarray:
    """`[num, dim]`, num > dim: normal draws made exactly mean 0 and covariance 1; float32."""
    x = np.random.default_rng(1).standard_normal((num, dim))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / num)).T
    return x.astype(np.float32)


class GaussianBridge(NamedTuple):
    """Jointly normal (x0, x1) on `brownian_bridge(sigma)`, every expectation written out.

    x_t is normal with mean (1 - t) m0 + t m1 and, where C = Cov(x0, x1), the covariance
    S_t = (1 - t)^2 S0 + t^2 S1 + t (1 - t) (C + C' + sigma^2 I).

    Attributes:
      mean0, mean1: `[dim]`.
      cov0, cov1: `[dim, dim]`.
      cross: C, `[dim, dim]`; `schroedinger_covariance` for the Schroedinger bridge.
      sigma: of the reference process.
    """

    mean0: np.ndarray
    cov0: np.ndarray
    mean1: np.ndarray
    cov1: np.ndarray
    cross: np.ndarray
    sigma: float

    def mean(self, t):
        return (1 - t) * self.mean0 + t * self.mean1

    def cov(self, t):
        noise = self.sigma**2 * np.eye(len(self.mean0))
        both = self.cross + self.cross.T + noise
        return (1 - t) ** 2 * self.cov0 + t**2 * self.cov1 + t * (1 - t) * both

    def cov_dot(self, t):
        both = self.cross + self.cross.T + self.sigma**2 * np.eye(len(self.mean0))
        return -2 * (1 - t) * self.cov0 + 2 * t * self.cov1 + (1 - 2 * t) * both

    def w(self, t, x):
        """E[x1 - x0 | x_t = x] at one time for all."""
        with_x_t = (1 - t) * (self.cross.T - self.cov0) + t * (self.cov1 - self.cross)
        return ((self.mean1 - self.mean0)[None] + self._whitened(t, x) @ with_x_t.T).astype(x.dtype)

    def z_hat(self, t, x):
        """E[z | x_t = x] at one time for all."""
        return (self.sigma * jnp.sqrt(t * (1 - t)) * self._whitened(t, x)).astype(x.dtype)

    def _whitened(self, t, x):
        return jnp.linalg.solve(self.cov(t), (x - self.mean(t)[None]).T).T

    def sample_pairs(self, rng, num):
        """`[2, num, dim]`."""
        cov = np.block([[self.cov0, self.cross], [self.cross.T, self.cov1]])
        mean = np.concatenate([self.mean0, self.mean1])
        return np.stack(np.split(rng.multivariate_normal(mean, cov, num), 2, axis=1))


def schroedinger_covariance(cov0: np.ndarray, cov1: np.ndarray, sigma: float) -> np.ndarray:
    """Cov(x0, x1) of the Schroedinger bridge of sigma dB between two normal distributions.

    C = (S0^1/2 D S0^-1/2 - sigma^2 I) / 2,   D = (4 S0^1/2 S1 S0^1/2 + sigma^4 I)^1/2.

    Source: Bunne et al. 2022, arXiv 2202.05722, theorem 3.
    """

    def root(a):
        values, vectors = np.linalg.eigh(a)
        return (vectors * np.sqrt(values)) @ vectors.T

    half, eye = root(cov0), np.eye(len(cov0))
    d = root(4 * half @ cov1 @ half + sigma**4 * eye)
    return 0.5 * (half @ d @ np.linalg.inv(half) - sigma**2 * eye)


def gaussian_bridge(sigma: float, *, independent: bool = False) -> GaussianBridge:
    """Two normal distributions in the plane, no axes of theirs parallel."""
    cov0, cov1 = np.array([[1.0, 0.4], [0.4, 0.6]]), np.array([[0.5, -0.3], [-0.3, 1.5]])
    cross = np.zeros((2, 2)) if independent else schroedinger_covariance(cov0, cov1, sigma)
    return GaussianBridge(np.array([-0.3, 0.1]), cov0, np.array([0.8, -0.4]), cov1, cross, sigma)


class JointNormals(NamedTuple):
    """Pairs (x0, x1) from a mixture of joint normals with one covariance, on any path or bridge.

    Of every component k all is linear: given k, x_t is normal with

        mean  alpha m1_k + sigma m0_k,
        S_t = alpha^2 S1 + sigma^2 S0 + alpha sigma (C + C') + gamma^2 I,      C = Cov(x0, x1),

    and x0, x1 and z have the covariances sigma S0 + alpha C, alpha S1 + sigma C' and gamma I with
    it. A covariance of 0 makes points of the means. Times inside (0, 1) only if S_0 or S_1 is 0.

    Attributes:
      path: an `AffinePath` or a `BridgePath`.
      mean0, mean1: `[num, dim]`, the means of equally likely components.
      cov0, cov1, cross: S0, S1 and C, `[dim, dim]`.
    """

    path: fm.AffinePath | fm.BridgePath
    mean0: np.ndarray
    mean1: np.ndarray
    cov0: np.ndarray
    cov1: np.ndarray
    cross: np.ndarray

    def log_prob(self, t, x):
        """log p_t(x): `[batch]`; t is `[]` or `[batch]`."""
        return self._over(lambda t, x: jax.nn.logsumexp(self._components(t, x)[0]), t, x)

    def expectations(self, t, x):
        """E[x0 | x_t = x], E[x1 | x_t = x] and E[z | x_t = x], each `[batch, dim]`."""

        def one(t, x):
            log_weights, white, (alpha, sigma, gamma) = self._components(t, x)
            with_x0 = sigma * self.cov0 + alpha * self.cross
            with_x1 = alpha * self.cov1 + sigma * self.cross.T
            shares = jax.nn.softmax(log_weights)
            x0, x1 = self.mean0 + white @ with_x0.T, self.mean1 + white @ with_x1.T
            return shares @ x0, shares @ x1, gamma * shares @ white

        return self._over(one, t, x)

    def velocity(self, t, x):
        """E[u_t | x_t = x] by the library: a path is linear in its ends, a bridge in z too."""

        def mean_velocity(t, x):
            x0, x1, _ = self.expectations(t, x)
            return fm.sample_path(fm.AffinePath(*self.path[:2]), x0, x1, t).u_t

        def z_hat(t, x):
            return self.expectations(t, x)[2]

        if not isinstance(self.path, fm.BridgePath):
            return mean_velocity(t, x)
        return fm.bridge_flow(self.path, mean_velocity, z_hat)(t, x)

    def sample_pairs(self, rng, num):
        """x0 and x1, `[2, num, dim]`."""
        cov = np.block([[self.cov0, self.cross], [self.cross.T, self.cov1]])
        k = rng.integers(len(self.mean0), size=num)
        noise = rng.multivariate_normal(np.zeros(len(cov)), cov, num)
        return np.stack([self.mean0[k], self.mean1[k]]) + np.stack(np.split(noise, 2, axis=1))

    def _components(self, t, x):
        """log of share times density at x `[num]`, S_t^-1 (x - mean) `[num, dim]`, the weights."""
        alpha, sigma = (f(t) for f in self.path[:2])
        gamma = self.path.gamma(t) if isinstance(self.path, fm.BridgePath) else jnp.zeros_like(t)
        cov = alpha**2 * self.cov1 + sigma**2 * self.cov0 + gamma**2 * jnp.eye(len(x))
        cov = cov + alpha * sigma * (self.cross + self.cross.T)
        apart = x[None] - alpha * self.mean1 - sigma * self.mean0
        white = jnp.linalg.solve(cov, apart.T).T
        log_det = jnp.linalg.slogdet(2 * jnp.pi * cov)[1] + 2 * jnp.log(len(self.mean0) * 1.0)
        return -0.5 * ((apart * white).sum(1) + log_det), white, (alpha, sigma, gamma)

    def _over(self, one, t, x):
        return jax.vmap(one)(jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1]), x)


def optimal_covariance(cov0: np.ndarray, cov1: np.ndarray) -> np.ndarray:
    """Cov(x0, x1) of the map that carries one normal to the other at least |x1 - x0|^2."""
    return schroedinger_covariance(cov0, cov1, 0.0)
