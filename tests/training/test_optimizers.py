"""Adam's and Muon's rates, Muon's moves against singular values, and the power-law average."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import models, training
from fmjax.training.matrices import Matrix

KEY = jax.random.key(7)
OPTIMIZERS = {"adam": training.adam, "muon": training.muon}
RATE = 0.5


def network(shapes):
    """Parameters of these kernels, zero, each in a hidden module of the given name."""
    return {"params": {"Block_0": {n: {"kernel": jnp.zeros(s)} for n, s in shapes.items()}}}


def moves(gradients, params, tx):
    """How the first step moves the kernels, by their modules' names, for the rate 1."""
    updates, _ = tx.update(gradients, tx.init(params), params)
    block = jax.tree.map(np.asarray, updates)["params"]["Block_0"]
    return {name: -leaf["kernel"] / RATE for name, leaf in block.items()}


def like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def is_near_orthogonal(matrix):
    """Singular values where five Newton-Schulz steps leave them, around 1."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return values.min() > 0.65 and values.max() < 1.25  # the note says 0.7 to 1.2, roughly


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_rises_then_falls_to_zero(name):
    tx = OPTIMIZERS[name](0.25, warmup_steps=4, decay_steps=9, clip_norm=1.0)
    params = network({"Dense_1": (3, 4)})
    state = training.init_train_state(params, tx)
    loss = lambda p, key, batch: jnp.sum(p["params"]["Block_0"]["Dense_1"]["kernel"])  # noqa: E731
    step = jax.jit(training.make_train_step(loss, tx))
    rates, lengths = [], []
    for _ in range(11):
        before = state.params
        state, metrics = step(state, KEY, None)
        rates.append(float(metrics.learning_rate))
        lengths.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, before, state.params))))
    rise, fall = [0.0, 0.0625, 0.125, 0.1875], [0.25, 0.2, 0.15, 0.1, 0.05, 0.0, 0.0]
    np.testing.assert_allclose(rates, rise + fall, atol=1e-7)
    # Under a constant gradient both move by the rate times a constant: the rate shown is used.
    np.testing.assert_allclose(np.array(lengths) / lengths[4], np.array(rates) / 0.25, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (16, 32), (32, 16)])
def test_muon_moves_along_the_nearest_orthogonal_matrix(shape):
    """A gradient U S V' moves by 0.2 sqrt(max) U V', up to Newton-Schulz's singular values."""
    rng, size = np.random.default_rng(0), min(shape)
    u, v = (np.linalg.qr(rng.normal(size=(n, size)))[0] for n in shape)
    singular = np.geomspace(0.05, 1.0, size)
    params = network({"Dense_1": shape})
    tx = training.muon(RATE)
    for scale in (1.0, 1e4, 1e-3):  # its moves have no scale
        gradient = jnp.asarray(scale * (u * singular) @ v.T, jnp.float32)
        move = moves(jax.tree.map(lambda _, g=gradient: g, params), params, tx)["Dense_1"]
        values = u.T @ move @ v / (0.2 * np.sqrt(max(shape)))
        off = values - np.diag(np.diag(values))
        assert np.abs(off).max() < 1e-4
        assert 0.68 < np.diag(values).min() and np.diag(values).max() < 1.21
        if scale == 1.0:
            first = move
        np.testing.assert_allclose(move, first, atol=2e-4)
        # As Adam's: about 0.2 in the root mean square, less where the matrix is far from square.
        assert 0.14 < np.sqrt((move**2).mean()) < 0.25


