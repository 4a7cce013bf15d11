"""Consistency: constant along the flow, tied to MeanFlow at small steps, ECT's closed forms."""

import functools

import diffrax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_average_velocity, gaussian_flow, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax import flow_maps
from fmjax.flow_maps import consistency_loss, ect_next, ect_weight, flow_map


def network(params, t, s, x):
    times = t[:, None] * params["t"][None] + s[:, None] * params["s"][None]
    return jnp.tanh(x @ params["in"] + times) @ params["out"]


def setting(num=6):
    rng = np.random.default_rng(0)
    shapes = {"in": (2, 5), "t": (5,), "s": (5,), "out": (5, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x0, x1 = jnp.asarray(rng.normal(size=(2, num, 2)))
    return params, x0, x1


def test_consistency_is_constant_along_the_gaussian_flow(x64):
    flow = gaussian_flow((2,))
    average = gaussian_average_velocity(fm.cond_ot(), flow.mean, flow.std)
    x0 = np.random.default_rng(0).normal(size=(4, 2))
    jump = jit(flow_map(average))
    for t in (0.0, 0.3, 0.9):
        x_t = jnp.asarray(flow.flow(t, x0))
        np.testing.assert_allclose(
            jump(jnp.asarray(t), jnp.asarray(1.0), x_t), flow.flow(1.0, x0), rtol=1e-9
        )


@pytest.mark.slow
def test_consistency_is_constant_along_a_solved_trajectory(x64):
    """Of the exact flow to three points. U is solved from each of its states on, by itself."""
    data = jnp.asarray([[0.5, -1.0], [-0.8, 0.3], [1.0, 1.0]])
    velocity = fm.marginal_velocity(fm.cond_ot(0.2), data)
    solver = {"solver": diffrax.Tsit5(), "num_steps": 60}

    def average(t, s, x):
        return (fm.sample(velocity, x, t0=t, t1=s, **solver) - x) / (s - t)

    @jit
    def ends(x0):
        ts = jnp.array([0.25, 0.6, 0.9])
        states = fm.integrate(velocity, x0, ts=jnp.append(ts, 1.0), **solver).x
        jump = flow_map(average)
        one = jnp.asarray(1.0)
        return jax.lax.map(lambda tx: jump(tx[0], one, tx[1]), (ts, states[:-1])), states

    got, states = ends(jnp.asarray(np.random.default_rng(0).normal(size=(4, 2))))
    np.testing.assert_allclose(got, np.broadcast_to(states[-1], got.shape), atol=1e-5)
    assert np.abs(np.asarray(states[:-1]) - np.asarray(states[-1])).max() > 0.5


def test_the_loss_by_hand_and_a_target_without_gradient(x64):
    params, x0, x1 = setting()
    path, t, t_next = fm.cosine(), jnp.linspace(0.1, 0.5, 6), jnp.linspace(0.3, 0.9, 6)

    def f(params, t, x_t):
        return x_t + (1 - t)[:, None] * network(params, t, jnp.ones_like(t), x_t)

    later = path.alpha(t_next)[:, None] * x1 + path.sigma(t_next)[:, None] * x0
    now = path.alpha(t)[:, None] * x1 + path.sigma(t)[:, None] * x0

    def by_hand(params):
        return ((f(params, t, now) - jax.lax.stop_gradient(f(params, t_next, later))) ** 2).mean(1)

    def loss(params):
        return consistency_loss(functools.partial(network, params), path, x0, x1, t, t_next)

    def both(params):
        return [(g(params), jax.grad(lambda p, g=g: g(p).sum())(params)) for g in (loss, by_hand)]

    got, want = (jax.tree.leaves(a) for a in jit(both)(params))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)


def test_the_last_target_is_the_data_whatever_the_network_says():
    x0, x1 = jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)

    def average(t, s, x):
        return jnp.where((t == 1)[:, None], jnp.nan, 0.0) * x

    loss = jit(lambda *ts: consistency_loss(average, fm.cond_ot(), x0, x1, *ts))
    loss = loss(jnp.full(2, 0.75), jnp.ones(2))
    np.testing.assert_allclose(loss, 0.25)  # x_t = 1.5


