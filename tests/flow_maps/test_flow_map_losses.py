"""The losses at the truth, against each other and against finite differences, all in float64.

At the true average velocity of a Gaussian the target of MeanFlow is it in the mean, and that of the
semigroup and of the moving end it is at every point. A shift b that is added to U shows the target:
the loss's derivative in b at 0 is 2 (U - target), or 2 (U + h d_s U - target).
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, gaussian_average_velocity, gaussian_velocity, jit, quick_on
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax import flow_maps, models
from fmjax.flow_maps import instantaneous

MEAN, STD = np.array([1.3]), np.array([0.4])


def mean_flow(U, sample, s):
    return flow_maps.mean_flow_loss(U, sample, s)


def improved(U, sample, s):
    return flow_maps.improved_mean_flow_loss(U, instantaneous(U), sample, s)


def alpha_flow(U, sample, s):
    return flow_maps.alpha_flow_loss(U, sample, s, 0.3)


def shortcut(U, sample, s):
    return flow_maps.alpha_flow_loss(U, sample, s, 0.5, first=U)


def terminal(U, sample, s):
    return flow_maps.terminal_velocity_loss(U, instantaneous(U), sample, s)


LOSSES = {f.__name__: f for f in (mean_flow, improved, alpha_flow, shortcut, terminal)}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def network(params, t, s, x):
    """Two layers over (x, t, s), all of whose derivatives are smooth."""
    times = t[:, None] * params["t"][None] + s[:, None] * params["s"][None]
    return jnp.tanh(x @ params["in"] + times) @ params["out"]


def params(seed=0, dim=2):
    shapes = {"in": (dim, 5), "t": (5,), "s": (5,), "out": (5, dim)}
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def path_sample(num=6, dim=2, seed=1):
    rng = np.random.default_rng(seed)
    x0, x1 = jnp.asarray(rng.normal(size=(2, num, dim)))
    t = jnp.asarray(rng.uniform(0.05, 0.5, num))
    return fm.sample_path(fm.cond_ot(), x0, x1, t), t + jnp.asarray(rng.uniform(0.1, 0.5, num))


def gradient(loss, weights, sample, s):
    """Of the mean loss of `network`."""

    def mean(weights):
        return jnp.mean(loss(functools.partial(network, weights), sample, s))

    return jax.flatten_util.ravel_pytree(jit(jax.grad(mean))(weights))[0]


def shifts(loss, U, sample, s):
    """The derivative of each example's loss in a shift that is added to U, `[num]`."""

    def shifted(b):
        return loss(lambda t, s, x: U(t, s, x) + b[:, None], sample, s).sum()

    return np.asarray(jit(jax.grad(shifted))(jnp.zeros_like(sample.x_t[:, 0])))


def given_x_t(path, num, t, x):
    """Conditional path samples that pass x at t: pairs from the posterior of (x0, x1)."""
    alpha, sigma = (float(f(jnp.asarray(t))) for f in path)
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    noise = np.random.default_rng(0).normal(size=(num, 1))
    x1 = MEAN + gain * (x - alpha * MEAN) + np.sqrt(STD**2 * (1 - alpha * gain)) * noise
    x0 = jnp.asarray((x - alpha * x1) / sigma)
    return fm.sample_path(path, x0, jnp.asarray(x1), jnp.full(num, t))


@quick_on("cond_ot", names=("cond_ot", "cosine", "vp"))
def test_the_target_at_the_true_average_velocity_is_it_in_the_mean(name, x64):
    """Of 100,000 draws, within four standard errors; the wrong sign is hundreds of them off."""
    U = gaussian_average_velocity(PATHS[name], MEAN, STD)
    velocity = gaussian_velocity(PATHS[name], MEAN, STD)
    sample, s = given_x_t(PATHS[name], 100_000, 0.3, 0.7), jnp.full(100_000, 0.85)
    np.testing.assert_allclose(sample.x_t, 0.7, atol=1e-12)

    def improved_by_the_truth(U, sample, s):
        return flow_maps.improved_mean_flow_loss(U, velocity, sample, s)

    one = sample.t[:1], s[:1], sample.x_t[:1]
    # The target with a minus, u - h dU/dt, is this much off at the truth.
    wrong = 2 * np.abs(jit(lambda t, s, x: U(t, s, x) - velocity(t, x))(*one)).item()
    for loss in (mean_flow, improved_by_the_truth):
        errors = shifts(loss, U, sample, s) / 2
        standard_error = errors.std() / np.sqrt(len(errors))
        assert abs(errors.mean()) < 4 * standard_error, loss
        assert wrong > 100 * standard_error


