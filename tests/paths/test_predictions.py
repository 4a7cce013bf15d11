"""Networks that predict x1, x0 or a preconditioned output, against closed forms."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    PATHS,
    gaussian_predictions,
    gaussian_velocity,
    jit,
    numerical_schedule,
    quick_on,
    whitened_normal,
)
from oracles import x64 as x64

import fmjax as fm

MEAN, STD = np.array([0.7, -1.2, 0.3]), np.array([0.5, 1.5, 1.0])
INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])


def points(num=5, dtype=None):
    return jnp.asarray(np.random.default_rng(0).standard_normal((num, 3)), dtype)


@quick_on("vp")
def test_above_the_floor_they_are_the_exact_velocity(name, x64):
    path, t, x = PATHS[name], jnp.asarray(INSIDE), points()
    x1, x0 = gaussian_predictions(path, MEAN, STD)
    velocities = [fm.from_x1(path, x1, floor=1e-3), fm.from_x0(path, x0, floor=1e-5)]

    @jit
    def values(t, x):
        predictions = [v.predict(t, x) for v in velocities]
        want = gaussian_velocity(path, MEAN, STD)(t, x), (x1(t, x), x0(t, x))
        return [v(t, x) for v in velocities], predictions, want

    got, predictions, (u, both) = values(t, x)
    for i in (0, 1):
        np.testing.assert_allclose(got[i], u, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(predictions[i], both, rtol=1e-12, atol=1e-12)


def test_below_the_floor_the_error_is_the_stated_one(x64):
    """Of x0, (sigma / floor - 1) times, near the data; of x1 near the source, likewise."""
    path, x, floor = fm.cond_ot(), points(4), 0.2
    x1, x0 = gaussian_predictions(path, MEAN, STD)
    velocity = gaussian_velocity(path, MEAN, STD)
    t = jnp.array([0.85, 0.9, 0.99, 1.0])
    error = fm.from_x1(path, x1, floor=floor)(t, x) - velocity(t, x)
    share = (1 - t) / floor - 1
    np.testing.assert_allclose(error, -share[:, None] * x0(t, x), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(error[-1], 0, atol=1e-14)  # at the data nothing is wrong
    t = 1 - t
    error = fm.from_x0(path, x0, floor=floor)(t, x) - velocity(t, x)
    np.testing.assert_allclose(error, share[:, None] * x1(t, x), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(error[-1], -x1(t, x)[-1], rtol=1e-12)  # at the source the mean is


@pytest.mark.slow
def test_what_a_floor_costs_a_sample(x64):
    """The error of x(1) goes with the square of the floor from x1, with the floor from x0."""
    path, x = fm.cond_ot(), points()
    x1, x0 = gaussian_predictions(path, MEAN, STD)
    makers = [
        make(path, f, floor=floor)
        for make, f in ((fm.from_x1, x1), (fm.from_x0, x0))
        for floor in (0.08, 0.04)
    ]
    solve = jit(
        lambda x: [fm.sample(v, x, solver=diffrax.Midpoint(), num_steps=400) for v in makers]
    )
    want = MEAN + STD * np.asarray(x)
    errors = [np.abs(np.asarray(got) - want).max() for got in solve(x)]
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 2, atol=0.15)
    np.testing.assert_allclose(np.log2(errors[2] / errors[3]), 1, atol=0.15)


@quick_on("vp")
def test_the_preconditioned_target_has_unit_variance(name, x64):
    """F's target is a x1 / S + b x0 with a^2 + b^2 = 1, and its input has unit variance as well."""
    path, scale = PATHS[name], 0.7
    alpha, sigma, alpha_dot, sigma_dot = numerical_schedule(path, INSIDE)
    inputs = []

    def network(t, x):
        inputs.append(x)
        return jnp.zeros_like(x)

    def parts(f):
        """What the velocity makes of x = alpha S e1 + sigma e0, in terms of e1 and of e0."""
        x = jnp.asarray(np.stack([alpha * scale, sigma], axis=-1))
        return np.asarray(fm.precondition(path, f, scale)(jnp.asarray(INSIDE), x))

    skip = parts(network)
    output = parts(lambda t, x: jnp.ones_like(x)) - skip
    target = (np.stack([alpha_dot * scale, sigma_dot], axis=-1) - skip) / output
    np.testing.assert_allclose((target**2).sum(-1), 1, rtol=1e-8)
    np.testing.assert_allclose((np.asarray(inputs[0]) ** 2).sum(-1), 1, rtol=1e-14)


