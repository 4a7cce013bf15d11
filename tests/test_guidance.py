"""Guidance: exact combinations, the score it stands for, where it ends, and dropped labels."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64
from scipy.integrate import quad

import fmjax as fm

X = jnp.array([[1.0, -2.0, 4.0], [0.5, 8.0, -16.0]])


@pytest.mark.parametrize(("scale", "factor"), [(0.0, 1.0), (1.0, 3.0), (3.0, 7.0), (-1.0, -1.0)])
def test_the_combination(scale, factor):
    """u = t x and c = 3 t x make (1 + 2 scale) t x, in powers of two exact."""
    for s in (scale, jnp.asarray(scale, jnp.float32)):
        velocity = fm.classifier_free_guidance(lambda t, x: 3 * t * x, lambda t, x: t * x, scale=s)
        t = jnp.asarray(0.5, jnp.float32)
        np.testing.assert_array_equal(velocity(t, X), factor * 0.5 * X)
        np.testing.assert_array_equal(jit(velocity)(t, X), factor * 0.5 * X)


def test_a_scale_for_each_example():
    """As many examples as dimensions: the last axis would broadcast without an error."""
    x = X[:, :2]
    for scale in (jnp.array([1.0, 3.0]), [1, 3], np.array([1.0, 3.0])):
        velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, scale)
        for call in (velocity, jit(velocity)):
            got = call(jnp.zeros(()), x)
            np.testing.assert_array_equal(got, np.array([[2.0], [4.0]]) * x)
    images = jnp.ones((2, 2, 2, 2))
    np.testing.assert_array_equal(velocity(jnp.zeros(2), images)[:, 0, 0, 0], [2.0, 4.0])
    for scale in (jnp.ones((2, 1)), jnp.ones(3), jnp.ones((2, 2))):
        velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, scale)
        with pytest.raises(ValueError, match=r"scale must be a number or \[batch\]"):
            velocity(jnp.zeros(()), x)
    with pytest.raises(ValueError, match="scale must be floating; got complex"):
        fm.classifier_free_guidance(lambda t, x: x, lambda t, x: x, 1j)


def test_times_of_a_batch_reach_both():
    velocity = fm.classifier_free_guidance(
        lambda t, x: x + t[:, None], lambda t, x: x - t[:, None], 2.0
    )
    np.testing.assert_array_equal(velocity(jnp.array([1.0, 2.0]), X), X + np.array([[3.0], [6.0]]))


def test_bfloat16_is_kept():
    velocity = fm.classifier_free_guidance(lambda t, x: 2 * x, lambda t, x: x, 3.0)
    got = velocity(jnp.zeros(()), X.astype(jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), 4 * X)  # a difference in float32


@pytest.mark.parametrize("name", ["cond_ot", "vp", "cosine"])
def test_the_guided_score_of_two_gaussians(name, x64):
    """The guided velocity's score is s(x) + scale (s(x | c) - s(x)), for N(m, s^2) in closed form.

    The Gaussians' velocities come from their posterior means: test_paths.py checks that.
    """
    path, t, scale, x = PATHS[name], jnp.asarray(0.6), 3.0, jnp.asarray(X, jnp.float64)
    alpha, sigma = (float(f(t)) for f in path)

    def velocity_and_score(mean, std):
        variance = (alpha * std) ** 2 + sigma**2

        def velocity(t, x):
            x1 = mean + alpha * std**2 / variance * (x - alpha * mean)
            return fm.x1_to_velocity(path, t, x, x1)

        return velocity, -(np.asarray(x) - alpha * mean) / variance

    conditional, conditional_score = velocity_and_score(1.5, 0.3)
    unconditional, score = velocity_and_score(-0.2, 1.1)
    guided = fm.classifier_free_guidance(conditional, unconditional, scale)(t, x)
    want = score + scale * (conditional_score - score)
    np.testing.assert_allclose(fm.velocity_to_score(path, t, x, guided), want, rtol=1e-9)


def gaussian_velocity(mean, std):
    """The velocity that carries N(0, 1) to N(mean, std^2) along `cond_ot`, in closed form."""

    def velocity(t, x):
        variance = (1 - t) ** 2 + (t * std) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    return velocity


def guided_moments(m_c, tau_c, m_u, tau_u, w):
    """Mean and standard deviation in which the guided flow of two Gaussians ends."""

    def integrand(r):
        c, u = 1 + (r * tau_c) ** 2, 1 + (r * tau_u) ** 2
        return (w * m_c / c + (1 - w) * m_u / u) * c ** (-w / 2) * u ** ((w - 1) / 2)

    std = tau_c**w * tau_u ** (1 - w)
    return std * quad(integrand, 0, np.inf)[0], std


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
@pytest.mark.parametrize(
    "gaussians", [(1.0, 0.5, -1.0, 0.5), (1.0, 0.5, -1.0, 1.5), (0.3, 0.7, 0.3, 1.0)]
)
def test_where_a_guided_flow_of_gaussians_ends(gaussians, w, x64):
    """The flow is affine: it carries 0 to the mean and 1 to mean + std."""
    m_c, tau_c, m_u, tau_u = gaussians
    mean, std = guided_moments(*gaussians, w)
    if tau_c == tau_u:
        np.testing.assert_allclose(mean, m_u + w * (m_c - m_u), rtol=1e-8)
    guided = fm.classifier_free_guidance(
        gaussian_velocity(m_c, tau_c), gaussian_velocity(m_u, tau_u), w
    )
    fine = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    ends = jit(lambda x0: fm.sample(guided, x0, stepsize_controller=fine))(
        jnp.array([[0.0], [1.0]])
    )
    np.testing.assert_allclose(ends[:, 0], [mean, mean + std], rtol=1e-6)
    if w == 3.0 and tau_c != tau_u:  # not the spread of p(x | c)^w p(x)^(1 - w)
        assert abs(std - (w / tau_c**2 + (1 - w) / tau_u**2) ** -0.5) > 0.02


def test_autoguidance_narrows_what_the_worse_model_widens(x64):
    """std tau^w (b tau)^(1 - w) = tau b^(1 - w)."""
    fine = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    velocity = fm.autoguidance(gaussian_velocity(0.5, 0.4), gaussian_velocity(0.5, 0.8), 2.0)
    ends = jit(lambda x0: fm.sample(velocity, x0, stepsize_controller=fine))(
        jnp.array([[0.0], [1.0]])
    )
    np.testing.assert_allclose(ends[1] - ends[0], 0.4 * 2.0**-1, rtol=1e-6)


def network(t, x, condition):
    """A velocity of its condition, a pytree."""
    shift, label = condition["shift"], condition["label"]
    return jnp.sin(x + shift) * (1 + label[:, None]).astype(x.dtype) + jnp.reshape(t, (-1, 1))


@pytest.mark.parametrize("t", [0.5, [0.1, 0.9]])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, [0.5, 2.0]])
def test_one_call_on_twice_the_batch_is_two_calls(t, scale):
    condition = {"shift": jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "label": jnp.array([2, 7])}
    nulls = {"shift": jnp.zeros((2, 3)), "label": jnp.array([9, 9])}
    two = fm.classifier_free_guidance(
        lambda t, x: network(t, x, condition), lambda t, x: network(t, x, nulls), scale
    )
    t, calls = jnp.asarray(t), []

    def counted(t, x, condition):
        calls.append(x.shape)
        return network(t, x, condition)

    for null in (
        {"shift": 0.0, "label": 9},
        {"shift": jnp.zeros(3), "label": jnp.array([9, 9])},
        {"shift": np.zeros((2, 3)), "label": np.int64(9)},
    ):
        one = fm.batched_guidance(counted, condition, null, scale)
        np.testing.assert_allclose(one(t, X), two(t, X), rtol=2e-6)
        np.testing.assert_allclose(jit(one)(t, X), two(t, X), rtol=2e-6)
    assert calls == 6 * [(4, 3)]


@pytest.mark.parametrize(
    ("condition", "null", "message"),
    [
        (jnp.zeros(2, int), 0.5, "null must be a number that the condition's dtype can hold"),
        (jnp.zeros(2, jnp.uint8), 300, "null must be a number that the condition's dtype can hold"),
        (jnp.zeros((2, 3)), jnp.zeros(2), "null must have the shape"),
        (jnp.zeros(2, jnp.bfloat16), 257, "null must be a number that the condition's dtype can"),
        (np.array([0, 2**33]), 10, "condition must be numbers that int32 holds"),
        ({"a": jnp.zeros(2)}, 0.0, "pytrees of one structure"),
        (None, None, "pytrees of one structure, and not empty"),
        ({"a": jnp.zeros(2), "b": jnp.zeros(3)}, {"a": 0.0, "b": 0.0}, "share their batch axis"),
        (jnp.zeros(()), 0.0, "share their batch axis"),
        (["cat", "dog"], [0, 0], "condition must be an array of numbers"),
    ],
)
def test_conditions_and_nulls_that_do_not_fit(condition, null, message):
    with pytest.raises(ValueError, match=message):
        fm.batched_guidance(lambda t, x, c: x, condition, null, 2.0)
    with pytest.raises(ValueError, match=message):
        fm.drop_labels(jax.random.key(0), condition, null, 0.1)


def test_guidance_of_another_batch_is_refused():
    guided = fm.batched_guidance(lambda t, x, c: x, jnp.zeros(3), 0.0, 2.0)
    with pytest.raises(ValueError, match="one row for each of the 3 conditions"):
        guided(jnp.zeros(()), X)
    with pytest.raises(ValueError, match="velocity must be a function .t, x, condition"):
        fm.batched_guidance(3, jnp.zeros(3), 0.0, 2.0)
    wrong = fm.batched_guidance(lambda t, x, c: x[:2], jnp.zeros(2), 0.0, 2.0)
    with pytest.raises(ValueError, match="the velocity must return a floating array"):
        wrong(jnp.zeros(()), X)


@pytest.mark.slow
def test_guidance_within_an_interval():
    velocity = fm.guidance_interval(lambda t, x: 2 * x, lambda t, x: x, 0.25, 0.75)
    for t, factor in ((0.0, 1), (0.25, 2), (0.5, 2), (0.75, 2), (0.8, 1)):
        t = jnp.asarray(t, jnp.float32)
        np.testing.assert_array_equal(velocity(t, X), factor * X)
        np.testing.assert_array_equal(jit(velocity)(t, X), factor * X)
    times = jnp.array([0.5, 0.9])
    np.testing.assert_array_equal(jit(velocity)(times, X), np.array([[2.0], [1.0]]) * X)
    # x' = 2x between the ends and x elsewhere: exp(1 + 1/2).
    fine = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    fine = diffrax.ClipStepSizeController(fine, jump_ts=jnp.array([0.25, 0.75]))
    ends = jit(lambda x0: fm.sample(velocity, x0, stepsize_controller=fine))(X)
    np.testing.assert_allclose(ends, X * np.exp(1.5), rtol=1e-5)
    tangents = jax.jvp(lambda x: velocity(jnp.asarray(0.5), x), (X,), (X,))[1]
    np.testing.assert_array_equal(tangents, 2 * X)
    for ends in ((0.5, 0.2), (-0.1, 0.5), (0.0, 1.1), (np.nan, 0.5)):
        with pytest.raises(ValueError, match="0 <= t_lo <= t_hi <= 1"):
            fm.guidance_interval(lambda t, x: x, lambda t, x: x, *ends)
    with pytest.raises(ValueError, match="The ends must be numbers, one for all"):
        fm.guidance_interval(lambda t, x: x, lambda t, x: x, jnp.array([0.1, 0.2]), 0.8)


def test_only_one_of_the_two_is_called():
    """In a solve: an expensive branch is left out where it isn't wanted."""
    calls = []

    def plain(t, x):
        jax.debug.callback(lambda: calls.append("plain"))
        return x

    def guided(t, x):
        jax.debug.callback(lambda: calls.append("guided"))
        return 2 * x

    velocity = fm.guidance_interval(guided, plain, 0.0, 0.5)
    jax.block_until_ready(
        jit(lambda x0: fm.sample(velocity, x0, solver=diffrax.Euler(), num_steps=4))(X)
    )
    jax.effects_barrier()
    # Euler's steps begin at 0, 1/4, 1/2 and 3/4.
    assert (calls.count("guided"), calls.count("plain")) == (3, 1)


