"""The training step against closed forms: the average, the clip, the rate, the keys, the trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from fmjax import training

KEY = jax.random.key(7)


def linear_loss(params, key, batch):
    """Its gradient is the mean of the batch, whatever the parameters and the key."""
    return jnp.mean(batch @ params["w"])


def regression_loss(params, key, batch):
    x, y = batch
    prediction = jnp.tanh(x @ params["w"]) @ params["v"]
    noise = 0.1 * jax.random.normal(key, y.shape)
    return jnp.mean((prediction - y - noise) ** 2)


def regression(key, batch_size=16):
    key_w, key_v, key_x = jax.random.split(key, 3)
    params = {"w": jax.random.normal(key_w, (3, 8)), "v": jax.random.normal(key_v, (8,))}
    x = jax.random.normal(key_x, (batch_size, 3))
    return params, (x, jnp.sum(x**2, axis=-1))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run_sgd(num_steps, **options):
    """Steps of w <- w - 0.5 from w = 0: the parameter after n steps is -n / 2, exactly."""
    tx = optax.sgd(0.5)
    state = training.init_train_state({"w": jnp.zeros(2)}, tx)
    step = jax.jit(training.make_train_step(linear_loss, tx, **options))
    states = [state]
    for _ in range(num_steps):
        states.append(step(states[-1], KEY, jnp.ones((4, 2)))[0])
    return states


def test_ema_follows_the_warmed_decay():
    # With d_n = (1 + n) / (10 + n) the average is a weighted mean of the parameters, written here
    # as a sum over them: w_k = (1 - d_k) prod_{n > k} d_n. From step 7 on 0.5 caps the decay.
    num_steps, cap = 12, 0.5
    decays = np.array([min(cap, (1 + n) / (10 + n)) for n in range(num_steps)])
    assert decays[6] < cap <= decays[8]
    weights = [(1 - decays[k]) * np.prod(decays[k + 1 :]) for k in range(num_steps)]
    expected = sum(w * -(k + 1) / 2 for k, w in enumerate(weights))  # e_0 = 0 adds nothing
    states = run_sgd(num_steps, ema_decay=cap)
    np.testing.assert_allclose(states[-1].ema_params["w"], expected, rtol=1e-6)
    # The first step: decay 1/10.
    np.testing.assert_allclose(states[1].ema_params["w"], -0.5 * 0.9, rtol=1e-6)


def test_ema_takes_a_schedule_as_it_is():
    # A constant decay d: e_n = -(1/2) (n - d (1 - d^n) / (1 - d)).
    d, n = 0.8, 10
    states = run_sgd(n, ema_decay=optax.constant_schedule(d))
    expected = -0.5 * (n - d * (1 - d**n) / (1 - d))
    np.testing.assert_allclose(states[-1].ema_params["w"], expected, rtol=1e-6)
    # The schedule sees the steps done before: 0 first, when this one discards the old average.
    states = run_sgd(2, ema_decay=lambda step: jnp.where(step == 0, 0.0, 1.0))
    np.testing.assert_array_equal(states[2].ema_params["w"], -0.5)


def test_ema_keeps_the_small_weight_of_a_slow_average():
    # 1 - 0.999999 is 1.0133e-6 in float32. 9 / (10 + n) falls below 1e-6 after 9e6 steps.
    state = run_sgd(0)[0]._replace(step=jnp.asarray(10**8, jnp.int32))
    step = training.make_train_step(linear_loss, optax.sgd(0.5), ema_decay=0.999999)
    state, _ = step(state, KEY, jnp.ones((4, 2)))
    np.testing.assert_allclose(state.ema_params["w"], -0.5e-6, rtol=1e-6)


def test_an_ema_decay_outside_0_1_is_refused():
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\]; got 99.99"):
        training.make_train_step(linear_loss, optax.sgd(0.1), ema_decay=99.99)


def test_metrics_show_loss_unclipped_norm_and_this_steps_rate():
    tx = training.adam(0.25, warmup_steps=4, clip_norm=1.0)
    params = {"w": jnp.array([1.0, 2.0])}
    state = training.init_train_state(params, tx)
    step = jax.jit(training.make_train_step(linear_loss, tx))
    batch = jnp.tile(jnp.array([3.0, 4.0]), (4, 1))  # the gradient is (3, 4): norm 5
    rates, moves = [], []
    for n in range(6):
        before = state
        state, metrics = step(state, KEY, batch)
        rates.append(float(metrics.learning_rate))
        moves.append(before.params["w"] - state.params["w"])
        assert float(metrics.gradient_norm) == 5.0
        assert int(state.step) == n + 1
        np.testing.assert_allclose(metrics.loss, before.params["w"] @ batch[0], rtol=1e-6)
        assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics)
    assert rates == [0.0, 0.0625, 0.125, 0.1875, 0.25, 0.25]
    # Adam's move under a constant gradient is the rate itself: the rate shown is the rate used.
    np.testing.assert_allclose(moves, np.array(rates)[:, None] * np.ones(2), rtol=1e-5)


def test_clipping_scales_the_gradient_that_adam_sees():
    batch, params = jnp.tile(jnp.array([3.0, 4.0]), (4, 1)), {"w": jnp.zeros(2)}
    first_moments = []
    for clip_norm in (1.0, None, 10.0):
        tx = training.adam(0.1, clip_norm=clip_norm)
        step = training.make_train_step(linear_loss, tx)
        state, metrics = step(training.init_train_state(params, tx), KEY, batch)
        assert float(metrics.learning_rate) == np.float32(0.1)
        first_moments.append(optax.tree.get(state.opt_state, "mu")["w"])
    expected = 0.1 * np.array([[0.6, 0.8], [3.0, 4.0], [3.0, 4.0]])
    np.testing.assert_allclose(first_moments, expected, rtol=1e-6)


def test_a_rate_that_nobody_recorded_is_absent():
    inject = optax.inject_hyperparams(optax.sgd)
    for tx, expected in [
        (optax.adam(0.5), None),
        (inject(learning_rate=0.5), 0.5),
        (optax.chain(inject(learning_rate=0.5), inject(learning_rate=0.5)), None),
    ]:
        # A parameter of that name is no rate.
        params = {"learning_rate": jnp.ones(2)}
        state = training.init_train_state(params, tx)
        step = training.make_train_step(lambda p, k, b: p["learning_rate"] @ b, tx)
        rate = step(state, KEY, jnp.ones(2))[1].learning_rate
        assert rate is None if expected is None else float(rate) == expected


def test_the_step_is_traced_once_and_jit_equals_eager():
    params, batch = regression(jax.random.key(0))
    tx, traces = optax.sgd(0.1), []

    def counted(params, key, batch):
        traces.append(1)
        return regression_loss(params, key, batch)

    eager = training.make_train_step(regression_loss, tx)
    jitted = jax.jit(training.make_train_step(counted, tx))
    states = [training.init_train_state(params, tx)]
    for _ in range(5):
        states.append(jitted(states[-1], KEY, batch)[0])
    assert len(traces) == 1
    # XLA fuses and reorders sums: a few roundings of float32, not more.
    state_jit, metrics_jit = jitted(states[2], KEY, batch)
    state, metrics = eager(states[2], KEY, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), metrics, metrics_jit)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state, state_jit
    )


@pytest.mark.parametrize("ema_decay", [0.9, lambda step: jnp.asarray(0.9, jnp.float32)])
def test_dtypes_are_kept_and_the_average_is_in_float32(ema_decay):
    tx = training.adam(1e-2)
    state = training.init_train_state({"w": jnp.zeros(2, jnp.bfloat16)}, tx)
    step = training.make_train_step(linear_loss, tx, ema_decay=ema_decay)
    new_state, _ = jax.eval_shape(step, state, KEY, jnp.ones((4, 2), jnp.bfloat16))
    jax.tree.map(lambda new, old: np.testing.assert_equal(new.dtype, old.dtype), new_state, state)
    assert state.params["w"].dtype == jnp.bfloat16 and state.step.dtype == jnp.int32
    assert state.ema_params["w"].dtype == jnp.float32
    assert optax.tree.get(state.opt_state, "nu")["w"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_a_slow_average_of_any_dtype_moves(dtype):
    """From 1 towards 1.5 with decay 0.999: after n steps it is 1.5 - 0.5 * 0.999^n."""
    tx, num_steps = optax.sgd(0.0), 2000
    decay = optax.constant_schedule(0.999)
    with jax.enable_x64(dtype == jnp.float64):
        step = training.make_train_step(linear_loss, tx, ema_decay=decay)
        state = training.init_train_state({"w": jnp.ones(2, dtype)}, tx)
        state = state._replace(params={"w": jnp.full(2, 1.5, dtype)})
        advance = jax.jit(
            lambda s: jax.lax.fori_loop(
                0, num_steps, lambda i, s: step(s, KEY, jnp.ones((4, 2), dtype))[0], s
            )
        )
        average = advance(state).ema_params["w"]
        assert average.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
    np.testing.assert_allclose(average, 1.5 - 0.5 * 0.999**num_steps, rtol=2e-5)


def test_adams_moments_in_half_precision_are_those_of_float32():
    """A second moment of decay 0.999 stands still in bfloat16; a norm of 300 overflows float16."""

    def loss(params, key, batch):
        return jnp.mean((batch @ params["w"]).astype(jnp.float32))

    def run(dtype):
        tx = training.adam(0.0, clip_norm=1.0)
        state = training.init_train_state({"w": jnp.ones(2, dtype)}, tx)
        step = jax.jit(training.make_train_step(loss, tx))
        for _ in range(30):
            state, metrics = step(state, KEY, jnp.full((4, 2), 300.0, dtype))
        return optax.tree.get(state.opt_state, "nu")["w"], metrics.gradient_norm

    # Clipped to norm 1, each entry is 1 / sqrt(2): nu = (1 - 0.999^30) / 2.
    for dtype in (jnp.bfloat16, jnp.float16):
        nu, norm = run(dtype)
        np.testing.assert_allclose(nu, (1 - 0.999**30) / 2, rtol=1e-5)
        np.testing.assert_allclose(norm, 300 * np.sqrt(2), rtol=1e-6)


def test_a_loss_that_is_no_scalar_is_refused():
    tx = optax.sgd(0.1)
    state = training.init_train_state({"w": jnp.zeros(2)}, tx)
    for value, got in (
        (lambda p: p["w"], r"float32 \(2,\)"),
        (lambda p: (p["w"].sum(), {}), "a tuple of 2"),
        (lambda p: None, "None"),
        (lambda p: p["w"].sum() * 1j, "complex64"),
        (lambda p: p["w"].sum().astype(int), "int32"),
    ):
        step = training.make_train_step(lambda params, key, batch, f=value: f(params), tx)
        with pytest.raises(ValueError, match=rf"loss_fn must return .* \(\); got .*{got}"):
            step(state, KEY, None)
    vector = training.make_train_step(linear_loss, tx, ema_decay=lambda n: jnp.ones(2))
    with pytest.raises(ValueError, match="ema_decay must return"):
        vector(state, KEY, jnp.ones((4, 2)))


def test_what_is_no_tree_of_floats_or_no_transformation_is_refused():
    tx = optax.sgd(0.1)
    for params, where in (
        ({"a": {"f": jnp.sin}}, r"the function sin at params\['a'\]\['f'\]"),
        ([jnp.ones(2), jnp.arange(3)], r"int32 \(3,\) at params\[1\]"),
        ({"n": 3}, "3 at"),
        ({"z": jnp.ones(2, jnp.complex64)}, "complex64"),
    ):
        with pytest.raises(ValueError, match=f"{where}.*eqx.partition"):
            training.init_train_state(params, tx)
    with pytest.raises(ValueError, match=r"the function adam.*optax.adam\(1e-3\)"):
        training.init_train_state({"w": jnp.zeros(2)}, optax.adam)
    with pytest.raises(ValueError, match="the function adam"):
        training.make_train_step(linear_loss, training.adam)
    state = training.init_train_state({"w": 1.0}, tx)  # a Python float is one
    assert state.params["w"].dtype == jnp.float32 and not state.params["w"].weak_type


@pytest.mark.parametrize(
    "how",
    [
        {"learning_rate": np.nan},
        {"learning_rate": -1e-3},
        {"learning_rate": 1e-3, "warmup_steps": np.nan},
        {"learning_rate": 1e-3, "warmup_steps": -1},
        {"learning_rate": 1e-3, "clip_norm": np.nan},
        {"learning_rate": 1e-3, "clip_norm": 0.0},
    ],
)
def test_adams_bounds(how):
    with pytest.raises(ValueError, match=f"{list(how)[-1]} must be"):
        training.adam(**how)
    with pytest.raises(ValueError, match="ema_decay must be"):
        training.make_train_step(linear_loss, optax.sgd(0.1), ema_decay=np.nan)


def test_the_key_of_a_step_is_the_key_folded_with_the_step():
    tx = optax.sgd(0.0)
    state = training.init_train_state({"w": jnp.zeros(())}, tx)
    step = jax.jit(training.make_train_step(lambda p, k, b: jax.random.normal(k) + p["w"], tx))
    drawn = []
    for n in range(4):
        again = step(state, KEY, None)[1].loss
        state, metrics = step(state, KEY, None)
        assert float(again) == float(metrics.loss)
        assert float(metrics.loss) == float(jax.random.normal(jax.random.fold_in(KEY, n)))
        drawn.append(float(metrics.loss))
    assert len(set(drawn)) == 4


def test_a_donated_state_shares_no_buffer():
    params, batch = regression(jax.random.key(0))
    tx = training.adam(1e-2)
    step = training.make_train_step(regression_loss, tx)
    state = training.init_train_state(params, tx)
    expected = jax.jit(step)(state, KEY, batch)
    assert_equal(jax.jit(step, donate_argnums=0)(state, KEY, batch), expected)
    assert state.params["w"].is_deleted() and state.ema_params["w"].is_deleted()
    # Created under jit, as a mesh wants it, the state is donated as well.
    params, _ = regression(jax.random.key(0))
    state = jax.jit(lambda params: training.init_train_state(params, tx))(params)
    assert_equal(jax.jit(step, donate_argnums=0)(state, KEY, batch), expected)


def vmapped(step, mesh):
    mapped = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name="data")
    split = lambda x: x.reshape((8, -1, *x.shape[1:]))  # noqa: E731
    return jax.jit(lambda state, key, batch: mapped(state, key, jax.tree.map(split, batch)))


def shard_mapped(check_vma):
    def wrap(step, mesh):
        whole = PartitionSpec()
        specs = (whole, whole, PartitionSpec("data"))
        return jax.jit(
            jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=check_vma)
        )

    return wrap


@pytest.mark.parametrize("wrap", [vmapped, shard_mapped(True), shard_mapped(False)])
def test_a_named_axis_averages_to_the_global_step(wrap):
    params, batch = regression(jax.random.key(0))
    tx = optax.sgd(0.1)  # unlike Adam, it shows a gradient that is a multiple of the right one

    def no_noise(params, key, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    state = training.init_train_state(params, tx)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    step = training.make_train_step(no_noise, tx, axis_name="data")
    got = wrap(step, mesh)(state, KEY, batch)
    expected = jax.jit(training.make_train_step(no_noise, tx))(state, KEY, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)


def test_replicas_draw_from_their_own_keys():
    tx = optax.sgd(0.0)
    state = training.init_train_state({"w": jnp.zeros(())}, tx)

    def loss(params, key, batch):
        return jax.random.normal(key) + params["w"]

    step = training.make_train_step(loss, tx, axis_name="data")
    mapped = jax.jit(jax.vmap(step, in_axes=(None, None, 0), axis_name="data"))
    key = jax.random.fold_in(KEY, 0)
    own = [float(jax.random.normal(jax.random.fold_in(key, i))) for i in range(8)]
    assert len(set(own)) == 8
    np.testing.assert_allclose(mapped(state, KEY, jnp.zeros(8))[1].loss, np.mean(own), rtol=1e-6)


def test_donation_leaves_the_callers_parameters_alone():
    params, tx = {"w": jnp.ones(3)}, optax.sgd(0.1)
    step = jax.jit(
        training.make_train_step(lambda p, key, x: (p["w"] * x).sum(), tx), donate_argnums=0
    )
    step(training.init_train_state(params, tx), jax.random.key(0), jnp.ones(3))
    np.testing.assert_array_equal(params["w"], np.ones(3))


def test_a_transformation_that_looks_at_the_loss_is_given_it():
    tx = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, factor=0.5))
    step = jax.jit(training.make_train_step(lambda p, key, x: 1.0 + 0 * p, tx))
    state = training.init_train_state(jnp.zeros(()), tx)
    for _ in range(4):
        state, _ = step(state, jax.random.key(0), jnp.ones(1))
    assert float(state.opt_state[1].scale) < 1  # the plateau was seen


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="negative"):
        training.adam(1e-3, warmup_steps=-5)