@pytest.mark.slow
def test_convolutions_are_one_matrix_and_fused_queries_three():
    shapes = {"Conv_0": (3, 3, 4, 8), "qkv": (6, 18), "Dense_1": (6, 18)}
    params = network(shapes)
    gradients = like(params)
    blocks = [np.eye(6) + 0.1 * np.random.default_rng(n).normal(size=(6, 6)) for n in range(3)]
    unequal = [scale * block for scale, block in zip((1.0, 100.0, 0.01), blocks, strict=True)]
    gradients["params"]["Block_0"]["qkv"]["kernel"] = jnp.asarray(np.hstack(unequal), jnp.float32)
    moved = moves(gradients, params, training.muon(RATE))
    assert is_near_orthogonal(moved["Conv_0"].reshape(36, 8) / (0.2 * 6))
    for part in np.split(moved["qkv"], 3, axis=1):
        assert is_near_orthogonal(part / (0.2 * np.sqrt(6)))
    assert is_near_orthogonal(moved["Dense_1"] / (0.2 * np.sqrt(18)))


def is_matrix(value):
    return value is None or isinstance(value, Matrix)


def by_name(model, *inputs):
    """The kernels and tables of a network: those of Muon, and those of Adam."""
    params = jax.eval_shape(model.init, KEY, jnp.zeros(()), *inputs)
    found = jax.tree.leaves_with_path(training.matrix_axes(params), is_leaf=is_matrix)
    named = [(jax.tree_util.keystr(k[1:], simple=True, separator="/"), m) for k, m in found]
    assert not [name for name, m in named if m is not None and not name.endswith("/kernel")]
    named = [(name.rpartition("/"), m) for name, m in named]
    weights = {module: m for (module, _, leaf), m in named if leaf in ("kernel", "embedding")}
    muon = {module for module, m in weights.items() if m is not None}
    return muon, weights.keys() - muon


def test_which_weights_of_our_networks_are_muons():
    unet = models.UNet(
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_classes=3,
    )
    muon, adam = by_name(unet, jnp.zeros((1, 8, 8, 3)))
    embedding = {"Embedding_0/Dense_0", "Embedding_0/Dense_1", "Embedding_0/Embed_0"}
    assert adam == embedding | {"Conv_0", "Output_0/Conv_0"}
    assert {"Conv_1", "Conv_2", "Attention_0/Dense_0", "ResBlock_0/Dense_0"} <= muon
    assert {f"ResBlock_{n}/Conv_{c}" for n in range(8) for c in (0, 1)} <= muon

    muon, adam = by_name(models.MLP(features=(8, 8), num_classes=3), jnp.zeros((1, 2)))
    assert (muon, adam) == ({"Dense_1"}, {"Dense_0", "Dense_2", "time", "label"})
    conditional = models.ConditionalMLP(features=(8, 8))
    muon, adam = by_name(conditional, jnp.zeros((1, 2)), jnp.zeros((1, 3)))
    assert (muon, adam) == ({"Dense_1"}, {"Dense_0", "Dense_2", "time", "condition"})


def test_what_is_no_matrix_moves_as_by_adam():
    params = network({"Dense_1": (4, 4), "time": (4, 4)})
    params["params"]["Block_0"]["bias"] = {"kernel": jnp.zeros(4)}
    gradients = like(params)
    got = moves(gradients, params, training.muon(0.0, adam_learning_rate=RATE))
    want = moves(gradients, params, optax.nadamw(RATE, weight_decay=0.0))  # Optax's partner
    np.testing.assert_array_equal(got["Dense_1"], 0.0)
    for name in ("time", "bias"):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def small():
    """A network, its data and its loss: `(params, loss, batch)`."""
    model, x = models.MLP(features=(8, 8)), jax.random.normal(KEY, (4, 3))
    params = jax.jit(model.init)(KEY, jnp.zeros(()), x)
    return params, lambda p, key, x: jnp.mean((model.apply(p, 0.5, x) - x**2) ** 2), x


