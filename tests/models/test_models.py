"""The networks: one conformance suite over all of them, and what each promises by itself.

The suite runs in float64, where finite differences are exact to many digits, and on parameters
that are all random: a fresh U-Net is the zero velocity and would pass anything.
"""

import functools
import operator

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models
from fmjax.models import cpu, layers

# Unoptimised code compiles in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = functools.partial(
    models.UNet, channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=()
)
# The default scale of time is a smoother one, under which a hundredth changes these by 0.5 %.
SMALL = functools.partial(models.DiT, width=16, depth=1, num_heads=2, time_scale=200.0)
MODELS = {
    "mlp": (models.MLP(features=(16, 16)), (5,)),
    "mlp_classes": (models.MLP(features=(16,), activation=nn.gelu, num_classes=3), (2,)),
    "mlp_condition": (models.ConditionalMLP(features=(16, 16)), (3,)),
    "unet": (
        TINY(channel_multipliers=(1, 2), attention_resolutions=(4,), num_heads=2),
        (8, 8, 3),
    ),
    "unet_pool_scale_shift": (
        TINY(channel_multipliers=(2, 1), conv_resample=False, scale_shift_norm=True, dropout=0.1),
        (4, 4, 1),
    ),
    "dit": (SMALL(patch_size=2), (4, 6, 3)),
    "dit_classes": (SMALL(patch_size=1, depth=2, num_classes=3, remat=True), (2, 2, 1)),
    "unet_classes": (TINY(head_channels=4, num_classes=3), (4, 2, 2)),
}
UNET, MLP = TINY(num_res_blocks=0, num_classes=3), models.MLP(features=(16, 16), num_classes=3)
TWO_LEVELS = TINY(channel_multipliers=(1, 2))
DIT = SMALL(patch_size=2, num_classes=3)
NETWORKS = {"mlp": (MLP, (2,)), "unet": (UNET, (4, 4, 3)), "dit": (DIT, (4, 4, 3))}
BATCH = 3


def random_params(model, event, dtype=jnp.float32):
    """Every parameter random, those that start at zero included."""
    inputs = jax.ShapeDtypeStruct((), dtype), jax.ShapeDtypeStruct((1, *event), dtype)
    init = functools.partial(model.init, **given(model, dtype, 1))
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    rng = np.random.default_rng(0)

    def draw(shape):
        scale = 0.3 if len(shape) == 1 else np.prod(shape[:-1]) ** -0.5
        return jnp.asarray(rng.normal(float(len(shape) == 1), scale, shape), dtype)

    return jax.tree.map(lambda leaf: draw(leaf.shape), shapes)


def data(event, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(BATCH, *event)), dtype), jnp.asarray([0, 2, 1])


def given(model, dtype=jnp.float32, batch=BATCH):
    """The labels or the condition of a batch."""
    if isinstance(model, models.ConditionalMLP):
        rng = np.random.default_rng(2)
        numbers = [jnp.asarray(rng.normal(size=(batch, *s)), dtype) for s in ((), (2, 2))]
        return {"condition": {"a": numbers[0], "b": numbers[1:]}}
    return {} if model.num_classes is None else {"labels": jnp.asarray([0, 2, 1])[:batch]}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@functools.cache
def build(name):
    """(apply, jvp, t, x): u = apply(t, x), and (u, du) = jvp(t, x, dt, dx), compiled once."""
    model, event = MODELS[name]
    model = model.clone(param_dtype=jnp.float64)
    params = random_params(model, event, jnp.float64)
    x, _ = data(event, jnp.float64)
    apply = functools.partial(model.apply, params, **given(model, jnp.float64))
    jvp = jit(lambda t, x, dt, dx: jax.jvp(apply, (t, x), (dt, dx)))
    return apply, jvp, jnp.asarray([0.13, 0.5, 0.88]), x


@pytest.fixture(params=MODELS, scope="module")
def name(request):
    """A network's tests run one after another, so that one process compiles it once."""
    return request.param


@pytest.fixture
def case(name):
    with jax.enable_x64(True):
        yield build(name)