def test_the_sign_of_the_target_is_a_plus(x64):
    """The note's point: 1.0313 at the marginal velocity, where a minus would give 0.7673."""
    U = gaussian_average_velocity(fm.cond_ot(), MEAN, STD)
    t, s, x = jnp.array([0.3]), jnp.array([0.85]), jnp.array([[0.7]])
    velocity = gaussian_velocity(fm.cond_ot(), MEAN, STD)
    u, U_there = jit(lambda *args: (velocity(args[0], args[2]), U(*args)))(t, s, x)
    sample, value = fm.PathSample(t, x, u), U_there.item()
    for loss in (mean_flow, improved):
        target = value - shifts(loss, U, sample, s)[0] / 2
        np.testing.assert_allclose(target, value, rtol=1e-12)
        np.testing.assert_allclose(target, 1.0313, atol=5e-5)
    np.testing.assert_allclose(2 * u.item() - value, 0.7673, atol=5e-5)


@quick_on("cosine")
def test_the_semigroup_and_the_moving_end_hold_at_every_point(name, x64):
    U = gaussian_average_velocity(PATHS[name], MEAN, STD)
    sample, s = path_sample(dim=1)

    @jit
    def losses(sample, s):
        shares = (0.01, 0.5, 1.0)
        flows = [flow_maps.alpha_flow_loss(U, sample, s, a, first=U) for a in shares]
        return jnp.stack([*flows, terminal(U, sample, s)]), U(sample.t, s, sample.x_t)

    got, truth = losses(sample, s)
    np.testing.assert_allclose(got, 0.0, atol=1e-20)
    assert np.abs(np.asarray(truth) - np.asarray(sample.u_t)).min() > 1e-3


@each_loss
def test_where_s_is_t_the_gradient_is_that_of_flow_matching(loss, x64):
    """And not zero, as it would be with U as its own target."""
    sample, _ = path_sample()

    def plain(U, sample, s):
        return fm.cfm_loss(instantaneous(U), sample)

    want = gradient(plain, params(), sample, sample.t)
    assert np.linalg.norm(want) > 0.1
    np.testing.assert_allclose(gradient(loss, params(), sample, sample.t), want, rtol=1e-9)


@each_loss
def test_jit_is_eager_and_the_batch_is_its_examples(loss, x64):
    sample, s = path_sample()
    U = functools.partial(network, params())
    want = loss(U, sample, s)

    def one(example, s):
        return loss(U, jax.tree.map(lambda a: a[None], example), s[None])[0]

    np.testing.assert_allclose(jit(lambda *args: loss(U, *args))(sample, s), want, rtol=1e-9)
    np.testing.assert_allclose(jit(jax.vmap(one))(sample, s), want, rtol=1e-9)
    for_all = sample._replace(t=jnp.asarray(0.25)), jnp.asarray(0.75)
    each = sample._replace(t=jnp.full(6, 0.25)), jnp.full(6, 0.75)

    def either(t, s, x):  # both [] or both [batch]
        return U(*(jnp.broadcast_to(a, x.shape[:1]) for a in (t, s)), x)  # pyright: ignore

    got, same = jit(lambda *pairs: [loss(either, *pair) for pair in pairs])(for_all, each)
    np.testing.assert_allclose(got, same, rtol=1e-9)


def test_the_derivatives_are_those_of_finite_differences(x64):
    sample, s = path_sample()
    U, (t, x, u_t) = functools.partial(network, params()), sample
    h, eps = (s - t)[:, None], 1e-5
    v = instantaneous(U)(t, x)

    def difference(ahead, behind):
        return (ahead - behind) / (2 * eps)

    for loss, w in ((mean_flow, u_t), (improved, v)):
        slope = difference(
            U(t + eps, s, x + eps * w),
            U(t - eps, s, x - eps * w),
        )
        want = jnp.mean((U(t, s, x) - u_t - h * slope) ** 2, 1)
        np.testing.assert_allclose(loss(U, sample, s), want, rtol=1e-7)
    x_s = x + h * U(t, s, x)
    end = difference(
        x + (h + eps) * U(t, s + eps, x),
        x + (h - eps) * U(t, s - eps, x),
    )
    want = jnp.mean((end - instantaneous(U)(s, x_s)) ** 2, 1)
    np.testing.assert_allclose(terminal(U, sample, s), want, rtol=1e-7)