@pytest.mark.slow
def test_a_resumed_run_is_one_that_never_stopped():
    params, loss, x = small()

    def advance(state, num):
        tx = training.muon(1e-2, warmup_steps=2, decay_steps=9, clip_norm=1.0)  # a new process's
        step = jax.jit(training.make_train_step(loss, tx))
        for _ in range(num):
            state, metrics = step(state, KEY, x)
        return state, metrics

    tx = training.muon(1e-2, warmup_steps=2, decay_steps=9, clip_norm=1.0)
    state = training.init_train_state(params, tx)
    whole, last = advance(state, 6)
    half = jax.tree.map(np.asarray, advance(state, 3)[0])  # as from a file
    again, last_again = advance(jax.tree.map(jnp.asarray, half), 3)
    jax.tree.map(np.testing.assert_array_equal, (again, last_again), (whole, last))
    assert float(last.loss) < float(loss(params, KEY, x))


@pytest.mark.slow
def test_half_precision_parameters_have_the_moments_of_float32():
    params, _, _ = small()
    tx = training.muon(RATE)
    gradients = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), like(params))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradients)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    (got, state), (want, wide_state) = (
        tx.update(g, tx.init(p), p) for g, p in ((gradients, half), (wide, params))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(s)] for s in (state, wide_state)]
    assert dtypes[0] == dtypes[1] and jnp.bfloat16 not in dtypes[0]
    moved = optax.apply_updates(half, got)
    assert {leaf.dtype for leaf in jax.tree.leaves(moved)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be finite"),
        ({"learning_rate": 1.0, "decay_steps": 0}, "decay_steps must be above warmup_steps; got 0"),
        ({"learning_rate": 1.0, "warmup_steps": 5, "decay_steps": 5}, "got 5 and 5"),
        ({"learning_rate": 1.0, "decay_steps": np.nan}, "decay_steps must be"),
        ({"learning_rate": 1.0, "clip_norm": 0.0}, "clip_norm must be positive"),
    ],
)
def test_bounds(how, message):
    for make in OPTIMIZERS.values():
        with pytest.raises(ValueError, match=message):
            make(**how)


def test_muons_own_bounds():
    with pytest.raises(ValueError, match="adam_learning_rate must be finite"):
        training.muon(1.0, adam_learning_rate=np.nan)
    with pytest.raises(ValueError, match=r"hidden matrices.*got \['w'\].*Take training.adam"):
        training.muon(1.0).init({"w": jnp.zeros((3, 3))})


@pytest.mark.parametrize("std", [0.05, 0.0905, 0.25])
def test_the_power_law_average_has_its_weights_and_width(std):
    """After N steps step k weighs (k/N)^p - ((k-1)/N)^p, p = gamma + 1, whose std is N std."""
    num = 400
    decay = np.asarray(jax.vmap(training.power_ema(std))(jnp.arange(num)), np.float64)
    assert decay[0] == 0.0  # the first step replaces the parameters that nobody trained
    left = np.append(np.cumprod(decay[::-1])[::-1][1:], 1.0)
    weights = (1 - decay) * left
    power = -np.log(decay[1]) / np.log(2)  # d_1 = 2^-p
    tau = np.arange(num + 1) / num
    np.testing.assert_allclose(weights, np.diff(tau**power), atol=2e-7)
    middle = (tau[1:] + tau[:-1]) / 2
    mean = weights @ middle
    # Steps have a width of their own, a relative (1 / num / std)^2 / 24 at most: 1e-4.
    np.testing.assert_allclose(np.sqrt(weights @ (middle - mean) ** 2), std, rtol=2e-3)


def test_the_usual_warm_up_is_the_power_eight():
    gamma, n = 8, jnp.arange(1000, 2000)
    std = np.sqrt(gamma + 1) / (gamma + 2) / np.sqrt(gamma + 3)
    assert std == pytest.approx(0.0905, abs=5e-5)
    weight = 1 - np.asarray(training.power_ema(std)(n), np.float64)
    # 1 - d is 9 / n up to a relative 10 / n.
    np.testing.assert_allclose(weight, 9 / (10 + np.asarray(n)), rtol=1.2e-2)
    for wrong in (0.0, 1e-170, 0.3, np.nan, None):
        with pytest.raises(ValueError, match="std must be"):
            training.power_ema(wrong)
