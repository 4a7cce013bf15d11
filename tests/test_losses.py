"""The loss against numpy, theorem 2, and the error of many tutorials: the target (x1 - x0) / t."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture

import fmjax as fm


def path_sample(shape=(4, 2, 3), dtype=jnp.float32):
    t, x_t, u_t = np.random.default_rng(0).uniform(0, 1, (3, *shape))
    return fm.PathSample(
        jnp.asarray(t[(slice(None),) + (0,) * (len(shape) - 1)], jnp.float32),
        jnp.asarray(x_t, dtype),
        jnp.asarray(u_t, dtype),
    )


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2, 3), (4,)])
def test_one_value_per_example(shape):
    sample = path_sample(shape)

    def velocity(t, x):
        return x * t.reshape(-1, *[1] * (x.ndim - 1))

    want = []
    for t, x_t, u_t in zip(*(np.asarray(a, np.float64) for a in sample), strict=True):
        want.append(np.mean((t * x_t - u_t) ** 2))
    loss = fm.cfm_loss(velocity, sample)
    np.testing.assert_allclose(loss, want, rtol=1e-5)  # a difference of numbers near 1
    np.testing.assert_allclose(jit(lambda s: fm.cfm_loss(velocity, s))(sample), want, rtol=1e-5)


def test_zero_at_the_target_and_one_call():
    sample, calls = path_sample(), []

    def velocity(t, x):
        calls.append((t, x))
        return sample.u_t

    np.testing.assert_array_equal(fm.cfm_loss(velocity, sample), np.zeros(4))
    ((t, x),) = calls
    assert t is sample.t and x is sample.x_t


def test_shapes_must_agree():
    sample = path_sample((4, 3))
    for wrong in (lambda t, x: x[:, :1], lambda t, x: x[0], lambda t, x: x[None]):
        with pytest.raises(ValueError, match=r"the velocity must return .* shape \(4, 3\)"):
            fm.cfm_loss(wrong, sample)
    with pytest.raises(ValueError, match="x_t and u_t must have one shape"):
        fm.cfm_loss(lambda t, x: x, sample._replace(u_t=sample.u_t[:, :1]))


def test_at_least_float32():
    low = path_sample((4, 300), dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        loss = fm.cfm_loss(lambda t, x: x, low)
    assert loss.dtype == jnp.float32
    x_t, u_t = (np.asarray(a.astype(jnp.float32), np.float64) for a in low[1:])
    np.testing.assert_allclose(loss, ((x_t - u_t) ** 2).mean(1), rtol=1e-6)  # not summed in bf16
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        assert fm.cfm_loss(lambda t, x: x, path_sample(dtype=jnp.float64)).dtype == jnp.float64


def test_theorem_2():
    """The gradient of the conditional loss is, in the mean, that of the marginal loss.

    Both are taken example by example at the same (t, x_t), so the standard error is that of their
    difference. A target that is off by a tenth is told from the right one.
    """
    data = jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.3, -1.2], [1.5, 1.5]])
    num, path = 80_000, fm.cosine()
    key_x0, key_x1, key_t = jax.random.split(jax.random.key(0), 3)
    x0 = jax.random.normal(key_x0, (num, 2))
    x1 = data[jax.random.randint(key_x1, (num,), 0, len(data))]
    sample = fm.sample_path(path, x0, x1, fm.uniform(key_t, (num,)))
    marginal = sample._replace(u_t=fm.marginal_velocity(path, data)(sample.t, sample.x_t))
    params = {"matrix": jnp.array([[0.5, -0.2], [0.1, 0.3]]), "slope": jnp.array([0.4, -0.7])}

    def velocity(params, t, x):
        drift = t[:, None] * params["slope"][None] + jnp.array([[0.1, -0.2]])
        return jnp.tanh(x @ params["matrix"] + drift)

    @jit
    def gradients(sample):
        def loss(params, example):
            example = jax.tree.map(lambda a: a[None], example)
            return fm.cfm_loss(lambda t, x: velocity(params, t, x), example)[0]

        return jax.vmap(jax.grad(loss), (None, 0))(params, sample)

    def standard_errors_apart(conditional):
        a, b = (
            np.concatenate([g.reshape(num, -1) for g in jax.tree.leaves(gradients(s))], 1)
            for s in (conditional, marginal)
        )
        difference = (a - b).astype(np.float64)
        standard_error = difference.std(0) / np.sqrt(num)
        assert standard_error.max() < 0.005  # against derivatives of up to 0.2
        return np.abs(difference.mean(0)) / standard_error

    assert standard_errors_apart(sample).max() < 3.5
    assert standard_errors_apart(sample._replace(u_t=1.1 * sample.u_t)).max() > 5


@pytest.mark.slow
def test_the_target_divided_by_t_is_wrong():
    """N(0, 1) to N(2, 1/4): the least-squares velocity, linear in x at each of 40 times, solved.

    With u_t = x1 - x0 it carries mean 0, std 1 to mean 2, std 0.5. With (x1 - x0) / t, which some
    tutorials regress on, it arrives at 3.3 and 0.004 instead. The source draws have exactly mean
    0 and std 1.
    """
    num, num_times, mean, std = 4096, 40, 2.0, 0.5
    times = (np.arange(num_times) + 0.5) / num_times
    key_x0, key_x1 = jax.random.split(jax.random.key(0))
    x0 = jax.random.normal(key_x0, (num_times, num))
    x1 = mean + std * jax.random.normal(key_x1, (num_times, num))
    t = jnp.asarray(times, jnp.float32)
    _, x_t, u_t = (np.asarray(a, np.float64) for a in fm.sample_path(fm.cond_ot(), x0, x1, t))

    def generate(target):
        lines = [np.polyfit(x, u, 1) for x, u in zip(x_t, target, strict=True)]
        slope, offset = (jnp.asarray(c, jnp.float32) for c in np.transpose(lines))
        x = np.random.default_rng(0).standard_normal((num, 1))
        x = jnp.asarray((x - x.mean()) / x.std(), jnp.float32)

        def velocity(s, x):
            return jnp.interp(s, t, slope) * x + jnp.interp(s, t, offset)

        with jax.numpy_dtype_promotion("standard"):  # Diffrax relies on it
            x = jit(lambda x: fm.sample(velocity, x, num_steps=num_times))(x)
        return float(x.mean()), float(x.std())

    # The slopes and offsets are estimates: 40 x 4096 draws leave about 0.005 in either moment.
    np.testing.assert_allclose(generate(u_t), (mean, std), atol=0.02)
    wrong_mean, wrong_std = generate(u_t / times[:, None])
    assert wrong_mean > mean + 1 and wrong_std < 0.1 * std