def test_the_gradient_of_terminal_velocity_goes_through_the_derivative_in_s(x64):
    sample, s = path_sample()
    weights, frozen = params(), functools.partial(network, params())
    h = (s - sample.t)[:, None]
    target = instantaneous(frozen)(s, sample.x_t + h * frozen(sample.t, s, sample.x_t))

    def by_hand(U, sample, s, eps=1e-5):
        t, x, _ = sample
        ahead, behind = ((h + e) * U(t, s + e, x) for e in (eps, -eps))
        return jnp.mean(((ahead - behind) / (2 * eps) - target) ** 2, 1)

    want = gradient(by_hand, weights, sample, s)
    np.testing.assert_allclose(gradient(terminal, weights, sample, s), want, rtol=1e-6)


def test_targets_have_no_gradient(x64):
    """The gradient is that of a regression on a target computed beforehand."""
    sample, s = path_sample()
    weights, U = params(), functools.partial(network, params())
    (t, x, u_t), h = sample, (s - sample.t)[:, None]
    m = t + 0.5 * (s - t)
    _, slope = jax.jvp(lambda t, x: U(t, s, x), (t, x), (jnp.ones_like(t), u_t))
    _, own = jax.jvp(lambda t, x: U(t, s, x), (t, x), (jnp.ones_like(t), instantaneous(U)(t, x)))
    w = U(t, m, x)
    halves = 0.5 * (w + U(m, s, x + 0.5 * h * w))
    for loss, target, factor in (
        (mean_flow, u_t + h * slope, 1),
        (improved, u_t + h * own, 1),
        (shortcut, halves, 2),  # twice the published loss
    ):

        def regression(U, sample, s, target=target, factor=factor):
            return factor * jnp.mean((U(sample.t, s, sample.x_t) - target) ** 2, 1)

        np.testing.assert_allclose(loss(U, sample, s), regression(U, sample, s), rtol=1e-9)
        got, want = (gradient(f, weights, sample, s) for f in (loss, regression))
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-12)


def test_alpha_flow_tends_to_mean_flow_in_its_gradient_and_to_zero_in_value(x64):
    sample, s = path_sample()
    U = functools.partial(network, params())

    def with_alpha(alpha):
        return lambda U, sample, s: flow_maps.alpha_flow_loss(U, sample, s, alpha)

    want = gradient(mean_flow, params(), sample, s)
    off = [
        np.linalg.norm(gradient(with_alpha(a), params(), sample, s) - want) / np.linalg.norm(want)
        for a in (1e-3, 1e-4)
    ]
    assert off[0] < 1e-2 and abs(off[0] / off[1] - 10) < 0.5  # first order in alpha
    value = with_alpha(1e-4)(U, sample, s) / mean_flow(U, sample, s)
    np.testing.assert_allclose(value, 1e-4, rtol=2e-2)  # alpha |U - target|^2, to first order
    whole = jnp.mean((U(sample.t, s, sample.x_t) - sample.u_t) ** 2, 1)
    np.testing.assert_allclose(with_alpha(1.0)(U, sample, s), whole, rtol=1e-12)
    traced = jit(lambda a: flow_maps.alpha_flow_loss(U, sample, s, a))(jnp.asarray(0.3))
    np.testing.assert_allclose(traced, alpha_flow(U, sample, s), rtol=1e-9)


def test_targets_are_float32_under_a_bfloat16_network():
    """1 + 2^-9 is no bfloat16: a target rounded to it would lose the derivative of 2^-9."""
    ones = jnp.ones((2, 4))
    sample = fm.PathSample(jnp.zeros(2), ones, ones)

    def half(t, s, x):
        del s
        return jnp.broadcast_to(2**-9 * t[:, None], x.shape).astype(jnp.bfloat16)

    half_ones = ones.astype(jnp.bfloat16)
    all_low = sample._replace(x_t=half_ones, u_t=half_ones)
    for low in (sample, sample._replace(x_t=half_ones), all_low):
        loss = mean_flow(half, low, jnp.ones(2))
        assert loss.dtype == jnp.float32
        np.testing.assert_allclose(loss, (1 + 2**-9) ** 2, rtol=1e-6)


