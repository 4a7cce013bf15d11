"""The four identities of an average velocity, on the Gaussian's, along every path; few steps."""

import functools
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    PATHS,
    gaussian_average_velocity,
    gaussian_flow,
    gaussian_velocity,
    jit,
    quick_on,
)
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax import flow_maps, models

MEAN, STD = np.array([1.3, -0.4]), np.array([0.4, 1.6])
T, S = np.array([0.05, 0.3, 0.5, 0.9]), np.array([0.95, 0.85, 0.6, 0.97])


def points(num=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(num, 2)))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@quick_on("cond_ot_0.1", "cosine")
def test_the_four_identities(name, x64):
    path, x = PATHS[name], points()
    average = gaussian_average_velocity(path, MEAN, STD)
    velocity = gaussian_velocity(path, MEAN, STD)
    jump = flow_maps.flow_map(average)

    @jit
    def sides(t, s):
        h, u, r = (s - t)[:, None], velocity(t, x), t + 0.3 * (s - t)
        _, start = jax.jvp(lambda t, x: average(t, s, x), (t, x), (jnp.ones_like(t), u))
        x_s, end = jax.jvp(lambda s: jump(t, s, x), (s,), (jnp.ones_like(s),))
        parts = average(t, r, x), average(r, s, jump(t, r, x))
        both = (r - t)[:, None] * parts[0] + (s - r)[:, None] * parts[1]
        whole, boundary = average(t, s, x), flow_maps.instantaneous(average)(t, x)
        pairs = (boundary, u), (whole, u + h * start), (end, velocity(s, x_s)), (h * whole, both)
        return pairs, average(t, t + 1e-6, x) - u, h * start

    pairs, near, term = sides(jnp.asarray(T), jnp.asarray(S))
    for got, want in pairs:
        close(got, want)
    np.testing.assert_allclose(near, 0.0, atol=1e-4)  # h u' / 2, and 1e-16 / h
    assert np.abs(term).max() > 0.05  # or its sign would not matter


def test_the_map_is_the_flow(x64):
    flow = gaussian_flow((2,), sigma_min=0.1)
    average = gaussian_average_velocity(fm.cond_ot(0.1), flow.mean, flow.std)
    x0 = points()
    x_t = jnp.asarray(flow.flow(0.3, x0))
    close(flow_maps.flow_map(average)(jnp.array(0.3), jnp.array(0.8), x_t), flow.flow(0.8, x0))


def test_any_number_of_exact_steps_is_the_flow(x64):
    flow = gaussian_flow((2,))
    average = gaussian_average_velocity(fm.cond_ot(), flow.mean, flow.std)
    x0 = points()
    for ts in ([0.0, 1.0], [0.0, 0.7, 1.0], np.linspace(0, 1, 6), [0.0, 0.5, 0.5, 1.0]):
        got = jit(lambda ts: flow_maps.sample_steps(average, x0, ts))(jnp.asarray(ts))
        close(got, flow.flow(1.0, x0))
    part = flow_maps.sample_steps(average, jnp.asarray(flow.flow(0.2, x0)), jnp.array([0.2, 0.6]))
    close(part, flow.flow(0.6, x0))


def test_one_call_per_step_and_a_state_in_float32():
    ts, calls = jnp.linspace(0, 1, 6), {"steps": [], "renoised": []}

    def average(t, s, x, name):
        assert x.dtype == jnp.float32
        jax.debug.callback(lambda t, s: calls[name].append((t.item(), s.item())), t, s)
        return jnp.full_like(x, 2**-10)

    @jit
    def draw(x0, key):
        steps, renoised = (functools.partial(average, name=name) for name in calls)
        flow_maps.sample_renoised(key, renoised, fm.cond_ot(), x0, ts)
        return flow_maps.sample_steps(steps, x0, ts)

    x = draw(jnp.ones((3, 2), jnp.bfloat16), jax.random.key(0))
    jax.effects_barrier()
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(sorted(calls["steps"]), np.stack([ts[:-1], ts[1:]], 1))
    np.testing.assert_allclose(sorted(calls["renoised"]), [(t, 1.0) for t in ts[:-1]])


