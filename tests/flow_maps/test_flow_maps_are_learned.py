"""A network that holds the truth reaches it under every loss: U = A(t, s) x + b(t, s).

A and b are polynomials in t and h = s - t. Data and times are integrated by Gauss's rules, so that
no draw limits the result, and every loss is quadratic in the parameters but for its target: a step
is a part of Newton's, whose Hessian is that of the loss as `stop_gradient` leaves it.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_average_velocity, jit
from oracles import x64 as x64

import fmjax as fm
from fmjax import flow_maps
from fmjax.flow_maps import instantaneous

MEAN, STD = np.array([0.8]), np.array([0.7])
DEGREE = 9


def powers(t, h):
    """Legendre polynomials in t and h up to `DEGREE` together, `[batch, num]`."""

    def legendre(z):
        values = [jnp.ones_like(z), z]
        for n in range(1, DEGREE):
            values.append(((2 * n + 1) * z * values[n] - n * values[n - 1]) / (n + 1))
        return values

    in_t, in_h = legendre(2 * t - 1), legendre(2 * h - 1)
    both = [in_t[i] * in_h[j] for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    return jnp.stack(both, -1)


def table(weights, t, s, x):
    a, b = weights
    features = powers(t, s - t)
    return (features @ a)[:, None] * x + (features @ b)[:, None]


def quadrature():
    """Path samples of `cond_ot`, their ends s, and weights that integrate the mean loss.

    Starts are uniform, horizons uniform on what is left; a third of the weight is at s = t.
    """
    times, time_weights = np.polynomial.legendre.leggauss(11)
    times, time_weights = (times + 1) / 2, time_weights / 2
    shares = np.concatenate([[0.0], times])
    share_weights = np.concatenate([[1 / 3], 2 / 3 * time_weights])
    normal, normal_weights = np.polynomial.hermite_e.hermegauss(3)
    axes = times, shares, normal, normal
    t, share, z0, z1 = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    kinds = time_weights, share_weights, normal_weights, normal_weights
    weight = functools.reduce(np.multiply, np.meshgrid(*kinds, indexing="ij")).ravel()
    x0, x1 = jnp.asarray(z0)[:, None], jnp.asarray(MEAN + STD * z1[:, None])
    sample = fm.sample_path(fm.cond_ot(), x0, x1, jnp.asarray(t))
    return sample, jnp.asarray(t + share * (1 - t)), jnp.asarray(weight / weight.sum())


def mean_flow(U, *batch):
    return flow_maps.mean_flow_loss(U, *batch)


def improved(U, *batch):
    return flow_maps.improved_mean_flow_loss(U, instantaneous(U), *batch)


def shortcut(U, *batch):
    return flow_maps.alpha_flow_loss(U, *batch, 0.5, first=U)  # pyright: ignore


def terminal(U, *batch):
    return flow_maps.terminal_velocity_loss(U, instantaneous(U), *batch)


@pytest.mark.parametrize(
    ("loss", "rate", "num_steps"),
    [
        (shortcut, 0.5, 400),
        # h dU/dt multiplies the term h^n of an error by -n: small steps.
        pytest.param(mean_flow, 0.05, 500, marks=pytest.mark.slow),
        pytest.param(improved, 0.05, 500, marks=pytest.mark.slow),
        pytest.param(terminal, 0.1, 300, marks=pytest.mark.slow),
    ],
)
def test_the_table_reaches_the_closed_form(loss, rate, num_steps, x64):
    sample, s, weight = quadrature()
    num = (DEGREE + 1) * (DEGREE + 2) // 2
    zero, unflatten = jax.flatten_util.ravel_pytree((jnp.zeros(num), jnp.zeros(num)))

    def mean_loss(flat):
        return weight @ loss(functools.partial(table, unflatten(flat)), sample, s)

    @jit
    def errors(t, s, x):
        inverse = jnp.linalg.inv(jax.hessian(mean_loss)(zero))

        def step(_, flat):
            return flat - rate * inverse @ jax.grad(mean_loss)(flat)

        weights = unflatten(jax.lax.fori_loop(0, num_steps, step, zero))
        average = gaussian_average_velocity(fm.cond_ot(), MEAN, STD)
        return table(weights, t, s, x) - average(t, s, x)

    t, share = (a.ravel() for a in np.meshgrid(*2 * [np.linspace(0, 1, 9)]))
    x = np.linspace(-1, 2, 81)[:, None]
    error = np.abs(errors(*map(jnp.asarray, (t, t + share * (1 - t), x))))
    # The closest polynomial of this degree is some 2e-3 away, and 7e-3 one of degree 8.
    assert error[share == 0].max() < 5e-3  # the velocity itself, which the data decide
    assert error.max() < 5e-3
