"""One conformance suite over the table of all paths, the conversions, and the exact velocity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, jit, numerical_schedule
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])
all_paths = pytest.mark.parametrize("name", PATHS)

# alpha(0) and sigma(1); sigma(0)^2 = 1 - alpha(0)^2 and alpha(1) = 1 for all of them.
END_POINTS = {name: (0.0, 0.0) for name in PATHS}
END_POINTS |= {"vp": (np.exp(-5.025), 0.0), "cond_ot_0.1": (0.0, 0.1)}

# t, alpha and sigma by hand. vp: T(1/2) = 0.05 + 19.9 / 8 and alpha = exp(-T / 2).
KNOWN = {
    "cond_ot": (0.25, 0.25, 0.75),
    "cond_ot_0.1": (0.5, 0.5, 0.55),
    "vp": (0.5, 0.2811825, 0.9596542),
    "linear_vp": (0.6, 0.6, 0.8),
    "cosine": (1 / 3, 0.5, 0.8660254),
    "polynomial_2": (0.5, 0.25, 0.75),
    "polynomial_1.5": (0.25, 0.125, 0.875),
    "own": (0.5, 0.75, 0.5),
}

CONVERSIONS = {
    "velocity_to_x1": (fm.velocity_to_x1, "u", "x1"),
    "x1_to_velocity": (fm.x1_to_velocity, "x1", "u"),
    "velocity_to_x0": (fm.velocity_to_x0, "u", "x0"),
    "x0_to_velocity": (fm.x0_to_velocity, "x0", "u"),
    "velocity_to_score": (fm.velocity_to_score, "u", "score"),
    "score_to_velocity": (fm.score_to_velocity, "score", "u"),
}
all_conversions = pytest.mark.parametrize("conversion", CONVERSIONS)

# Which path has no finite value at t = 0 and at t = 1. Derived by hand from alpha(0) = 0 (all but
# vp), W(0) = 0 (alpha' = 0 there), sigma(1) = 0 (all but sigma_min > 0), |sigma'(1)| = infinity.
STARTS_AT_X0 = set(PATHS) - {"vp"}
FLAT_START = {"polynomial_2", "polynomial_1.5"}
ENDS_AT_X1 = set(PATHS) - {"cond_ot_0.1"}
STEEP_END = {"vp", "linear_vp"}
SINGULAR = {
    "velocity_to_x1": (FLAT_START, STEEP_END),
    "x1_to_velocity": (set(), ENDS_AT_X1),
    "velocity_to_x0": (FLAT_START, STEEP_END),
    "x0_to_velocity": (STARTS_AT_X0, STEEP_END),
    "velocity_to_score": (FLAT_START, ENDS_AT_X1),
    "score_to_velocity": (STARTS_AT_X0, STEEP_END),
}


def draw(event_shape=(3,), batch=5, dtype=None):
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, batch, *event_shape))
    return jnp.asarray(x0, dtype), jnp.asarray(x1, dtype)


@all_paths
def test_known_values_and_end_points(name):
    t, alpha, sigma = KNOWN[name]
    alpha_0, sigma_1 = END_POINTS[name]
    x0, x1 = draw()
    x_t = jit(lambda t: fm.sample_path(PATHS[name], x0, x1, t).x_t)  # traced: t = 1 has an x_t
    np.testing.assert_allclose(x_t(t), alpha * x1 + sigma * x0, atol=1e-6)
    np.testing.assert_allclose(x_t(1.0), x1 + sigma_1 * x0, atol=1e-6)
    start = alpha_0 * x1 + np.sqrt(1 - alpha_0**2) * x0
    np.testing.assert_allclose(x_t(0.0), start, atol=1e-6)


@all_paths
def test_u_t_is_the_time_derivative_of_x_t(name, x64):
    x0, x1 = draw()
    step = 1e-5
    sample = jit(lambda t: fm.sample_path(PATHS[name], x0, x1, t))
    difference = (sample(INSIDE + step).x_t - sample(INSIDE - step).x_t) / (2 * step)
    np.testing.assert_allclose(sample(INSIDE).u_t, difference, rtol=1e-6, atol=1e-6)


@all_paths
def test_jit_vmap_and_a_single_time_agree(name):
    x0, x1 = draw((2, 3))
    t = jnp.asarray(INSIDE, jnp.float32)

    def sample(x0, x1, t):
        return fm.sample_path(PATHS[name], x0, x1, t)

    eager = sample(x0, x1, t)
    np.testing.assert_array_equal(eager.t, t)
    per_example = jax.vmap(lambda a, b, t: sample(a[None], b[None], t))(x0, x1, t)
    one_time = sample(x0[:1], x1[:1], t[0])
    for i in (1, 2):
        np.testing.assert_allclose(jit(sample)(x0, x1, t)[i], eager[i], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(per_example[i][:, 0], eager[i], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(one_time[i], eager[i][:1], rtol=2e-6, atol=2e-6)


@all_paths
def test_gradients(name, x64):
    """In x0 and x1 they are sigma and alpha; in t that of x_t is u_t, of u_t its difference."""
    x0, x1 = draw()
    alpha, sigma, _, _ = numerical_schedule(PATHS[name], INSIDE)
    t, ones, step = jnp.asarray(INSIDE), np.ones((5, 3)), 1e-6

    def total(field, x0, x1, t):
        return getattr(fm.sample_path(PATHS[name], x0, x1, t), field).sum()

    of_x0, of_x1, of_t = jit(jax.grad(lambda *xs: total("x_t", *xs), (0, 1, 2)))(x0, x1, t)
    np.testing.assert_allclose(of_x0, sigma[:, None] * ones, rtol=1e-12)
    np.testing.assert_allclose(of_x1, alpha[:, None] * ones, rtol=1e-12)
    sample = jit(lambda t: fm.sample_path(PATHS[name], x0, x1, t).u_t.sum(1))
    np.testing.assert_allclose(of_t, sample(t), rtol=1e-12)
    of_t = jit(jax.grad(lambda t: total("u_t", x0, x1, t)))(t)
    difference = (sample(t + step) - sample(t - step)) / (2 * step)
    np.testing.assert_allclose(of_t, difference, rtol=1e-5, atol=1e-6)


@all_paths
def test_dtype_is_kept(name):
    x0, x1 = draw(dtype=jnp.bfloat16)
    t = jnp.asarray(INSIDE, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        low = fm.sample_path(PATHS[name], x0, x1, t)
        conversions = [convert(PATHS[name], t, x0, x1) for convert, *_ in CONVERSIONS.values()]
    high = fm.sample_path(PATHS[name], x0.astype(jnp.float32), x1.astype(jnp.float32), t)
    for got, want in zip(low[1:], high[1:], strict=True):
        assert (got.dtype, want.dtype) == (jnp.bfloat16, jnp.float32)
        # Computed in float32 and rounded once: bfloat16 has 8 bits of mantissa.
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)
    for (convert, *_), got in zip(CONVERSIONS.values(), conversions, strict=True):
        want = convert(PATHS[name], t, x0.astype(jnp.float32), x1.astype(jnp.float32))
        assert (got.dtype, want.dtype) == (jnp.bfloat16, jnp.float32)
        np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-8)  # as above


@all_conversions
@all_paths
def test_conversion_against_known_values(name, conversion, x64):
    """The event's last axis is as long as the batch: a `t` broadcast there would not raise."""
    convert, source, target = CONVERSIONS[conversion]
    x0, x1 = draw((2, 5))
    alpha, sigma, alpha_dot, sigma_dot = (
        a[:, None, None] for a in numerical_schedule(PATHS[name], INSIDE)
    )
    x_t = alpha * x1 + sigma * x0
    known = {"x0": x0, "x1": x1, "score": -x0 / sigma, "u": alpha_dot * x1 + sigma_dot * x0}
    got = convert(PATHS[name], jnp.asarray(INSIDE), x_t, known[source])
    np.testing.assert_allclose(got, known[target], rtol=1e-6, atol=1e-6)
    for i in (0, 3):
        one = convert(PATHS[name], jnp.asarray(INSIDE[i]), x_t[i : i + 1], known[source][i : i + 1])
        np.testing.assert_allclose(one, got[i : i + 1], rtol=1e-12)