def relative(a, b):
    """Distance of two arrays, relative to the second's size."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_derivatives_in_t_and_x_match_finite_differences(case):
    _, jvp, t, x = case
    rng = np.random.default_rng(2)
    dt, dx = jnp.asarray(rng.normal(size=t.shape)), jnp.asarray(rng.normal(size=x.shape))
    # A GPU's softmax is float32 even here: no smaller steps. t turns 1000 times faster than x.
    for eps, dt_, dx_ in ((1e-5, dt, 0 * dx), (1e-3, 0 * dt, dx)):
        u, du = jvp(t, x, dt_, dx_)
        ahead, _ = jvp(t + eps * dt_, x + eps * dx_, dt_, dx_)
        behind, _ = jvp(t - eps * dt_, x - eps * dx_, dt_, dx_)
        assert relative(du, (ahead - behind) / (2 * eps)) < 1e-3
        assert np.linalg.norm(du) > 1e-2 * np.linalg.norm(u)


HORIZONS = {
    **MODELS,
    "unet_remat": (TINY(num_heads=2, remat=True), (4, 4, 2)),
    "unet_winograd": (TINY(channels=64, num_res_blocks=0, kernels=cpu.KERNELS), (20, 18, 1)),
}


@functools.cache
def with_horizon(name):
    """(model, params) in float64; times embedded at a scale that suits flow maps."""
    model, event = HORIZONS[name]
    scale = {"time_scale": 16.0} if isinstance(model, models.UNet) else {}
    model = model.clone(horizon=True, param_dtype=jnp.float64, **scale)
    return model, random_params(model, event, jnp.float64), event


QUICK = ("mlp", "mlp_condition")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in HORIZONS]
)
def test_the_total_derivative_of_an_average_velocity_matches_finite_differences(name, x64):
    """dU/dt, the jvp along (1, 0, u) of U(t, s, x), which is what a MeanFlow step takes."""
    model, params, event = with_horizon(name)
    (x, _), t, s = data(event, jnp.float64), jnp.asarray([0.13, 0.5, 0.88]), jnp.ones(BATCH)
    u = jnp.asarray(np.random.default_rng(3).normal(size=x.shape))

    def average(t, x):
        return model.apply(params, t, x, **given(model, jnp.float64), horizon=s - t)

    jvp = jit(lambda t, x: jax.jvp(average, (t, x), (jnp.ones_like(t), u)))
    if name == "unet_winograd":
        assert "conv3x3" in str(jax.make_jaxpr(average)(t, x))
    if name == "unet_remat":
        assert "remat" in str(jax.make_jaxpr(average)(t, x))
    eps = 1e-4  # a GPU's softmax is float32 even here
    value, slope = jvp(t, x)
    at = {k: jvp(t + k * eps, x + k * eps * u)[0] for k in (-2, -1, 1, 2)}
    # Of fourth order: a transformer's highest frequency is 200 here.
    difference = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * eps)
    assert relative(slope, difference) < 1e-5
    assert np.linalg.norm(slope) > 1e-2 * np.linalg.norm(value)


def test_examples_do_not_influence_each_other(case):
    _, jvp, t, x = case
    one, dx = jnp.zeros(BATCH).at[1].set(1.0), jnp.zeros_like(x).at[1].set(1.0)
    u, du = jvp(t, x, one, dx)
    moved, _ = jvp(t + 0.1 * one, x + dx, one, dx)
    np.testing.assert_array_equal(moved[::2], u[::2])
    np.testing.assert_array_equal(du[::2], 0.0)
    assert relative(moved[1], u[1]) > 1e-2
    assert np.linalg.norm(du[1]) > 1e-2


def test_one_time_for_all_equals_a_time_each(case):
    apply, jvp, t, x = case
    each, _ = jvp(t, x, t, x)
    for_all = jit(apply)
    # On a GPU the softmax is float32 and rounds differently in two programs.
    for i in range(BATCH):
        np.testing.assert_allclose(for_all(t[i], x)[i], each[i], atol=1e-5)
    assert relative(for_all(t[0], x), each) > 1e-2


def test_times_a_hundredth_apart_are_told_apart(case):
    _, jvp, t, x = case
    u, _ = jvp(jnp.full_like(t, 0.5), x, t, x)
    later, _ = jvp(jnp.full_like(t, 0.51), x, t, x)
    assert relative(later, u) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_jit_equals_eager(name):
    model, event = NETWORKS[name]
    params, (x, labels) = random_params(model, event), data(event)
    u = jit(model.apply)(params, 0.5, x, labels)
    np.testing.assert_allclose(u, model.apply(params, 0.5, x, labels), atol=1e-4)


def test_time_embedding_is_the_cited_one():
    t = jnp.asarray([0.0, 0.25, 1.0])
    k = np.arange(4)
    angles = np.asarray(t)[:, None] * 1000.0 * np.exp(-np.log(10_000) * k / 4)[None]
    expected = np.concatenate([np.cos(angles), np.sin(angles)], -1)
    got = layers.time_embedding(t, 8, highest=1000.0, lowest=0.1)
    # float32 holds an angle of 1000 to 6e-5.
    np.testing.assert_allclose(got, expected, atol=2e-4)
    assert layers.time_embedding(t.astype(jnp.bfloat16), 8, highest=30.0, lowest=1.0).dtype == (
        jnp.float32
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_compute_dtype_is_apart_from_parameters_and_output(name):
    model, event = NETWORKS[name]
    params, (x, labels) = random_params(model, event), data(event)
    half = model.clone(dtype=jnp.bfloat16)
    u = jit(model.apply)(params, 0.5, x, labels)
    u_half = jit(half.apply)(params, 0.5, x, labels)
    # bfloat16 rounds to 2^-9 = 0.2 % at every layer, and some ten layers follow each other.
    assert 1e-4 < relative(u_half, u) < 3e-2


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_keeps_its_dtype(name):
    model, event = MODELS[name]
    x, t, model = data(event)[0], jnp.zeros(()), model.clone(horizon=True)
    for dtype, inputs in ((jnp.bfloat16, jnp.float32), (None, jnp.bfloat16), (None, jnp.float16)):
        run = functools.partial(
            model.clone(dtype=dtype).init_with_output, capture_intermediates=True, **given(model)
        )
        u, state = jax.eval_shape(run, jax.random.key(0), t, x.astype(inputs))
        assert u.dtype == inputs
        assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
        layers_out = {
            name: dtypes
            for name, dtypes in state["intermediates"].items()
            if name not in ("__call__", "Output_0")  # these two are as wide as x
        }
        inner = {leaf.dtype for leaf in jax.tree.leaves(layers_out)}
        assert inner == {jnp.dtype(dtype or jnp.float32)}


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_acts_only_when_asked_and_repeats_from_its_key(name):
    model, event = NETWORKS[name]
    params, (x, _) = random_params(model, event), data(event)
    x = jnp.broadcast_to(x[:1], x.shape)
    apply = functools.partial(model.clone(dropout=0.5).apply, params, 0.5)
    drop = jit(lambda key: apply(x, deterministic=False, rngs={"dropout": key}))
    first = drop(jax.random.key(1))
    np.testing.assert_array_equal(first, drop(jax.random.key(1)))
    assert relative(first, drop(jax.random.key(2))) > 1e-2
    assert relative(first[0], first[1]) > 1e-2
    without = functools.partial(model.apply, params, 0.5)
    assert str(jax.make_jaxpr(apply)(x)) == str(jax.make_jaxpr(without)(x))
    with pytest.raises(flax.errors.InvalidRngError):
        jax.eval_shape(functools.partial(apply, deterministic=False), x)


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mlp_condition", "unet"))]
)
def test_a_horizon_adds_zero_at_first_and_then_something(name):
    """A network trained without one goes on with its own parameters, under their own names."""
    plain, event = {**MODELS, "unet": NETWORKS["unet"]}[name]
    model, x, t = plain.clone(horizon=True), data(event)[0], jnp.asarray(0.5)
    h = jnp.asarray([0.0, 0.2, 0.5])

    @jit
    def run(key):
        old, new = (m.init(key, t, x, **given(plain)) for m in (plain, model))
        trained = jax.tree.map(lambda a: a + 0.1, old)
        flat = (flax.traverse_util.flatten_dict(tree) for tree in (new, trained))
        grown = flax.traverse_util.unflatten_dict(functools.reduce(operator.or_, flat))
        moved = jax.tree.map(lambda a: a + 0.1, new)
        apply = functools.partial(model.apply, **given(plain))
        with_and_without = apply(moved, t, x, horizon=h), apply(moved, t, x)
        want = plain.apply(trained, t, x, **given(plain))
        return old, new, want, apply(grown, t, x, horizon=h), with_and_without

    old, new, want, got, (each, none) = run(jax.random.key(0))
    paths = dict(jax.tree_util.tree_leaves_with_path(new))
    for path, leaf in jax.tree_util.tree_leaves_with_path(old):
        np.testing.assert_array_equal(paths.pop(path), leaf)
    assert paths and all("horizon" in str(path) for path in paths)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(each[0], none[0], rtol=1e-5)
    assert min(relative(each[i], none[i]) for i in (1, 2)) > 1e-3


@pytest.mark.slow
def test_the_time_derivative_of_a_unet_wants_a_small_time_scale(x64):
    """A step of 0.02 by the derivative: nearly there at 16, far off at 1000."""
    times, off = jnp.asarray([0.2, 0.5, 0.8]), {}
    x, slopes = data((2, 2, 1), jnp.float64)[0], {}
    for scale in (16.0, 1000.0):
        model = TINY(num_res_blocks=0, time_scale=scale, horizon=True, param_dtype=jnp.float64)
        average = functools.partial(model.apply, random_params(model, (2, 2, 1), jnp.float64))

        def along(t, average=average):
            return jax.jvp(lambda t: average(t, x, horizon=1 - t), (t,), (jnp.ones_like(t),))

        (u, slope), (later, _) = (jit(along)(t) for t in (times, times + 0.02))
        off[scale] = relative(0.02 * slope, later - u)
        slopes[scale] = np.linalg.norm(slope) / np.linalg.norm(u)
    assert off[16.0] < 0.2 and off[1000.0] > 10
    assert slopes[1000.0] > 50 * slopes[16.0]


@pytest.mark.parametrize(
    ("model", "horizon", "message"),
    [
        (MLP, 0.5, r"got horizon \(\) and horizon=False. Build the model with horizon=True"),
        (UNET, 0.5, "horizon needs a network that takes one"),
        (
            MLP.clone(horizon=True),
            np.zeros((3, 1)),
            r"horizon must have the shape \[\] or \[batch\]",
        ),
        (MLP.clone(horizon=True), -0.5, "must not be negative.*got -0.5. Are t and s swapped"),
    ],
)
def test_a_horizon_that_does_not_fit(model, horizon, message):
    x = jnp.zeros((3, 2) if isinstance(model, models.MLP) else (3, 4, 4, 1))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(()), x, horizon=horizon))


@pytest.mark.parametrize("name", NETWORKS)
def test_labels_select_a_class_each_and_none_is_the_null_class(name):
    model, event = NETWORKS[name]
    params, (x, _) = random_params(model, event), data(event)
    x = jnp.broadcast_to(x[:1], x.shape)
    apply = jit(functools.partial(model.apply, params, 0.5, x))
    u = apply(jnp.asarray([0, 1, 3]))
    np.testing.assert_allclose(u[2], apply(None)[2], atol=1e-5)
    assert min(relative(u[0], u[1]), relative(u[0], u[2]), relative(u[1], u[2])) > 1e-2
    # Traced and out of range: NaN for that example, and for it alone.
    loud = apply(jnp.asarray([0, 4, -1]))
    assert np.isnan(loud[1:]).all()
    np.testing.assert_array_equal(loud[0], u[0])


@pytest.mark.parametrize(
    ("model", "shape", "labels", "message"),
    [
        (MLP, (3, 8, 8, 1), None, r"floating vectors \[batch, dim\]"),
        (models.MLP(features=()), (3, 2), None, "at least one hidden layer"),
        (UNET, (3, 8, 8), None, r"floating images .* x\[\.\.\., None\]"),
        (TWO_LEVELS, (3, 8, 7, 3), None, r"divisible by 2.*got x \(3, 8, 7, 3\)"),
        (TWO_LEVELS, (3, 7, 8, 3), None, r"divisible by 2.*got x \(3, 7, 8, 3\)"),
        (TINY(num_heads=3), (3, 8, 8, 3), None, "num_heads; got 8 channels and num_heads=3"),
        (TINY(head_channels=5), (3, 8, 8, 3), None, "head_channels=5"),
        (TINY(), (3, 8, 8, 3), [0, 1, 2], "num_classes=None"),
        (models.MLP(), (3, 2), [0, 1, 2], "num_classes=None"),
        (UNET, (3, 8, 8, 3), [0, 1], r"\[batch\] = \(3,\); got int32 \(2,\)"),
        (MLP, (3, 2), [[0], [1], [2]], r"got int32 \(3, 1\)"),
        (MLP, (3, 2), 1, r"got int32 \(\)"),
        (MLP, (3, 2), [0.0, 1.0, 2.0], "got float32"),
        (MLP, (3, 2), [0, 4, 1], r"0\.\.3, 3 being the null class; got labels from 0 to 4"),
        (UNET, (3, 8, 8, 3), [0, -1, 1], "got labels from -1 to 1"),
        (DIT, (3, 8, 8), None, r"floating images .* x\[\.\.\., None\]"),
        (DIT, (3, 8, 7, 3), None, r"divisible by patch_size; got x \(3, 8, 7, 3\)"),
        (SMALL(num_heads=3), (3, 8, 8, 3), None, "got width=16 and num_heads=3"),
        (SMALL(num_heads=8), (3, 8, 8, 3), None, "got width=16 and num_heads=8"),
        (SMALL(depth=0), (3, 8, 8, 3), None, "at least 1; got 0 and 4"),
        (SMALL(), (3, 8, 8, 3), [0, 1, 2], "num_classes=None"),
    ],
)
def test_errors_name_the_rule_and_what_was_got(model, shape, labels, message):
    labels = None if labels is None else jnp.asarray(labels)
    init = functools.partial(model.init, labels=labels)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), jnp.zeros(()), jnp.zeros(shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_times_of_a_wrong_shape_and_integer_inputs_are_refused(name):
    model, event = NETWORKS[name]
    init, x = functools.partial(jax.eval_shape, model.init, jax.random.key(0)), data(event)[0]
    for t in (jnp.zeros((BATCH, 1)), jnp.zeros(1), jnp.zeros(BATCH + 1)):
        with pytest.raises(ValueError, match="t must have the shape"):
            init(t, x)
    with pytest.raises(ValueError, match="floating"):
        init(jnp.zeros(()), x.astype(jnp.int32))


@pytest.mark.parametrize(
    ("model", "event", "count"),
    [
        (models.cifar10_unet(), (32, 32, 3), 35_746_307),
        (models.cifar10_unet_large(), (32, 32, 3), 55_676_419),
        (models.cifar10_unet().clone(num_classes=10), (32, 32, 3), 35_746_307 + 11 * 512),
        (models.MLP(features=(7, 5), time_features=6), (3,), (6 + 3 + 1) * 7 + 8 * 5 + 6 * 3),
    ],
)
def test_parameter_counts_to_the_unit(model, event, count):
    x = jnp.zeros((1, *event))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(()), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_a_condition_enters_as_the_module_says():
    """By NumPy, from the parameters by their names; rows of a pytree leaf after leaf."""
    model = models.ConditionalMLP(features=(6, 5), activation=jnp.tanh, time_features=4)
    params, x = random_params(model, (3,)), data((3,))[0]
    condition = given(model)["condition"]
    p = jax.tree.map(np.asarray, params["params"])
    numbers = np.concatenate([condition["a"][:, None], condition["b"][0].reshape(3, 4)], axis=1)
    w = 30.0 * 30.0 ** (-np.arange(2) / 2)
    emb = np.concatenate([np.cos(0.3 * w), np.sin(0.3 * w)]) @ p["time"]["kernel"]
    h = np.asarray(x) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    h = np.tanh(h + emb + numbers @ p["condition"]["kernel"])
    h = np.tanh(h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"])
    want = h @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"]
    got = jit(model.apply)(params, 0.3, x, condition)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (None, r"condition must hold arrays \[batch, ...\] of 3 rows, as x has; got \[\]"),
        (jnp.zeros((2, 4)), r"of 3 rows, as x has; got \[\(2, 4\)\]"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(())}, "of 3 rows"),
        (jnp.zeros(3, int), "condition must be floating; got int32"),
        ("red", "condition must be an array of numbers"),
    ],
)
def test_a_condition_that_does_not_fit(condition, message):
    model = models.ConditionalMLP(features=(4,))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((3, 2)), condition)
        )


@pytest.mark.parametrize("heights", [(8,), (4,), (8, 4), (16,)])
def test_attention_stands_at_the_asked_resolutions(heights):
    x = jnp.zeros((1, 8, 4, 1))

    def count(heights):
        model = TINY(channel_multipliers=(1, 2), attention_resolutions=heights)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(()), x)
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    # One block on the way down and two on the way up; normalisation, qkv and projection each.
    channels = {8: 8, 4: 16, 16: 0}
    expected = sum(
        3 * (2 * c + 3 * c * (c + 1) + c * (c + 1)) for c in (channels[h] for h in heights)
    )
    assert count(heights) - count(()) == expected


def test_fresh_blocks_are_the_identity_and_a_fresh_output_zero():
    x, emb = jnp.ones((2, 2, 2, 8)).at[0, 0].set(3.0), jnp.ones((1, 16))
    dtypes = layers.Dtypes(dtype=jnp.float32, param_dtype=jnp.float32)
    cases = (
        (layers.ResBlock(8, 0.0, True, **dtypes), (x, emb, True), x),
        (layers.Attention(2, **dtypes), (x,), x),
        (layers.Output(3, **dtypes), (x, jnp.float32), 0 * x[..., :3]),
    )

    @jit
    def run(key):
        fresh = [layer.init_with_output(key, *inputs) for layer, inputs, _ in cases]
        shifted = [jax.tree.map(lambda leaf: leaf + 0.1, params) for _, params in fresh]
        moved = [c[0].apply(p, *c[1]) for c, p in zip(cases, shifted, strict=True)]
        return [u for u, _ in fresh], moved

    for (_, _, expected), u, moved in zip(cases, *run(jax.random.key(0)), strict=True):
        np.testing.assert_array_equal(u, expected)
        assert np.abs(moved - expected).max() > 1e-2


def test_groups_divide_the_channels_and_are_never_single_channels():
    assert [layers.num_groups(c) for c in (3, 8, 32, 48, 100, 128, 384, 512)] == (
        [1, 2, 8, 12, 25, 32, 32, 32]
    )
    for channels in range(1, 300):
        groups = layers.num_groups(channels)
        assert channels % groups == 0 and groups <= 32
        assert groups == 1 or channels // groups >= 4


@pytest.mark.slow
def test_the_kernels_of_a_cpu_give_the_same_numbers():
    """The same parameters, the same velocity and gradient to rounding, where they do run."""
    model = models.UNet(channels=64, channel_multipliers=(1, 1), num_res_blocks=1, head_channels=32)
    model = model.clone(attention_resolutions=(8,))
    x = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    t = jnp.full(4, 0.5)
    params = jax.jit(model.init)(jax.random.key(0), t, x)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.05 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    params = jax.tree.unflatten(tree, [a + n for a, n in zip(leaves, noise, strict=True)])

    def both(model):
        return jax.value_and_grad(lambda p, x: jnp.sum(jnp.sin(model.apply(p, t, x))), (0, 1))

    fast = model.clone(kernels=cpu.KERNELS)
    assert "conv3x3" in str(jax.make_jaxpr(fast.apply)(params, t, x))
    got, want = (jax.jit(both(m))(params, x) for m in (fast, model))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 2e-5


@pytest.mark.slow
def test_the_number_of_groups_is_an_attribute():
    """32 groups, as in the published networks, wherever they divide the width: at 32, 64, 96."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 96)), jnp.float32)
    norm = layers.group_norm(96, jnp.float32, jnp.float32, 32)
    got, _ = norm.init_with_output(jax.random.key(0), x)
    grouped = np.asarray(x, np.float64).reshape(1, 4, 4, 32, 3)
    mean, std = (f(axis=(1, 2, 4), keepdims=True) for f in (grouped.mean, grouped.std))
    np.testing.assert_allclose(got, ((grouped - mean) / std).reshape(x.shape), atol=1e-4)

    model = models.UNet(channels=32, channel_multipliers=(1, 3), attention_resolutions=(4,))
    image = jnp.zeros((1, 8, 8, 3))
    shapes = [
        jax.eval_shape(lambda k, m=m: m.init(k, jnp.zeros(()), image), jax.random.key(0))
        for m in (model, model.clone(num_groups=32))
    ]
    assert jax.tree.map(lambda a: a.shape, shapes[0]) == jax.tree.map(lambda a: a.shape, shapes[1])
    text = str(jax.make_jaxpr(lambda p: model.clone(num_groups=32).apply(p, 0.5, image))(shapes[1]))
    assert ",32,3]" in text and ",24,4]" not in text  # 96 channels in groups of 3, nowhere of 4
    for groups in (0, -1, 5, 64):
        with pytest.raises(ValueError, match=f"num_groups={groups}. None takes 8"):
            model.clone(num_groups=groups).init(jax.random.key(0), jnp.zeros(()), image)


def test_group_statistics_are_float32_under_bfloat16():
    x = 8 + np.random.default_rng(0).normal(size=(2, 32, 32, 4))
    x = jnp.asarray(x, jnp.bfloat16)
    norm = layers.group_norm(4, jnp.bfloat16, jnp.float32)
    got, _ = norm.init_with_output(jax.random.key(0), x)
    exact = np.asarray(x, np.float64)
    axes = (1, 2, 3)
    exact = (exact - exact.mean(axes, keepdims=True)) / exact.std(axes, keepdims=True)
    assert got.dtype == jnp.bfloat16
    # The result itself is rounded to 2^-9; a bfloat16 variance of 64 + 1 - 64 would be 25 % off.
    assert relative(got, exact) < 4e-3
