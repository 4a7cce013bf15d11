"""Values that are known while a program is compiled: checked there, by no operation of JAX's.

An array that a function closes over is concrete under `jax.jit`, and what JAX computes from it is
not. A check that computes would fail on good values; one that looks only at traced values would let
bad ones pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm
from fmjax import couplings

X, KEY, PATH = jnp.ones((3, 2)), jax.random.key(0), fm.cond_ot()
T = jnp.float32(0.3)


def still(t, x):
    return jnp.zeros_like(x)


CALLS = {
    "logit_normal": lambda c: fm.logit_normal(0.0, c)(KEY, (3,)),
    "shifted": lambda c: fm.shifted(fm.uniform, c)(KEY, (3,)),
    "drop_labels": lambda c: fm.drop_labels(KEY, jnp.arange(3), null=3, rate=c),
    "guidance_interval": lambda c: fm.guidance_interval(still, still, 0.25 * c, c)(T, X),
    "langevin_drift": lambda c: fm.langevin_drift(PATH, still, c)(T, X),
    "langevin_drift of t": lambda c: fm.langevin_drift(PATH, still, lambda t: c)(T, X),
    "langevin_diffusion": lambda c: fm.langevin_diffusion(PATH, lambda t: c * t)(T),
    "precondition": lambda c: fm.precondition(PATH, still, c)(T, X),
    "sample_path": lambda c: fm.sample_path(PATH, X, X, c).x_t,
    "match_times": lambda c: fm.match_times(PATH, fm.cosine(), c),
    "coupling_entropy": lambda c: couplings.coupling_entropy(c * jnp.eye(3)),
    "unbalanced": lambda c: couplings.unbalanced(1.0, 1.0, 1.0, weights0=W * c)(KEY, X, X).rows0,
}
W = np.ones(3, np.float32)
FREE = {"langevin_diffusion", "guidance_interval", "coupling_entropy", "unbalanced"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "unbalanced")) for n in CALLS]
)
def test_known_values_are_taken_under_jit(name):
    known = jnp.float32(0.5)
    want = CALLS[name](known)
    got = jax.jit(lambda _: CALLS[name](known))(0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in FREE])
def test_bad_known_values_are_refused_under_jit(name):
    bad = jnp.float32(-0.5)
    with pytest.raises(ValueError, match="must"):
        jax.jit(lambda _: CALLS[name](bad))(0)


def test_weights_and_plans_that_are_known():
    plan, weights = jnp.eye(3) - 0.1, jnp.array([1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="plan must not be negative"):
        jax.jit(lambda _: couplings.coupling_entropy(plan))(0)
    with pytest.raises(ValueError, match="weights0 must be finite"):
        jax.jit(lambda _: couplings.unbalanced(1.0, 1.0, 1.0, weights0=weights))(0)
    good = jnp.abs(weights)
    pairs = jax.jit(lambda x: couplings.unbalanced(1.0, 1.0, 1.0, weights0=good)(KEY, x, x))(X)
    assert pairs.rows0.shape == (3,)
    assert float(jax.jit(lambda _: couplings.coupling_entropy(jnp.eye(3)))(0)) < 1e-6