@quick_on("cond_ot_0.1", names=("cond_ot_0.1", "cond_ot", "cosine"))
def test_renoised_states_keep_the_law_of_the_path(name):
    """Mean and standard deviation at t = 1 of 40,000 draws within four standard errors."""
    path, num = PATHS[name], 40_000
    mean, std = np.array([0.7]), np.array([0.5])
    average = gaussian_average_velocity(path, mean, std)
    key_x0, key = jax.random.split(jax.random.key(0))
    x0 = jax.random.normal(key_x0, (num, 1))
    ts = jnp.array([0.0, 0.3, 0.8, 1.0])
    draw = jit(functools.partial(flow_maps.sample_renoised, average_velocity=average, path=path))
    x = np.asarray(draw(key, x0=x0, ts=ts), np.float64)
    alpha, sigma = (float(f(jnp.float32(1.0))) for f in path)
    want = np.sqrt(alpha**2 * std[0] ** 2 + sigma**2)
    assert abs(x.mean() - alpha * mean[0]) < 4 * want / np.sqrt(num)
    assert abs(x.std() - want) < 4 * want / np.sqrt(2 * num)
    assert abs(np.corrcoef(x[:, 0], x0[:, 0])[0, 1]) < 0.9  # the noise is fresh: the flow keeps it


@pytest.mark.slow
def test_the_velocity_of_an_average_velocity_is_solved_as_any(x64):
    flow = gaussian_flow((2,), sigma_min=0.1)
    average = gaussian_average_velocity(fm.cond_ot(0.1), flow.mean, flow.std)
    x0 = points()
    velocity = flow_maps.instantaneous(average)
    draw = jit(lambda x0: fm.sample(velocity, x0, solver=diffrax.Midpoint(), num_steps=100))
    np.testing.assert_allclose(draw(x0), flow.flow(1.0, x0), atol=1e-3)  # second order


MLP = models.MLP(features=(4,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda jump, x: jump(0.5, 0.25, x), r"s must not be before t.*got s - t down to -0\.25"),
        (lambda jump, x: jump(jnp.zeros(2), 0.4, x), r"t must have the shape \[\] or \[batch\]"),
        (lambda jump, x: jump(0.0, 1.5, x), r"s must be in \[0, 1\]"),
        (lambda jump, x: jump(-0.5, 0.5, x), r"t must be in \[0, 1\]"),
        (lambda *_: flow_maps.flow_map(cast(Any, None)), "must be a function"),
        (lambda *_: flow_maps.flow_map(cast(Any, MLP.apply)), r"horizon=s - t\)"),
        (
            lambda *_: flow_maps.flow_map(functools.partial(MLP.apply, {})),
            "takes no s. Build the model with horizon=True",
        ),
        (
            lambda _, x: flow_maps.flow_map(lambda t, s, x: x[:, :1])(x[0, 0], x[0, 0], x),
            r"the average velocity must return .* shape \(3, 2\)",
        ),
        (
            lambda _, x: flow_maps.sample_steps(lambda t, s, x: x, x, jnp.array([1.0, 0.0])),
            "ts must ascend",
        ),
        (
            lambda _, x: flow_maps.sample_steps(lambda t, s, x: x, x, jnp.array(1.0)),
            r"\[num_steps \+ 1\], at least two times; got float32 \(\)",
        ),
        (
            lambda _, x: flow_maps.sample_steps(lambda t, s, x: x, x, cast(Any, 4)),
            r"\[num_steps \+ 1\], at least two times; got 4. jnp.linspace",
        ),
        (
            lambda _, x: flow_maps.sample_renoised(
                jax.random.key(0), lambda t, s, x: x, fm.cond_ot(), x, jnp.array([0.0, 0.5])
            ),
            "ts must end at 1.*got 0.5. Append a 1",
        ),
    ],
)
def test_errors_name_the_rule_and_the_fix(call, message):
    jump = flow_maps.flow_map(lambda t, s, x: jnp.zeros_like(x))
    with pytest.raises(ValueError, match=message):
        call(jump, jnp.zeros((3, 2)))
