"""Densities against closed forms, and the divergences one by one."""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_flow, jit
from oracles import x64 as x64

import fmjax as fm
from fmjax.solve import each

FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)
T = jnp.asarray(0.3)
KEY = jax.random.key(0)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def conv_velocity(t, x):
    """A small network on images; no two examples see one another."""
    dims = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=dims
    )
    hidden = jnp.tanh(conv(x, 0.3 * draw((3, 3, 2, 4), 1)) + t)
    return conv(hidden, 0.3 * draw((3, 3, 4, 2), 2)) * (1 + x)


def dense_velocity(t, x):
    return jnp.tanh(x @ draw((5, 7), 1) + t) @ draw((7, 5), 2)


# A velocity, the shape of a batch, chunk sizes: one, one that divides, two that do not, all.
CASES = {
    "image": (conv_velocity, (3, 4, 4, 2), (1, 8, 5, 13, 32, 100)),
    "vector": (dense_velocity, (3, 5), (1, 2, 5, 16)),
    "scalar": (lambda t, x: jnp.sin(x + t), (3,), (1, 16)),
}


def jacobians(velocity, x):
    """[batch, D, D], one example at a time."""

    def one(x):
        return velocity(T, x[None])[0]

    return jax.vmap(jax.jacfwd(one))(x).reshape(len(x), x[0].size, x[0].size)