@all_paths
def test_round_trips_in_float32(name):
    x_t, u = draw((2, 5))
    t = jnp.asarray(INSIDE, jnp.float32)

    @jit
    def round_trips(t):
        pairs = (
            (fm.velocity_to_x1, fm.x1_to_velocity),
            (fm.velocity_to_x0, fm.x0_to_velocity),
            (fm.velocity_to_score, fm.score_to_velocity),
        )
        return [back(PATHS[name], t, x_t, there(PATHS[name], t, x_t, u)) for there, back in pairs]

    for got in round_trips(t):
        np.testing.assert_allclose(got, u, rtol=1e-4, atol=1e-4)


@all_paths
def test_end_points_are_continuous_or_refused(name, x64):
    x_t, value = draw((2,), batch=3)

    def convert(conversion, t):
        return CONVERSIONS[conversion][0](PATHS[name], t, x_t, value)

    compiled = jit(lambda t: {c: convert(c, t) for c in CONVERSIONS})
    ends = {0.0: compiled(jnp.asarray(1e-9)), 1.0: compiled(jnp.asarray(1 - 1e-9))}
    for conversion in CONVERSIONS:
        for (end, near), singular in zip(ends.items(), SINGULAR[conversion], strict=True):
            if name in singular:
                for t in (jnp.asarray(end), jnp.array([0.5, end, 0.5])):
                    with pytest.raises(ValueError, match=rf"^{conversion}.*got t = {end}"):
                        convert(conversion, t)
            else:
                got = convert(conversion, jnp.asarray(end))
                # polynomial(1.5) goes with the root of 1e-9, the others with 1e-9 itself.
                np.testing.assert_allclose(got, near[conversion], rtol=2e-4, atol=2e-4)
    inside = [compiled(jnp.asarray(t)) for t in np.linspace(0.001, 0.999, 30)]
    assert np.isfinite(jax.tree.leaves(inside)).all()


