"""`from_loss`: the keys of draw and loss, what it refuses; guidance; the purposes of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from fmjax import harness, training
from fmjax.harness import keys
from fmjax.harness.task import Task, Trained, guided

KEY = jax.random.key(5)
TX = optax.sgd(0.1)


def make(draw, loss, params=0.0):
    return harness.from_loss(draw, loss, TX, lambda key: jnp.asarray(params))


def test_draw_gets_the_first_half_of_the_steps_key_and_loss_the_second():
    """k_n = fold_in(key, n); each half shows as the numbers that it draws."""

    def draw(key, batch):
        return jax.random.uniform(key, batch.shape)

    def loss(params, key, drawn):
        return 10 * drawn + jax.random.uniform(key, drawn.shape) + 0 * params

    init, step = make(draw, loss)
    state = init(KEY)
    for n in range(3):
        key_draw, key_loss = jax.random.split(jax.random.fold_in(KEY, n))
        state, metrics = jax.jit(step)(state, KEY, jnp.zeros(8))
        first, second = (jax.random.uniform(key, (8,)) for key in (key_draw, key_loss))
        np.testing.assert_allclose(metrics.loss, np.mean(10 * first + second), rtol=1e-6)
    assert int(state.step) == 3


def test_init_is_the_state_before_the_first_step():
    init, _ = harness.from_loss(tiny.draw, tiny.loss, TX, lambda key: tiny.init_params(2, key))
    state, params = init(KEY), tiny.init_params(2, KEY)
    assert int(state.step) == 0
    for got in (state.params, state.ema_params):
        jax.tree.map(np.testing.assert_array_equal, got, params)


@pytest.mark.slow
def test_jitted_and_eager_steps_are_the_same():
    task = tiny.make_task(tiny.Config())
    state, batch = task.init(KEY), task.batch(np.arange(16))
    eager, jitted = task.step(state, KEY, batch), jax.jit(task.step)(state, KEY, batch)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_the_flags_name_the_optimiser_and_its_rate(name):
    flags = {"warmup_steps": 2, "decay_steps": 25, "clip_norm": 0.5}
    config = tiny.Config(optimizer=name, **flags)
    tx = harness.optimizer(config)
    want = {"adam": training.adam, "muon": training.muon}[name](1e-2, **flags)
    params = {"Block_0": {"Dense_0": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}}}
    states = [tx.init(params), want.init(params)]
    for n in range(5):
        gradients = jax.tree.map(lambda leaf, n=n: (n + 1) * jnp.sin(leaf), params)
        got, states[0] = tx.update(gradients, states[0], params)
        expected, states[1] = want.update(gradients, states[1], params)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert optax.tree.norm(got) > 0


def test_the_average_and_the_mean_are_those_of_the_training_step():
    """The step is `training.make_train_step`'s, of the mean of the losses."""
    task = tiny.make_task(tiny.Config())
    config = tiny.Config()

    def mean_loss(params, key, batch):
        key_draw, key_loss = jax.random.split(key)
        return jnp.mean(tiny.loss(params, key_loss, tiny.draw(key_draw, batch)))

    want = training.make_train_step(mean_loss, harness.optimizer(config), ema_decay=0.9)
    state, batch = task.init(KEY), task.batch(np.arange(16))
    for a, b in zip(
        jax.tree.leaves(jax.jit(task.step)(state, KEY, batch)),
        jax.tree.leaves(jax.jit(want)(state, KEY, batch)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("draw", "loss", "message"),
    [
        (
            lambda key, x: x,
            lambda params, key, x: jnp.mean(x) * params,
            r"loss must return .*\(8,\)",
        ),
        (
            lambda key, x: x,
            lambda params, key, x: x[:, None] * params,
            r"loss must return .*\(8,\)",
        ),
        (lambda key, x: x, lambda params, key, x: x[:4] * params, r"loss must return .*\(8,\)"),
        (lambda key, x: (x, x[:4]), None, "all begin with the axis of the batch; got .*8.*4"),
        (lambda key, x: (x, jnp.mean(x)), None, "all begin with the axis of the batch"),
        (lambda key, x: (), None, "all begin with the axis of the batch"),
    ],
)
def test_what_is_no_number_for_each_example_is_refused(draw, loss, message):
    init, step = make(draw, loss)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, init(KEY), KEY, jnp.zeros(8))


def test_a_batch_may_be_filtered_as_a_whole():
    """What draw returns decides the number of losses: a pair for each two examples, say."""
    init, step = make(lambda key, x: x[::2] - x[1::2], lambda params, key, drawn: drawn + params)
    _, metrics = step(init(KEY), KEY, jnp.arange(8.0))
    assert float(metrics.loss) == -1


def test_guidance_of_a_task_is_that_of_the_two_velocities():
    task = tiny.make_task(tiny.Config())
    params, x, labels = tiny.init_params(2, KEY), tiny.points(), jnp.arange(60) % 3
    known, none = (tiny.velocity(params, c)(0.3, x) for c in (labels, jnp.full(60, 3)))
    np.testing.assert_allclose(
        guided(task, params, labels, 2.5)(0.3, x), none + 2.5 * (known - none), atol=1e-5
    )
    np.testing.assert_array_equal(guided(task, params, labels, 1.0)(0.3, x), known)
    trained = Trained(task, "tiny", None, 0, params, guidance=2.5)
    np.testing.assert_allclose(
        trained.guided(params, labels)(0.3, x), none + 2.5 * (known - none), atol=1e-5
    )
    np.testing.assert_array_equal(trained.velocity(params, labels)(0.3, x), known)
    np.testing.assert_array_equal(trained.condition(np.array([4, 5])), [1, 2])


def test_guidance_of_a_task_without_a_null_condition_is_refused():
    task = tiny.make_task(tiny.Config())
    for samples in (None, task.samples._replace(null=None)):
        with pytest.raises(ValueError, match="Guidance needs a run that was trained with"):
            guided(task._replace(samples=samples), {}, jnp.arange(3), 2.0)
    with pytest.raises(ValueError, match="Samples need Task.samples; the task of tiny has none"):
        _ = Trained(task._replace(samples=None), "tiny", None, 0, {}).source


def test_purposes_have_keys_of_their_own():
    """One number each, for good: another would change what is drawn."""
    assert keys.PURPOSES == {
        "parameters": 0, "training": 1, "finish": 2, "preview": 3, "held out": 4, "samples": 5,
        "likelihood": 6, "curve": 7, "drawn": 8, "pairs": 9, "jumps": 10,
    }  # fmt: skip
    found = [keys.key(seed, purpose) for seed in (0, 1) for purpose in keys.PURPOSES]
    assert len({jax.random.key_data(key).tobytes() for key in found}) == 2 * len(keys.PURPOSES)
    want = jax.random.fold_in(jax.random.key(3), 6)
    assert (keys.key(3, "likelihood") == want).all()


def test_a_task_is_made_of_five_things():
    """All else has a default, so that the shortest task is short."""
    assert [name for name in Task._fields if name not in Task._field_defaults] == [
        "num_examples", "batch", "init", "step", "velocity"
    ]  # fmt: skip