@pytest.mark.parametrize("name", CASES)
def test_exact_divergence_is_the_trace(name):
    velocity, shape, chunk_sizes = CASES[name]
    x = draw(shape)
    want = jnp.trace(jit(lambda x: jacobians(velocity, x))(x), axis1=1, axis2=2)
    for chunk_size in chunk_sizes:
        u, div = jit(lambda x, c=chunk_size: fm.exact_divergence(c)(velocity, T, x))(x)
        np.testing.assert_allclose(div, want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(u, velocity(T, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["image", "vector"])
@pytest.mark.parametrize("num_probes", [1, 3])
def test_hutchinson_is_unbiased_and_has_its_variance(name, num_probes):
    """Against the trace and 2 / num_probes sum_{i != j} S_ij^2, S = (J + J^T) / 2."""
    velocity, shape, _ = CASES[name]
    x, num_keys = draw(shape), 4096
    jacobian = np.asarray(jit(lambda x: jacobians(velocity, x))(x), np.float64)
    symmetric = (jacobian + jacobian.transpose(0, 2, 1)) / 2
    diagonal = np.diagonal(symmetric, axis1=1, axis2=2)
    variance = 2 / num_probes * ((symmetric**2).sum((1, 2)) - (diagonal**2).sum(1))

    @jit
    def estimates(keys):
        return jax.lax.map(
            lambda key: fm.hutchinson_divergence(key, num_probes)(velocity, T, x)[1], keys
        )

    got = np.asarray(estimates(jax.random.split(KEY, num_keys)), np.float64)
    standard_error = np.sqrt(variance / num_keys)
    assert (np.abs(got.mean(0) - diagonal.sum(1)) < 4 * standard_error).all()
    # A sample variance of n draws has the relative standard error sqrt((kurtosis - 1) / n): up to
    # 0.045 here for kurtoses up to 9; the formula without its 2, or with S for J, is further off.
    centred = got - got.mean(0)
    kurtosis = (centred**4).mean(0) / (centred**2).mean(0) ** 2
    np.testing.assert_array_less(
        np.abs(got.var(0) / variance - 1), 4 * np.sqrt((kurtosis - 1) / num_keys)
    )
    # Batch members have probes of their own, so their errors do not go together.
    off_diagonal = np.corrcoef(got.T)[~np.eye(len(x), dtype=bool)]
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(num_keys)


@pytest.mark.slow
def test_hutchinson_probes_depend_on_the_key_alone():
    x = draw((3, 5))
    at = [fm.hutchinson_divergence(KEY)(lambda t, x: x @ draw((5, 5), 1), t, x) for t in (0.1, 0.9)]
    np.testing.assert_array_equal(at[0][1], at[1][1])  # a linear velocity: the probe alone shows
    other = fm.hutchinson_divergence(jax.random.key(1))(lambda t, x: x @ draw((5, 5), 1), T, x)
    assert (other[1] != at[0][1]).all()
    solve = jit(lambda x: fm.log_prob(rotate, x, divergence=fm.hutchinson_divergence(KEY, 2)))
    np.testing.assert_array_equal(solve(x), solve(x))


def rotate(t, x):
    return jnp.tanh(x[:, ::-1] + t)


def test_hutchinson_log_prob_of_a_linear_flow():
    """With fixed probes the integral of e . A e is e . A e, whatever steps the solver takes."""
    matrix = 0.3 * draw((4, 4), 1)
    x1 = draw((3, 4))

    def velocity(t, x):
        return x @ matrix

    divergence = fm.hutchinson_divergence(KEY, 2)
    _, estimate = divergence(velocity, T, x1)
    x0 = fm.sample(velocity, x1, t0=1.0, t1=0.0, num_steps=8)
    got = jit(lambda x: fm.log_prob(velocity, x, divergence=divergence, num_steps=8))(x1)
    np.testing.assert_allclose(got, fm.standard_normal_log_prob(x0) - estimate, rtol=1e-5)


@pytest.mark.parametrize("event_shape", [(2,), (64,), (2, 3, 2)])
def test_log_prob_of_a_gaussian(event_shape):
    """Absolute, in 64 dimensions too, where log p is about -90 nats; and the samples' own."""
    flow = gaussian_flow(event_shape, sigma_min=0.1)
    x0 = draw((8, *event_shape))
    x1 = jnp.asarray(flow.flow(1.0, x0), jnp.float32)
    log_prob = functools.partial(fm.log_prob, flow.velocity, stepsize_controller=FINE)
    got = jit(log_prob)(x1)
    np.testing.assert_allclose(got, flow.log_prob(1.0, x1), rtol=0, atol=1e-4)
    if event_shape == (2,):
        np.testing.assert_allclose(log_prob(x1), got, rtol=1e-5)  # eager
    both = functools.partial(fm.sample_and_log_prob, flow.velocity, stepsize_controller=FINE)
    sample, own = jit(both)(x0)
    np.testing.assert_allclose(sample, x1, atol=1e-4)
    np.testing.assert_allclose(own, flow.log_prob(1.0, sample), rtol=0, atol=1e-4)
    np.testing.assert_allclose(own, jit(log_prob)(sample), rtol=0, atol=1e-4)


def test_log_prob_over_part_of_the_time():
    flow, x = gaussian_flow((3,)), draw((4, 3))
    got = jit(lambda x: fm.log_prob(flow.velocity, x, t1=0.6, num_steps=16))(x)
    np.testing.assert_allclose(got, flow.log_prob(0.6, x), atol=1e-4)


@pytest.mark.slow
def test_another_source():
    """A uniform source on [-1, 1]^2, doubled and shifted: density 1/16 inside, 0 outside."""

    def log_uniform(x):
        inside = jnp.all(jnp.abs(x) <= 1, axis=-1)
        return jnp.where(inside, -2 * jnp.log(2.0), -jnp.inf)

    def velocity(t, x):
        return jnp.log(2.0) * x

    x = jnp.array([[1.9, -1.9], [2.1, 0.0], [0.0, 0.3]])
    how = {"source_log_prob": log_uniform, "num_steps": 8}
    got = jit(lambda x: fm.log_prob(velocity, x, **how))(x)
    np.testing.assert_allclose(got, [-np.log(16), -np.inf, -np.log(16)], rtol=1e-5)
    x1, got = jit(lambda x: fm.sample_and_log_prob(velocity, x, **how))(x / 2)
    np.testing.assert_allclose(x1, x, rtol=1e-5)
    np.testing.assert_allclose(got, [-np.log(16), -np.inf, -np.log(16)], rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_log_prob(x64):
    """In the data: the score, in closed form. In a parameter and in the data: differences."""
    flow = gaussian_flow((2,), sigma_min=0.1)
    x = jnp.asarray(flow.flow(1.0, np.random.default_rng(0).standard_normal((3, 2))))

    def total(a, x):
        def velocity(t, x):
            return flow.velocity(t, x) + (a - 1) * jnp.sin(x)

        return fm.log_prob(velocity, x, num_steps=32).sum()

    values, one, step = jit(total), jnp.asarray(1.0), 1e-4
    of_a, of_x = jit(jax.grad(total, (0, 1)))(one, x)
    np.testing.assert_allclose(of_x, -(np.asarray(x) - flow.mean) / flow.variance(1.0), rtol=1e-5)
    difference = (values(one + step, x) - values(one - step, x)) / (2 * step)
    np.testing.assert_allclose(of_a, difference, rtol=1e-6)
    for i, j in itertools.product(range(3), range(2)):
        shift = step * np.eye(6)[2 * i + j].reshape(3, 2)
        difference = (values(one, x + shift) - values(one, x - shift)) / (2 * step)
        np.testing.assert_allclose(of_x[i, j], difference, rtol=1e-6)


def test_dtypes():
    x = draw((3, 2)).astype(jnp.bfloat16)
    how = {"num_steps": 4}
    log_p = jit(lambda x: fm.log_prob(lambda t, x: -x, x, **how))(x)
    x1, own = jit(lambda x: fm.sample_and_log_prob(lambda t, x: -x, x, **how))(x)
    assert (log_p.dtype, x1.dtype, own.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    x = np.asarray(x.astype(jnp.float32), np.float64)
    want = -(np.e**2 * x**2).sum(1) / 2 - np.log(2 * np.pi) + 2
    np.testing.assert_allclose(log_p, want, rtol=1e-4)  # the error of four steps
    np.testing.assert_allclose(own, -(x**2).sum(1) / 2 - np.log(2 * np.pi) + 2, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 64, 3072])
def test_the_log_determinant_is_as_good_in_any_dimension(dim):
    """x stays at 0 and div v = 20 D cos(20 t): among D errors of x the integral's own counts."""

    def divergence(velocity, t, x):
        return velocity(t, x), dim * 20 * jnp.cos(20 * t) * jnp.ones(len(x))

    def velocity(t, x):
        return 20 * jnp.cos(20 * t) * jnp.sin(x)

    x = jnp.zeros((2, dim))
    got = [
        jit(lambda x, f=f: f(velocity, x, divergence=divergence))(x)
        for f in (
            fm.log_prob,
            each.log_prob_each,
            lambda *a, **k: fm.sample_and_log_prob(*a, **k)[1],
        )
    ]
    source = -0.5 * dim * np.log(2 * np.pi)
    log_det = dim * np.sin(20.0)
    for log_p in got:
        # In one dimension the error is 2.3e-5 of it; in float32 a sum of 3,072 rounds to 1e-6.
        np.testing.assert_allclose(log_p - source, -log_det, rtol=5e-5)


@pytest.mark.slow
def test_kinked_activations_want_dopri5():
    """What the docstring of `log_prob` says, counted on a network of SELUs."""
    weights = [0.9 * draw(shape, seed) for seed, shape in enumerate([(3, 32), (32, 32), (32, 2)])]

    def velocity(t, x):
        h = jnp.concatenate([x, jnp.broadcast_to(t, (len(x), 1))], axis=1)
        for w in weights[:-1]:
            h = jax.nn.selu(h @ w / np.sqrt(len(w)))
        return 2 * h @ weights[-1] / np.sqrt(32)

    x = draw((32, 2), 7)
    counts = [
        int(jit(lambda x, s=s: fm.integrate_log_prob(velocity, x, solver=s))(x).num_evaluations)
        for s in (diffrax.Tsit5(), diffrax.Dopri5())
    ]
    assert counts[0] > 1.5 * counts[1], counts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_densities_of_half_precision_are_summed_and_returned_in_float32(dtype):
    x = jnp.full((1, 3072), 8.0, dtype)
    log_p = fm.standard_normal_log_prob(x)
    assert log_p.dtype == jnp.float32
    np.testing.assert_allclose(log_p, -0.5 * 3072 * (64 + np.log(2 * np.pi)), rtol=1e-6)
    bits = fm.bits_per_dim(jnp.full(2, -1000.0, dtype), (32, 32, 3))
    assert bits.dtype == jnp.float32
    np.testing.assert_allclose(bits, 7 + 1000 / 3072 / np.log(2), rtol=1e-5)
    for divergence in (fm.exact_divergence(1024), fm.hutchinson_divergence(KEY)):
        u, div = jit(lambda x, d=divergence: d(lambda t, x: 3 * x, T, x))(x)
        assert (u.dtype, div.dtype) == (dtype, jnp.float32)
        np.testing.assert_array_equal(div, [3 * 3072])  # a sum in bfloat16 would stop at 768
    data = jnp.asarray(draw((5, 64)), dtype)
    velocity = fm.marginal_velocity(fm.cond_ot(1e-2), data)
    got = velocity(jnp.asarray(0.5, dtype), data)
    want = fm.marginal_velocity(fm.cond_ot(1e-2), data.astype(jnp.float32))(
        jnp.asarray(0.5), data.astype(jnp.float32)
    )
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=1e-2, atol=1e-2)


def test_standard_normal_log_prob():
    x = draw((3, 2, 2))
    want = [sum(-(v**2) / 2 - np.log(np.sqrt(2 * np.pi)) for v in e.ravel()) for e in np.asarray(x)]
    np.testing.assert_allclose(fm.standard_normal_log_prob(x), want, rtol=1e-6)


def test_bits_per_dim():
    shape = (4, 4, 3)
    uniform = jnp.full(2, -48 * np.log(2.0))  # density 1/2 in each of 48 dimensions on [-1, 1]
    np.testing.assert_allclose(fm.bits_per_dim(uniform, shape), [8.0, 8.0], rtol=1e-6)
    got = fm.bits_per_dim(uniform, shape, num_levels=17)
    np.testing.assert_allclose(got, np.full(2, np.log2(17)), rtol=1e-6)
    got = fm.bits_per_dim(jnp.zeros(1), shape, num_levels=32, low=0.0, high=1.0)
    np.testing.assert_allclose(got, [5.0], rtol=1e-6)
    # Three levels of chances 1/2, 1/4 and 1/4, each a flat piece of the density: the entropy is 1.5
    # bits. Each chance is spread over a piece of width 2 / 3.
    chances = np.array([0.5, 0.25, 0.25])
    bits = fm.bits_per_dim(jnp.asarray(np.log(chances * 3 / 2), jnp.float32), (1,), num_levels=3)
    np.testing.assert_allclose((chances * bits).sum(), 1.5, rtol=1e-6)


def test_errors():
    for make in (lambda: fm.exact_divergence(0), lambda: fm.hutchinson_divergence(KEY, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            make()
    nan = float("nan")
    bounds = [{"num_levels": 1}, {"num_levels": nan}, {"low": 1.0, "high": 1.0}, {"low": nan}]
    bounds += [{"high": nan}, {"high": np.inf}]
    for shape, how in (((0,), {}), *(((2,), how) for how in bounds)):
        with pytest.raises(ValueError, match="bits_per_dim needs"):
            fm.bits_per_dim(jnp.zeros(1), shape, **how)
    x = draw((3, 2))
    with pytest.raises(ValueError, match="excludes stepsize_controller"):
        fm.log_prob(rotate, x, num_steps=3, stepsize_controller=FINE)
    with pytest.raises(ValueError, match="Euler has no error estimate"):
        fm.sample_and_log_prob(rotate, x, solver=diffrax.Euler())
    with pytest.raises(RuntimeError, match="max_steps = 2 were taken"):
        jax.block_until_ready(jit(lambda x: fm.log_prob(rotate, x, max_steps=2))(x))


@pytest.mark.slow
def test_estimates_side_by_side():
    """Each probe's own log-density; their mean is what `hutchinson_divergence` gives."""
    x = draw((3, 5))

    def solve(divergence):
        how = {"divergence": divergence, "num_steps": 8}
        return jit(lambda x: fm.integrate_log_prob(dense_velocity, x, **how))(x)

    got, mean = solve(fm.hutchinson_estimates(KEY, 4)), solve(fm.hutchinson_divergence(KEY, 4))
    assert got.log_prob.shape == (4, 3) and got.num_evaluations == 49
    np.testing.assert_allclose(got.log_prob.mean(0), mean.log_prob, rtol=1e-5)
    assert (np.asarray(got.log_prob).std(0) > 1e-2).all()
    back = jit(lambda x: fm.sample(dense_velocity, x, t0=1.0, t1=0.0, num_steps=8))(x)
    np.testing.assert_allclose(got.x0, back, rtol=1e-5, atol=1e-6)
    how = {"divergence": fm.hutchinson_estimates(KEY, 4), "num_steps": 8}
    x1, own = jit(lambda x: fm.sample_and_log_prob(dense_velocity, x, **how))(got.x0)
    np.testing.assert_allclose(x1, x, rtol=0, atol=1e-3)  # forth and back in eight steps
    np.testing.assert_allclose(own, got.log_prob, rtol=0, atol=1e-2)


def test_gaussian_probes_have_their_variance():
    """2 sum_ij S_ij^2, the diagonal included: for the identity 2 D, where signs have none."""
    x = draw((1, 6))

    def estimates(probe):
        divergence = fm.hutchinson_estimates(KEY, 20_000, probe=probe)
        return np.asarray(divergence(lambda t, x: x, T, x)[1], np.float64)

    np.testing.assert_allclose(estimates(jax.random.rademacher), 6.0, rtol=1e-6)
    got = estimates(jax.random.normal)
    assert abs(got.mean() - 6) < 4 * np.sqrt(12 / 20_000)
    assert abs(got.var() / 12 - 1) < 0.08  # four standard errors; a kurtosis of 5


def test_the_exact_trace_needs_bounded_memory():
    """Chunked, its memory grows as the image does, not as the square of its size."""

    def temporary_bytes(side, chunk_size):
        def divergence(x):
            return fm.exact_divergence(chunk_size)(conv_velocity, T, x)[1]

        compiled = jit(divergence).lower(jnp.zeros((1, side, side, 2))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = (temporary_bytes(side, 16) for side in (16, 32))
    assert large < 5 * small  # four times the pixels; a whole Jacobian would take sixteen times
    whole = temporary_bytes(32, 32 * 32 * 2)
    assert whole > 50 * large  # 128 times as many products at once