@pytest.mark.slow
def test_one_dropout_mask_on_both_sides():
    """With one key U is one function: where all of its calls are at one point, they agree."""
    model = models.MLP(features=(16,), dropout=0.5)
    sample, _ = jax.tree.map(lambda a: a.astype(jnp.float32), path_sample())
    shares = {"alpha_flow": 0.3, "shortcut": 0.5}  # of the loss at s = t, by its definition

    @jit
    def losses(keys):
        weights = model.init(keys[0], sample.t, sample.x_t)

        def with_mask(key):
            def U(t, s, x):
                del s
                return model.apply(weights, t, x, deterministic=False, rngs={"dropout": key})

            return U

        one = with_mask(keys[1])
        got = {name: loss(one, sample, sample.t) for name, loss in LOSSES.items()}
        ends = sample.x_t, sample.u_t
        same = flow_maps.consistency_loss(one, fm.cond_ot(), *ends, sample.t, sample.t)
        return same, got, [fm.cfm_loss(instantaneous(with_mask(key)), sample) for key in keys[1:]]

    consistency, got, (same, other) = losses(jax.random.split(jax.random.key(0), 3))
    for name, loss in got.items():
        want = shares.get(name, 1.0) * same
        np.testing.assert_allclose(loss, want, rtol=1e-3, err_msg=name)  # float32, over alpha
    np.testing.assert_array_equal(consistency, 0.0)
    assert np.abs(other / same - 1).max() > 0.05


def test_the_adaptive_weight_of_a_mean_is_that_of_the_sum(x64):
    """With epsilon / D for D numbers, up to the constant D^(power - 1); and has no gradient."""
    total, dim, power = jnp.array([1e-4, 0.3, 20.0]), 12, 0.75
    mean = flow_maps.adaptive_weight(total / dim, power=power, epsilon=1e-3 / dim)
    np.testing.assert_allclose(mean, dim ** (power - 1) * total / (total + 1e-3) ** power)
    slope = jax.grad(lambda a: flow_maps.adaptive_weight(a, power=power, epsilon=1e-3).sum())
    np.testing.assert_allclose(slope(total), (total + 1e-3) ** -power, rtol=1e-12)
    np.testing.assert_allclose(flow_maps.adaptive_weight(total, power=0, epsilon=1.0), total)
    root = jax.grad(lambda a: flow_maps.adaptive_weight(a, power=0.5, epsilon=1e-12).sum())
    least = flow_maps.adaptive_weight(jnp.zeros(1, jnp.float32), power=0.75, epsilon=1e-50)
    np.testing.assert_array_equal(least, 0.0)  # an epsilon that is none in float32
    np.testing.assert_allclose(root(total), 2 * jax.vmap(jax.grad(jnp.sqrt))(total), rtol=1e-6)


def refusals():
    x, t, s = jnp.zeros((3, 2)), jnp.full(3, 0.5), jnp.full(3, 0.75)
    sample = fm.PathSample(t, x, x)

    def U(t, s, x):
        return x

    flow, weight = functools.partial(flow_maps.alpha_flow_loss, U), flow_maps.adaptive_weight
    for name, loss in LOSSES.items():
        yield f"{name}-order", lambda loss=loss: loss(U, sample, t - 0.1), "s must not be before t"
        wrong = sample._replace(u_t=x[:1])
        yield f"{name}-u_t", lambda loss=loss, w=wrong: loss(U, w, s), "x_t and u_t must have one"
        narrow = lambda loss=loss: loss(lambda t, s, x: x[:, :1], sample, s)  # noqa: E731
        yield f"{name}-U", narrow, r"the average velocity must return .* shape \(3, 2\)"
        yield (
            f"{name}-s",
            lambda loss=loss: loss(U, sample, s[:2]),
            r"s must have the shape \[\] or",
        )
    yield "alpha-0", lambda: flow(sample, s, 0.0), "alpha must be a finite number, positive; got 0"
    yield "alpha-2", lambda: flow(sample, s, 2.0), r"alpha must be in \(0, 1\].*got 2"
    yield "alpha-each", lambda: flow(sample, s, t), "alpha must be a finite number"
    first = lambda: flow(sample, s, 0.5, first=lambda t, s, x: x[:1])  # noqa: E731
    yield "first", first, r"must return .* shape \(3, 2\)"
    yield (
        "power",
        lambda: weight(t, power=-1, epsilon=1.0),
        "power must be a finite number, not neg",
    )
    yield "epsilon", lambda: weight(t, power=1, epsilon=0.0), "epsilon must be .* 1e-3 / D for a m"
    yield "loss", lambda: weight(x, power=1, epsilon=1.0), r"loss must be \[batch\].*got \(3, 2\)"


REFUSALS = {name: (call, message) for name, call, message in refusals()}


@pytest.mark.parametrize("name", REFUSALS)
def test_errors_name_the_rule_and_the_fix(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