def test_a_small_step_has_the_gradient_of_mean_flow(x64):
    """(1 - t) d times that with s = 1, to first order in the step d."""
    params, x0, x1 = setting()
    t = 0.4

    def mean_flow(params):
        sample = fm.sample_path(fm.cond_ot(), x0, x1, jnp.full(6, t))
        return flow_maps.mean_flow_loss(functools.partial(network, params), sample, jnp.ones(6))

    def consistency(params, step):
        U, times = functools.partial(network, params), jnp.full(6, t)
        return consistency_loss(U, fm.cond_ot(), x0, x1, times, times + step)

    def gradient(loss, *rest):
        value = jit(jax.grad(lambda p, *rest: loss(p, *rest).mean()))(params, *rest)
        return np.asarray(jax.flatten_util.ravel_pytree(value)[0])

    want, off = gradient(mean_flow), []
    for step in (1e-3, 1e-4):
        got = gradient(consistency, jnp.asarray(step)) / ((1 - t) * step)
        off.append(np.linalg.norm(got - want) / np.linalg.norm(want))
    assert off[0] < 1e-2 and abs(off[0] / off[1] - 10) < 0.5


def test_the_times_of_easy_consistency_tuning():
    """ln((1 - t) / t) is N(-1.1, 2^2) to four standard errors."""
    t = np.asarray(flow_maps.ect_times()(jax.random.key(0), (40_000,)), np.float64)
    log_noise = np.log((1 - t) / t)
    assert abs(log_noise.mean() + 1.1) < 4 * 2 / 200
    assert abs(log_noise.std() - 2) < 4 * 2 / np.sqrt(80_000)


def test_the_next_time_of_easy_consistency_tuning(x64):
    """In EDM's noise level, as it is published; a stage may be traced."""
    t, next_time = np.linspace(0.01, 0.999, 50), jit(ect_next)
    noise = (1 - t) / t
    for stage in (0, 1, 7):
        ratio = 1 - 4.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(noise)))
        t_next = np.asarray(next_time(t, stage))
        got = (1 - t_next) / t_next
        np.testing.assert_allclose(got, noise * np.maximum(ratio, 0), atol=1e-12)
        assert (t_next >= t).all() and (t_next == 1).any() == (stage == 0)
        ends = np.resize([0.0, 1.0], 50)
        np.testing.assert_array_equal(next_time(ends, stage), ends)
    np.testing.assert_allclose(ect_next(jnp.asarray(0.5), 0), 0.825, atol=1e-5)


def test_the_weight_of_easy_consistency_tuning(x64):
    noise = np.array([0.1, 1.0, 40.0])
    got = ect_weight(jnp.asarray(1 / (1 + noise)), data_std=0.25)
    np.testing.assert_allclose(got, 1 / noise**2 + 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda loss, t: loss(t, t - 0.1), "t_next must not be before t"),
        (lambda loss, t: loss(t, t[:2]), r"t_next must have the shape \[\] or \[batch\]"),
        (lambda loss, t: loss(t, t + 1), r"t_next must be in \[0, 1\]"),
        (lambda _, t: ect_next(t, -1), "stage must be a finite number, not negative; got -1"),
        (lambda _, t: ect_next(t, 0, q=1.0), "q must be above 1.*got 1.0"),
        (lambda _, t: ect_next(t, 0, k=-1.0), "k must be a finite number, not negative; got -1"),
        (lambda _, t: ect_next(t, 0, b=0.0), "b must be a finite number, positive; got 0"),
        (lambda _, t: ect_weight(t + 0.5), "t must be below 1.*got a time of 1.0"),
        (lambda _, t: ect_weight(t, data_std=0.0), "data_std must be a finite number, positive"),
        (lambda _, t: flow_maps.ect_times(std=0.0), "std must be positive"),
    ],
)
def test_errors_name_the_rule_and_what_was_got(call, message):
    x = jnp.zeros((3, 2))
    loss = functools.partial(consistency_loss, lambda t, s, x: x, fm.cond_ot(), x, x)
    with pytest.raises(ValueError, match=message):
        call(loss, jnp.full(3, 0.5))
