"""Flow, score and drifts of bridges against closed forms, inside and at both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_bridges import BRIDGES, INSIDE, Pairs, draw, drift_of, matrix_of, noisy_bridges
from oracles import gaussian_bridge, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax.paths.bridge_drifts import NEAREST


@pytest.mark.parametrize("independent", [False, True])
def test_flow_and_drifts_have_the_marginals_of_normal_pairs(independent, x64):
    """S' = A S + S A' for the flow, plus g^2 I forwards and minus g^2 I backwards, for any g."""
    bridge = gaussian_bridge(0.8, independent=independent)
    path = fm.brownian_bridge(bridge.sigma)
    fields = [(fm.bridge_flow(path, bridge.w, bridge.z_hat), 0.0)]
    for g in (0.0, 0.5, bridge.sigma, 2.0):
        fields.append((drift_of(bridge, lambda t, g=g: g), g**2))
        fields.append((drift_of(bridge, lambda t, g=g: g, reverse=True), -(g**2)))
    for field, square in fields:
        a_of = jit(matrix_of(field, 2))
        for t in INSIDE:
            a, cov = np.asarray(a_of(t)), bridge.cov(t)
            got = a @ cov + cov @ a.T + square * np.eye(2)
            np.testing.assert_allclose(got, bridge.cov_dot(t), atol=1e-12)
            at_mean = field(jnp.asarray(t), jnp.asarray(bridge.mean(t))[None])[0]
            np.testing.assert_allclose(at_mean, bridge.mean1 - bridge.mean0, atol=1e-12)


def test_drifts_at_the_ends_of_a_brownian_bridge(x64):
    """Where a solve begins w alone; where it ends the limit, w + sigma^2 s and w - sigma^2 s."""
    bridge = gaussian_bridge(0.8)
    x, square = jnp.asarray(draw((2,))[0]), bridge.sigma**2
    forward, backward = drift_of(bridge), drift_of(bridge, reverse=True)

    def score(t, cov):
        return -np.linalg.solve(cov, (np.asarray(x) - bridge.mean(t)).T).T

    s0, s1 = score(0.0, bridge.cov0), score(1.0, bridge.cov1)
    w0, w1 = (np.asarray(bridge.w(t, x)) for t in (0.0, 1.0))
    for function in (lambda f: f, jit):
        for field, t, want in (
            (forward, 0.0, w0),
            (forward, 1.0, w1 + square * s1),
            (backward, 1.0, w1),
            (backward, 0.0, w0 - square * s0),
        ):
            got = function(field)(jnp.asarray(t), x)
            np.testing.assert_allclose(got, want, atol=20 * NEAREST)
    # Continuous: a float32 solve may end a rounding before 1.
    inner = forward(jnp.asarray(1 - 6e-8), x)
    np.testing.assert_allclose(inner, forward(jnp.ones(()), x), rtol=1e-12)
    # In between it is the formula: w -/+ sigma times a root times z_hat.
    t = jnp.asarray(INSIDE)
    ones = jnp.ones((5, 2))
    up, down = (
        fm.bridge_drift(
            fm.brownian_bridge(0.8), lambda t, x: 0 * x, lambda t, x: x, lambda t: 0.8, reverse=r
        )(t, ones)
        for r in (False, True)
    )
    ratio = np.sqrt(INSIDE / (1 - INSIDE))[:, None]
    np.testing.assert_allclose(up, -0.8 * ratio * ones, rtol=1e-12)
    np.testing.assert_allclose(down, 0.8 / ratio * ones, rtol=1e-12)


def test_drifts_at_the_ends_in_float32():
    bridge = gaussian_bridge(0.8)
    x = draw((2,), dtype=jnp.float32)[0]
    with jax.numpy_dtype_promotion("standard"):
        got = drift_of(bridge)(jnp.ones(()), x)
        w = bridge.w(jnp.ones(()), x)
    score = -np.linalg.solve(bridge.cov1, (np.asarray(x) - bridge.mean1).T).T
    # Half an ulp of 1 - NEAREST is 0.3 % of NEAREST.
    np.testing.assert_allclose(got, w + bridge.sigma**2 * score, rtol=5e-3, atol=5e-3)


@noisy_bridges
def test_score_continuity_and_fokker_planck_of_three_pairs(name, x64):
    """The residuals of the equations themselves, every derivative by autodiff, no moment in it."""
    path = BRIDGES[name]
    pairs = Pairs(path)
    score = fm.bridge_score(path, pairs.z_hat)
    flow = fm.bridge_flow(path, pairs.w, pairs.z_hat)

    def diffusion(t):
        return 0.4 + t

    drifts = [
        (fm.bridge_drift(path, pairs.w, pairs.z_hat, diffusion, reverse=r), sign)
        for r, sign in ((False, 1), (True, -1))
    ]

    def residuals(t, x):
        slope, gradient = jax.grad(pairs.log_p, (0, 1))(t, x)
        laplacian = jnp.trace(jax.hessian(pairs.log_p, 1)(t, x)) + gradient @ gradient

        def transport(field):
            divergence = jnp.trace(jax.jacfwd(lambda x: field(t, x[None])[0])(x))
            return slope + divergence + field(t, x[None])[0] @ gradient

        spread = 0.5 * diffusion(t) ** 2 * laplacian
        errors = [transport(flow), *(transport(f) - sign * spread for f, sign in drifts)]
        return jnp.stack(errors), score(t, x[None])[0] - gradient, spread

    x = jnp.asarray(np.random.default_rng(5).standard_normal((5, 2)))
    errors, of_score, spread = jit(jax.vmap(residuals))(jnp.asarray(INSIDE), x)
    size = 1 + np.abs(spread)[:, None]
    np.testing.assert_allclose(errors / size, 0, atol=1e-9)
    np.testing.assert_allclose(of_score / size, 0, atol=1e-9)


def test_the_ends_are_refused_where_nothing_is_finite_there():
    path, x = fm.brownian_bridge(1.0), draw()[0]
    w = z_hat = lambda t, x: x
    drift, wrong = (fm.bridge_drift(path, w, z_hat, lambda t, g=g: g) for g in (1.0, 0.5))
    for t in (0.0, 1.0):
        for name, field in (
            ("bridge_flow", fm.bridge_flow(path, w, z_hat)),
            ("bridge_score", fm.bridge_score(path, z_hat)),
        ):
            with pytest.raises(ValueError, match=f"^{name} has no finite value.*got t = {t}"):
                field(jnp.asarray(t), x)
            assert not np.isfinite(jit(field)(jnp.asarray(t), x)).any()
        for at in (jnp.asarray(t), jnp.array([0.5, t, 0.5, 0.5, 0.5])):
            assert np.isfinite(drift(at, x)).all()
            with pytest.raises(ValueError, match=rf"= 1; got 0.25 at t = {t}"):
                wrong(at, x)
        assert np.isnan(jit(wrong)(jnp.asarray(t), x)).all()
    assert np.isfinite(wrong(jnp.asarray(1e-5), x)).all()
    smooth = fm.bridge_flow(BRIDGES["smooth"], w, z_hat)
    np.testing.assert_allclose(smooth(jnp.zeros(()), x), x, rtol=1e-6)  # gamma' is 0 there


ENDS = {  # gamma, its diffusions that match at both ends, and those that do not
    "brownian_1": (fm.brownian_bridge(1.0).gamma, 1.0, (0.9, 0.0, np.inf, np.nan)),
    "brownian_1e-4": (fm.brownian_bridge(1e-4).gamma, 1e-4, (0.9e-4, 0.0, 1e-3)),
    "brownian_1e3": (fm.brownian_bridge(1e3).gamma, 1e3, (1.0, 0.9e3)),
    "sine": (lambda t: jnp.sin(jnp.pi * t), 0.0, (0.5, np.inf)),
    "parabola": (lambda t: 1e-3 * t * (1 - t), 0.0, (0.5, 1e-3)),
    "sine squared": (lambda t: jnp.sin(jnp.pi * t) ** 2, 0.0, (0.5,)),
    "no noise": (lambda t: 0 * t, 0.0, (0.5,)),
}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENDS)
def test_only_the_matching_diffusion_has_a_drift_at_an_end(name, dtype):
    """Of any scale, at both ends, in both directions; w alone where a solve begins."""
    gamma, matches, others = ENDS[name]
    path = fm.BridgePath(lambda t: t, lambda t: 1 - t, gamma)

    def drift(g, reverse):
        w, z_hat = (lambda t, x: 3 * x), (lambda t, x: gamma(t) * x)
        return fm.bridge_drift(path, w, z_hat, lambda t: g + 0 * t, reverse=reverse)

    with jax.enable_x64(dtype == "float64"):
        x = jnp.ones((2, 1), dtype)
        for reverse in (False, True):
            traced = jit(lambda g, t, x, reverse=reverse: drift(g, reverse)(t, x))
            for end in (0.0, 1.0):
                t, excess = jnp.asarray(end, dtype), 0.0 if bool(end) == reverse else matches**2
                want = 3 + (excess if reverse else -excess)
                for got in (
                    drift(matches, reverse)(t, x),
                    traced(jnp.asarray(matches, dtype), t, x),
                ):
                    np.testing.assert_allclose(got, want, rtol=5e-3)  # 1 - NEAREST, rounded
                for g in others:
                    with pytest.raises(ValueError, match=r"must be \|\(gamma\^2\)'\| ="):
                        drift(g, reverse)(t, x)
                    assert np.isnan(traced(jnp.asarray(g, dtype), t, x)).all()


def test_a_gamma_that_is_zero_inside_is_refused_there_too():
    x, w = draw()[0], lambda t, x: x
    three_zeros = BRIDGES["no noise"]._replace(gamma=lambda t: t * (1 - t) * (1 - 2 * t))
    for path in (BRIDGES["no noise"], three_zeros):
        with pytest.raises(ValueError, match="bridge_drift has no finite value.*got t = 0.5"):
            fm.bridge_drift(path, w, w, lambda t: 1.0)(jnp.array(0.5), x)
        without = fm.bridge_drift(path, w, w, lambda t: 0.0)
        np.testing.assert_array_equal(without(jnp.array(0.5), x), x)
