"""The ways to train an average velocity: their pairs of times and their losses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import gaussian_average_velocity, jit
from oracles import x64 as x64

import fmjax as fm
from fmjax import flow_maps, models
from fmjax.tasks.flow_map_methods import (
    LOWEST_ALPHA,
    METHODS,
    PATH,
    Drawn,
    falling_alpha,
    path_sample,
)

EQUAL = {"flow_matching": 1.0, "shortcut": 0.75, "consistency": 0.0}
EQUAL |= {"improved_mean_flow": 0.5, "terminal_velocity": 0.0}


@functools.cache
def pairs_of(name, progress=0.0, num=20_000):
    drawn = METHODS[name].pairs(jax.random.key(0), (num,), jnp.asarray(progress))
    return np.asarray(drawn.t), np.asarray(drawn.s)


@pytest.mark.parametrize("name", METHODS)
def test_pairs_are_in_order_and_as_many_are_equal_as_is_said(name):
    t, s = pairs_of(name)
    assert (t >= 0).all() and (s <= 1).all() and (s >= t).all()
    share, asked = np.mean(s == t), EQUAL.get(name)
    if asked is None:  # and those whose end was drawn before the start
        start = fm.logit_normal(0.6, 1.6)(jax.random.key(1), t.shape)
        end = fm.logit_normal(4.0, 1.6)(jax.random.key(2), t.shape)
        asked = 0.25 + 0.75 * np.mean(np.asarray(end) < np.asarray(start))
    assert abs(share - asked) < 4 * np.sqrt(max(asked * (1 - asked), 1e-9) / len(t)) + 1e-9


def test_shortcuts_are_dyadic():
    t, s = pairs_of("shortcut")
    horizon = (s - t)[s > t]
    powers, counts = np.unique(np.round(-np.log2(horizon), 3), return_counts=True)
    np.testing.assert_array_equal(powers, np.arange(7))
    assert counts.min() > 0.8 * counts.mean()
    cells = t[s > t] / horizon
    np.testing.assert_allclose(cells, np.round(cells), atol=1e-4)
    assert np.unique(np.round(t[s > t][horizon == 2.0**-6] * 64)).size == 64


def test_consistency_pairs_draw_nearer():
    gaps = [np.mean(np.subtract(*pairs_of("consistency", progress)[::-1])) for progress in (0, 1)]
    assert 0 < gaps[1] < gaps[0] / 4
    np.testing.assert_array_equal(pairs_of("consistency", 0.85), pairs_of("consistency", 1.0))


def test_consistency_does_not_stand_still_as_pairs_draw_nearer():
    """The gradient of a squared distance would be 4^4 times smaller in the last stage."""

    def mean(scale, drawn, progress):
        def network(t, s, x):
            return scale * jnp.sin(x + 3 * t[:, None])

        return jnp.mean(METHODS["consistency"].loss(network, drawn, progress))

    sizes = []
    for progress in (0.0, 1.0):
        t, s = (jnp.asarray(a[:4096]) for a in pairs_of("consistency", progress))
        gradient = jit(jax.grad(mean))(1.0, of_a_gaussian()._replace(t=t, s=s), progress)
        sizes.append(abs(float(gradient)))
    assert sizes[1] > 0.1 * sizes[0], sizes


def test_shortcuts_ask_of_no_horizon_that_is_not_trained():
    drawn, asked = of_a_gaussian(name="shortcut"), []

    def network(t, s, x):
        jax.debug.callback(lambda h: asked.append(np.asarray(h)), s - t)
        return x

    jit(lambda: METHODS["shortcut"].loss(network, drawn, jnp.zeros(())))()
    jax.effects_barrier()
    found = np.unique(np.round(np.concatenate(asked), 5))
    np.testing.assert_allclose(found, [0.0, *np.round(0.5 ** np.arange(6, -1, -1), 5)])


def test_alpha_falls():
    alpha = np.asarray(falling_alpha(jnp.linspace(0.0, 1.0, 101)))
    assert alpha[0] > 0.9999 and alpha[-1] == np.float32(LOWEST_ALPHA)
    assert (np.diff(alpha) <= 0).all()


def of_a_gaussian(num=4096, name="mean_flow"):
    key_x0, key_x1 = jax.random.split(jax.random.key(3))
    x0 = jax.random.normal(key_x0, (num, 1), float)
    x1 = 2 + 0.5 * jax.random.normal(key_x1, (num, 1), float)
    t, s = (jnp.asarray(a[:num], float) for a in pairs_of(name))
    return Drawn(x0, x1, t, s)


@pytest.mark.usefixtures("x64")
def test_alpha_flow_ends_as_mean_flow():
    """Its gradient, weights included, at the lowest alpha."""
    exact, drawn = (
        gaussian_average_velocity(PATH, np.array([2.0]), np.array([0.5])),
        of_a_gaussian(),
    )

    def gradient(name):
        def mean(shift):
            def network(t, s, x):
                return exact(t, s, x) + shift * (1 + s - t)[:, None]

            return jnp.mean(METHODS[name].loss(network, drawn, jnp.ones(())))

        return jit(jax.grad(mean))(jnp.asarray(0.3))

    # What is left is of the order of alpha = 0.01 and the horizon.
    np.testing.assert_allclose(gradient("alpha_flow"), gradient("mean_flow"), rtol=0.02)


@pytest.mark.parametrize("name", ["flow_matching", "shortcut", "terminal_velocity"])
@pytest.mark.usefixtures("x64")
def test_the_true_average_velocity_is_where_the_loss_is_least(name):
    """The gradient in a shift of U is 0, within four standard errors."""
    exact = gaussian_average_velocity(PATH, np.array([2.0]), np.array([0.5]))
    drawn = of_a_gaussian(name=name)

    def losses(shift, at):
        def network(t, s, x):
            return exact(t, s, x) + shift

        return METHODS[name].loss(network, drawn, jnp.zeros(()))

    slopes = jit(jax.jacfwd(lambda shift: losses(shift, 0.0)))(jnp.asarray(0.0))
    assert abs(slopes.mean()) < 4 * slopes.std() / np.sqrt(len(slopes))
    moved = jit(jax.jacfwd(lambda shift: losses(shift, 0.0)))(jnp.asarray(0.3))
    assert moved.mean() > 10 * slopes.std() / np.sqrt(len(slopes))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_small_network_learns_to_draw(name):
    """N(2, 0.5^2) from N(0, 1): the method's own draws, in as many steps as it needs."""
    method, model = METHODS[name], models.MLP(features=(64, 64), horizon=True, time_scale=5.0)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 1)))
    tx = optax.adam(optax.linear_schedule(3e-3, 0.0, 1500))

    def average(params):
        return lambda t, s, x: model.apply(params, t, x, horizon=s - t)

    @jax.jit
    def run(params):
        def step(carry, n):
            params, state = carry
            keys = jax.random.split(jax.random.fold_in(jax.random.key(1), n), 3)
            x0 = jax.random.normal(keys[0], (256, 1))
            x1 = 2 + 0.5 * jax.random.normal(keys[1], (256, 1))
            progress = jnp.minimum(n / 1000, 1.0)
            pair = method.pairs(keys[2], (256,), progress)
            drawn = Drawn(x0, x1, pair.t, pair.s)

            def loss(params):
                return jnp.mean(method.loss(average(params), drawn, progress))

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(1500))
        x0 = jax.random.normal(jax.random.key(2), (4000, 1))
        num_steps = 64 if name == "flow_matching" else 2
        return method.sample(jax.random.key(4), average(params), x0, num_steps)

    x1 = np.asarray(run(params))
    # 4000 draws have standard errors of .008 and .006; the rest is 1500 steps of a small network.
    assert abs(x1.mean() - 2) < 0.06 and abs(x1.std() - 0.5) < 0.06, (x1.mean(), x1.std())