def test_labels_are_dropped_example_by_example():
    """The share of 20,000 is the rate's; neighbours are independent; rates 0 and 1 are exact."""
    labels = jnp.arange(20_000) % 10
    got = jit(lambda key: fm.drop_labels(key, labels, 10, 0.1))(jax.random.key(0))
    dropped = np.asarray(got == 10)
    assert got.dtype == labels.dtype
    np.testing.assert_array_equal(got[~dropped], labels[~dropped])
    assert abs(dropped.mean() - 0.1) < 5 * np.sqrt(0.09 / 20_000)
    both = (dropped[1:] & dropped[:-1]).mean()
    assert abs(both - 0.01) < 5 * np.sqrt(0.01 / 20_000)
    for rate, want in ((0.0, labels), (1.0, jnp.full(20_000, 10))):
        np.testing.assert_array_equal(fm.drop_labels(jax.random.key(1), labels, 10, rate), want)


def test_the_leaves_of_a_condition_are_dropped_together():
    key = jax.random.key(2)
    condition = {"known": jnp.ones(1000), "value": jnp.ones((1000, 2, 3), jnp.bfloat16)}
    got = fm.drop_labels(key, condition, {"known": 0.0, "value": jnp.zeros((2, 3))}, 0.5)
    assert got["value"].dtype == jnp.bfloat16 and 400 < got["known"].sum() < 600
    for event in np.asarray(got["value"], np.float32).reshape(1000, 6).T:
        np.testing.assert_array_equal(event, got["known"])
    rows = fm.drop_labels(key, jnp.zeros((1000, 2)), jnp.arange(2000.0).reshape(1000, 2), 1.0)
    np.testing.assert_array_equal(rows, np.arange(2000.0).reshape(1000, 2))