@all_paths
def test_sample_path_refuses_an_infinite_slope_only(name):
    x0, x1 = draw()
    fm.sample_path(PATHS[name], x0, x1, jnp.zeros(()))
    if name in STEEP_END:
        with pytest.raises(ValueError, match="sample_path has no finite value"):
            fm.sample_path(PATHS[name], x0, x1, jnp.ones(()))
    else:
        x_t = fm.sample_path(PATHS[name], x0, x1, jnp.ones(())).x_t
        np.testing.assert_allclose(x_t, x1 + END_POINTS[name][1] * x0, atol=1e-6)


def test_a_known_time_is_checked_in_a_compiled_function_too():
    x0, x1 = draw()
    for t in (jnp.float32(0.5), jnp.full(5, 0.5)):
        got = jit(lambda x0, t=t: fm.sample_path(fm.cond_ot(), x0, x1, t).x_t)(x0)
        np.testing.assert_allclose(got, (x0 + x1) / 2, rtol=1e-6, atol=1e-6)
    late = jnp.full(5, 500.0)
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        jit(lambda x0: fm.sample_path(fm.cond_ot(), x0, x1, late).x_t)(x0)


def test_wrong_shapes_and_settings_are_refused():
    path, (x0, x1) = fm.cond_ot(), draw((3,), batch=4)
    takes_t = [lambda t, f=f: f(path, t, x0, x1) for f, *_ in CONVERSIONS.values()]
    takes_t += [lambda t: fm.sample_path(path, x0, x1, t)]
    takes_t += [lambda t: fm.marginal_velocity(path, x1)(t, x0)]
    for function in takes_t:
        for shape in ((3,), (4, 1), (1,), (4, 3)):
            with pytest.raises(ValueError, match="prefix of the shape of x"):
                function(jnp.full(shape, 0.5))
    for convert, *_ in CONVERSIONS.values():
        with pytest.raises(ValueError, match="one shape"):
            convert(path, jnp.full(4, 0.5), x0, x1[:, :1])
    with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
        fm.sample_path(path, x0, x1[:1], jnp.full(4, 0.5))
    with pytest.raises(ValueError, match="one event shape"):
        fm.marginal_velocity(path, x1)(jnp.full(4, 0.5), x0[:, :2])
    for make in (
        lambda: fm.cond_ot(sigma_min=1.0),
        lambda: fm.cond_ot(sigma_min=-0.1),
        lambda: fm.vp(beta_min=0.0),
        lambda: fm.vp(beta_min=2.0, beta_max=1.0),
        lambda: fm.polynomial(0),
        *(lambda f=f: f(float("nan")) for f in (fm.cond_ot, fm.vp, fm.polynomial)),
        lambda: fm.polynomial(np.inf),
    ):
        with pytest.raises(ValueError, match="must"):
            make()
    for t in (-0.1, 1.1, np.nan, np.array([0.5, 0.5, 0.5, 500.0])):
        for function in takes_t:
            with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
                function(t)