def test_the_weight_of_mean_flow_is_of_the_sum_over_the_event():
    """l / (l + 1e-3 / D)^.75 of a mean square l, for D = 3 and losses about that epsilon."""
    x0, x1 = jax.random.normal(jax.random.key(0), (2, 4, 3))
    t, s = jnp.full(4, 0.2), jnp.array([0.2, 0.3, 0.6, 1.0])
    drawn = Drawn(x0, x1, t, s)

    def near(t, s, x):
        return x1 - x0 + 0.03

    plain = flow_maps.mean_flow_loss(near, path_sample(drawn), s)
    np.testing.assert_allclose(plain, 9e-4, rtol=1e-3)
    got = METHODS["mean_flow"].loss(near, drawn, jnp.zeros(()))
    np.testing.assert_allclose(got, plain / (plain + 1e-3 / 3) ** 0.75, rtol=1e-5)


def test_few_steps_of_a_known_average_velocity_end_where_the_flow_does():
    exact = gaussian_average_velocity(PATH, np.array([2.0]), np.array([0.5]))
    x0 = jnp.linspace(-2.0, 2.0, 9)[:, None]
    for name in ("mean_flow", "shortcut"):
        for num_steps in (1, 3):
            x1 = METHODS[name].sample(jax.random.key(0), exact, x0, num_steps)
            np.testing.assert_allclose(x1, 2 + 0.5 * x0, atol=1e-5)
    renoised = METHODS["consistency"].sample(jax.random.key(0), exact, jnp.tile(x0, (2000, 1)), 3)
    np.testing.assert_allclose([renoised.mean(), renoised.std()], [2, 0.5], atol=0.02)