@pytest.mark.parametrize("rate", [-0.1, 1.1, np.nan])
def test_a_rate_that_is_no_probability(rate):
    with pytest.raises(ValueError, match=r"rate must be a probability in \[0, 1\]"):
        fm.drop_labels(jax.random.key(0), jnp.zeros(3, int), 10, rate)
    with pytest.raises(ValueError, match="rate must be a number, one for all"):
        fm.drop_labels(jax.random.key(0), jnp.zeros(3, int), 10, jnp.zeros(3))


def test_a_model_for_one_example():
    """Equals the batched formula at one time for all and at a time for each; solves and trains."""

    def model(t, x):
        return t * x @ jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])

    velocity = fm.per_example(model)
    for t in (jnp.asarray(0.5), jnp.array([0.5, 2.0])):
        want = jnp.reshape(t, (-1, 1)) * jnp.roll(X, 1, axis=1)
        np.testing.assert_array_equal(velocity(t, X), want)
        np.testing.assert_array_equal(jit(velocity)(t, X), want)
    assert jit(lambda x0: fm.sample(velocity, x0))(X).shape == X.shape
    wrong = fm.per_example(lambda t, x: x[0])
    with pytest.raises(ValueError, match=r"model must return a floating array of the shape \(3,\)"):
        wrong(jnp.zeros(()), X)
    with pytest.raises(ValueError, match="t must have the shape"):
        velocity(jnp.zeros((2, 1)), X)
    with pytest.raises(ValueError, match="model must be a function"):
        fm.per_example(None)