@pytest.mark.parametrize("n", [0.1, 0.5, 1.0, 1.5, 2, 7])
def test_polynomial_keeps_its_digits_near_both_ends(n):
    """Values and slopes in float32, against float64: 1 - t^n loses them where t^n is near 1."""
    path = fm.polynomial(n)
    t = jnp.array([0.0, 1e-6, 1e-3, 0.4, 0.6, 0.999, 1 - 1e-6, 1.0], jnp.float32)
    exact = np.asarray(t, np.longdouble)
    with np.errstate(divide="ignore"):
        log = np.log(exact)
        slope = n * np.exp((n - 1) * log) if n != 1 else np.ones_like(log)
    for function, value, sign in ((path.alpha, exact**n, 1), (path.sigma, -np.expm1(n * log), -1)):
        got, dot = jax.jvp(function, (t,), (jnp.ones_like(t),))
        tiny = float(jnp.finfo(jnp.float32).tiny)
        np.testing.assert_allclose(got, value.astype(np.float64), rtol=2e-6, atol=tiny)
        np.testing.assert_allclose(dot, sign * slope.astype(np.float64), rtol=2e-6, atol=tiny)
        np.testing.assert_array_equal(jit(lambda t, f=function: f(t))(t), got)


@all_paths
def test_velocity_and_score_of_a_gaussian(name, x64):
    """From E[x1 | x_t] of N(mean, std^2) to its velocity, its score and E[x0 | x_t]."""
    mean, std = np.array([0.7, -1.2]), np.array([0.5, 1.5])
    alpha, sigma, alpha_dot, sigma_dot = (
        a[:, None] for a in numerical_schedule(PATHS[name], INSIDE)
    )
    x, t = np.asarray(draw((2,))[0]), jnp.asarray(INSIDE)
    variance = alpha**2 * std**2 + sigma**2
    rate = (alpha * alpha_dot * std**2 + sigma * sigma_dot) / variance
    score = -(x - alpha * mean) / variance
    x1 = jnp.asarray(mean + alpha * std**2 / variance * (x - alpha * mean))
    u = fm.x1_to_velocity(PATHS[name], t, jnp.asarray(x), x1)
    np.testing.assert_allclose(u, alpha_dot * mean + rate * (x - alpha * mean), rtol=1e-6)
    got = fm.velocity_to_score(PATHS[name], t, jnp.asarray(x), u)
    np.testing.assert_allclose(got, score, rtol=1e-8)
    got = fm.velocity_to_x0(PATHS[name], t, jnp.asarray(x), u)
    np.testing.assert_allclose(got, -sigma * score, rtol=1e-8)


@all_paths
def test_marginal_velocity_is_the_posterior_mean(name, x64):
    rng = np.random.default_rng(0)
    data, x = rng.standard_normal((7, 2, 5)), rng.standard_normal((5, 2, 5))
    want = []
    for t, x_t in zip(INSIDE, x, strict=True):
        alpha, sigma, alpha_dot, sigma_dot = numerical_schedule(PATHS[name], t)
        log_weights = [-((x_t - alpha * x1) ** 2).sum() / (2 * sigma**2) for x1 in data]
        weights = np.exp(np.array(log_weights) - max(log_weights))
        each = [alpha_dot * x1 + sigma_dot * (x_t - alpha * x1) / sigma for x1 in data]
        want.append(np.average(each, axis=0, weights=weights))
    velocity = fm.marginal_velocity(PATHS[name], jnp.asarray(data))
    got = velocity(jnp.asarray(INSIDE), jnp.asarray(x))
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-6, atol=1e-6)
    one = velocity(jnp.asarray(INSIDE[2]), jnp.asarray(x[2:3]))
    np.testing.assert_allclose(one, got[2:3], rtol=1e-12)


def test_marginal_velocity_generates_its_data_set():
    noise, num = 1e-2, 2000
    data = jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.3, -1.2], [1.5, 1.5]])
    velocity = fm.marginal_velocity(fm.cond_ot(sigma_min=noise), data)
    x0 = jax.random.normal(jax.random.key(0), (num, 2))
    with jax.numpy_dtype_promotion("standard"):  # Diffrax relies on it
        x1 = np.asarray(jit(lambda x0: fm.sample(velocity, x0, num_steps=64))(x0))
    distance = np.linalg.norm(x1[:, None] - np.asarray(data)[None], axis=-1)
    assert distance.min(1).max() < 6 * noise  # of 2000 x 2 normal coordinates none lies beyond
    share = np.bincount(distance.argmin(1), minlength=4) / num
    standard_error = np.sqrt(0.25 * 0.75 / num)  # 0.0097
    np.testing.assert_allclose(share, 0.25, atol=4 * standard_error)
    # What lies around the points is their noise: its scale, to 5 standard errors of 1 / sqrt(8000).
    scale = np.sqrt((distance.min(1) ** 2).mean() / 2)
    np.testing.assert_allclose(scale, noise, rtol=5 / np.sqrt(4 * num))