@quick_on("vp")
def test_without_a_network_it_is_the_flow_to_a_gaussian(name, x64):
    velocity = fm.precondition(PATHS[name], lambda t, x: jnp.zeros_like(x), 0.4)
    t, x = jnp.asarray(INSIDE), points()
    want = gaussian_velocity(PATHS[name], np.zeros(3), np.full(3, 0.4))(t, x)
    np.testing.assert_allclose(velocity(t, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_without_a_network_samples_are_gaussian():
    velocity = fm.precondition(fm.cond_ot(), lambda t, x: jnp.zeros_like(x), 0.4)
    x0 = whitened_normal(32, 2)
    x1 = jit(lambda x0: fm.sample(velocity, x0))(x0)
    np.testing.assert_allclose(x1, 0.4 * x0, atol=1e-4)


def test_edm_is_the_cosine_path(x64):
    """Its denoiser c_skip x + c_out F(c_in x), term by term, for an F that is no closed form."""
    data_std, noise = 0.5, np.array([0.002, 0.1, 0.5, 3.0, 80.0])
    x_edm = np.asarray(points()) * np.hypot(data_std, noise)[:, None]

    def network(t, x):
        return jnp.sin(3 * x) + t[:, None] * x

    theta = np.arctan2(data_std, noise)
    t = jnp.asarray(2 / np.pi * theta)
    square = noise**2 + data_std**2
    c_skip, c_out = data_std**2 / square, noise * data_std / np.sqrt(square)
    f = network(t, jnp.asarray(x_edm / np.sqrt(square)[:, None]))
    denoised = c_skip[:, None] * x_edm + c_out[:, None] * f

    x_t = jnp.asarray(np.sin(theta)[:, None] * x_edm / data_std)
    u = fm.precondition(fm.cosine(), network, 1.0)(t, x_t)
    np.testing.assert_allclose(u, np.pi / 2 * network(t, x_t), rtol=1e-14, atol=1e-14)
    x1 = data_std * fm.velocity_to_x1(fm.cosine(), t, x_t, u)
    np.testing.assert_allclose(x1, denoised, rtol=1e-13, atol=1e-13)


def test_jit_vmap_dtype_and_gradients():
    x, t = points(dtype=jnp.float32), jnp.asarray(INSIDE, jnp.float32)
    velocities = [
        fm.from_x1(fm.cond_ot(), lambda t, x: jnp.tanh(x), floor=0.1),
        fm.from_x0(fm.cond_ot(), lambda t, x: jnp.tanh(x), floor=0.1),
        fm.precondition(fm.vp(), lambda t, x: jnp.tanh(x), 0.5),
    ]
    for velocity in velocities:
        eager = velocity(t, x)
        np.testing.assert_allclose(jit(velocity)(t, x), eager, rtol=1e-5, atol=1e-5)
        one = jit(jax.vmap(lambda t, x, v=velocity: v(t, x[None])[0]))(t, x)
        np.testing.assert_allclose(one, eager, rtol=1e-5, atol=1e-5)
        low = velocity(t, x.astype(jnp.bfloat16))
        assert low.dtype == jnp.bfloat16
        # Rounded to 8 bits, and divided by a floor of 0.1.
        np.testing.assert_allclose(low.astype(jnp.float32), eager, rtol=0.1, atol=0.1)
    ends = jnp.array([0.0, 1.0])
    for velocity in velocities[:2]:
        slopes = jit(jax.grad(lambda t, x, v=velocity: v(t, x).sum(), (0, 1)))(ends, x[:2])
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_wrong_input_is_refused():
    path, x, f = fm.cond_ot(), points(dtype=jnp.float32), lambda t, x: x
    for make in (fm.from_x1, fm.from_x0):
        for floor in (-0.1, float("nan"), float("inf"), None, True, "0.05", jnp.ones(2)):
            with pytest.raises(ValueError, match="floor must be a finite number, not negative"):
                make(path, f, floor=floor)
        with pytest.raises(ValueError, match="f must be a function"):
            make(path, None, floor=0.1)
        with pytest.raises(ValueError, match=r"path must be a path; got the function cond_ot"):
            make(fm.cond_ot, f, floor=0.1)
        with pytest.raises(ValueError, match=r"f must return.*Nothing is broadcast"):
            make(path, lambda t, x: x[:, :1], floor=0.1)(jnp.array(0.5), x)
        with pytest.raises(ValueError, match="prefix of the shape of x"):
            make(path, f, floor=0.1)(jnp.full((5, 1), 0.5), x)
    with pytest.raises(ValueError, match=r"from_x1 has no finite value.*t = 1.*bounds 1 / sigma"):
        fm.from_x1(path, f, floor=0.0)(jnp.array(1.0), x)
    with pytest.raises(ValueError, match=r"from_x0 has no finite value.*t = 0.*bounds 1 / alpha"):
        fm.from_x0(path, f, floor=0.0)(jnp.array(0.0), x)
    fm.from_x0(fm.vp(), f, floor=0.0)(jnp.array(0.0), x)  # alpha(0) is 0.0066
    for data_std in (0.0, -1.0, float("nan"), None):
        with pytest.raises(ValueError, match="data_std must be a finite number, positive"):
            fm.precondition(path, f, data_std)
    with pytest.raises(ValueError, match="precondition has no finite value"):
        fm.precondition(fm.vp(), f, 0.5)(jnp.array(1.0), x)
