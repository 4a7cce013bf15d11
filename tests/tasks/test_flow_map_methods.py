"""The ways to train an average velocity: their pairs of times, their losses, a task of each."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from made_runs import losses
from oracles import gaussian_average_velocity, jit
from oracles import x64 as x64

import fmjax as fm
from experiments import adversary, digits, flow_map
from fmjax import flow_maps, models
from fmjax.evaluation import sample
from fmjax.harness import keys, train
from fmjax.harness.read import read
from fmjax.tasks import adversaries, image_networks
from fmjax.tasks.flow_map_methods import (
    LOWEST_ALPHA,
    METHODS,
    PATH,
    Drawn,
    falling_alpha,
    path_sample,
)
from fmjax.tasks.flow_maps import average_velocity_of, network_of
from fmjax.tasks.images import UNetConfig

TINY = UNetConfig(
    channels=8, channel_multipliers=(1,), num_res_blocks=1, horizon=True, time_scale=16.0
)
SMALL = {"model": TINY, "num_steps": 2, "batch_size": 8, "num_samples": 0, "eval_examples": 0}
SMALL |= {"preview_every": 0, "checkpoint_every": 2, "log_every": 1, "warmup_steps": 0}
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


def test_a_transformer_has_its_horizon_from_the_start():
    assert flow_map.make_task(flow_map.Config(network="dit")).num_held_out > 0


def test_a_network_without_a_horizon_is_refused():
    flat = dataclasses.replace(TINY, horizon=False)
    with pytest.raises(ValueError, match="Give --model.horizon"):
        flow_map.make_task(flow_map.Config(model=flat))


def test_what_needs_one_loss_for_all_steps_is_refused_or_left_out():
    config = flow_map.Config(method="alpha_flow", **SMALL)
    assert flow_map.make_task(config).num_held_out == 0
    assert flow_map.make_task(dataclasses.replace(config, method="mean_flow")).num_held_out > 0
    with pytest.raises(ValueError, match="got 2 with --method alpha_flow"):
        flow_map.make_task(dataclasses.replace(config, accumulate=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_each_method_goes_on_from_a_flow(tmp_path, name):
    flow = flow_map.Config(workdir=tmp_path / "flow", method="flow_matching", **SMALL)
    train(flow, flow_map.make_task)
    config = dataclasses.replace(flow, workdir=tmp_path / name, method=name, init_from=flow.workdir)
    summary = train(dataclasses.replace(config, num_samples=10), flow_map.make_task)
    assert (tmp_path / name / summary["few_steps"]).exists()
    check_jumps(config.folder, tmp_path / "drawn")
    trained = read(config.folder)
    t, x, labels = jnp.full(3, 0.4), jnp.ones((3, 8, 8, 1)), jnp.arange(3)
    average = average_velocity_of(network_of(trained), trained.params, labels)
    u = trained.velocity(trained.params, labels)(t, x)
    np.testing.assert_allclose(average(t, t, x), u, rtol=1e-5, atol=1e-6)


def check_jumps(folder, out):
    """Samples by the method's own way, which are theirs alone whatever is drawn beside them."""
    found = {}
    for num, size in ((20, 16), (5, 8)):
        flags = {"num": num, "batch_size": size, "out": out / f"{num}.npz", "format": "npz"}
        sample.main(sample.Config(folder, solver="jumps", num_steps=2, seed=3, **flags))
        found[num] = np.load(out / f"{num}.npz")["images"].astype(int)
    assert (found[20][:5] == found[5]).mean() > 0.99  # rounding crosses a level once in a while
    trained = read(folder)
    assert trained.task.samples is not None
    key, key_jump = keys.key(3, "drawn"), keys.key(3, "jumps")
    x0 = trained.source.sample(jax.random.fold_in(key, 1), 1)
    given = trained.params, jax.random.fold_in(key_jump, 1), x0, np.array([1], np.int32), 2
    by_hand = trained.task.samples.arrays(trained.task.samples.jump(*given))["images"][0]
    assert (found[20][1] == by_hand).mean() > 0.95
    steps = [METHODS["mean_flow"], METHODS["consistency"]]
    average = average_velocity_of(network_of(trained), trained.params, given[3])
    drawn = [method.sample(given[1], average, x0, 2) for method in steps]
    ways = [trained.task.samples.arrays(x1)["images"][0] for x1 in drawn]
    renoises = trained.config.method == "consistency"
    assert (by_hand == ways[renoises]).mean() > 0.95 > (by_hand == ways[not renoises]).mean()


@pytest.mark.slow
def test_jumps_are_of_average_velocities_and_unguided(tmp_path):
    flow = flow_map.Config(workdir=tmp_path / "flow", method="mean_flow", **SMALL)
    train(flow, flow_map.make_task)
    flags = {"solver": "jumps", "num_steps": 1, "num": 4}
    with pytest.raises(ValueError, match="Guidance is of a velocity.*got a scale of 2"):
        sample.main(sample.Config(flow.folder, guidance=2.0, **flags))
    with pytest.raises(ValueError, match="give --num-steps"):
        sample.main(sample.Config(flow.folder, solver="jumps"))
    plain = digits.Config(workdir=tmp_path / "digits", num_steps=1, num_samples=0, eval_examples=0)
    plain = dataclasses.replace(plain, model=TINY, preview_every=0, warmup_steps=0)
    train(plain, digits.make_task)
    with pytest.raises(ValueError, match="a run of digits, a velocity alone"):
        sample.main(sample.Config(plain.folder, **flags))


@pytest.mark.slow
def test_another_network_to_begin_with_is_named_by_its_flags(tmp_path):
    flow = flow_map.Config(workdir=tmp_path / "flow", method="flow_matching", **SMALL)
    train(flow, flow_map.make_task)
    other = dataclasses.replace(TINY, channels=16, attention_resolutions=(4,))
    begun = dataclasses.replace(flow, init_from=flow.folder, model=other, workdir=tmp_path / "b")
    flags = f"--model.channels {TINY.channels} --model.attention-resolutions"
    with pytest.raises(ValueError, match=f"--init-from needs.*which has {flags}. Give these"):
        flow_map.make_task(begun)
    with pytest.raises(ValueError, match="which has --network unet --model.channels 8"):
        usual = dataclasses.replace(begun, network="dit", model=flow_map.Config.model)
        flow_map.make_task(usual)
    with pytest.raises(ValueError, match="--generator needs.*which has --conditional. Give"):
        made_adversary(generator=flow.folder, conditional=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_networks, "steps_in", lambda folder: [2])
        flow_map.make_task(begun)  # a run that has begun needs nothing of it
    record = flow.folder / "config.json"
    record.write_text("{")  # for those who read the parameters to complain of
    flow_map.make_task(dataclasses.replace(begun, workdir=tmp_path / "c"))
    dropped = dataclasses.replace(TINY, dropout=0.1)
    flow_map.make_task(dataclasses.replace(begun, model=dropped))
    nowhere = dataclasses.replace(begun, model=TINY, init_from=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere, which does not exist. Train"):
        train(nowhere, flow_map.make_task)


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


def made_adversary(**flags):
    small = SMALL | {"discriminator": adversaries.DiscriminatorConfig(4, (1, 2))}
    config = adversary.Config(**small | flags)
    task = adversary.make_task(config)
    return config, task, jax.jit(task.init)(jax.random.key(0))


@pytest.mark.slow
def test_either_side_of_an_adversary_moves_by_its_own_loss():
    """The penalty leaves the generator's gradient as it is, its weight the discriminator's."""
    moved = {}
    for name, flags in {
        "plain": {},
        "penalty": {"penalty": 7.0},
        "weight": {"adversarial_weight": 3.0, "transport_weight": 0.5},
    }.items():
        config, task, state = made_adversary(clip_norm=None, **flags)
        noisy = jax.tree.map(
            lambda x: x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), state.params
        )
        batch = jax.tree.map(jnp.asarray, task.batch(np.arange(8)))
        after, _ = jax.jit(task.step)(state._replace(params=noisy), jax.random.key(1), batch)
        # Adam's first moments are (1 - b1) times the gradient.
        inner = after.opt_state.inner_states
        moved[name] = [jax.tree.leaves(inner[k]) for k in ("generator", "discriminator")]

    def same(a, b):
        return all(np.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(a, b, strict=True))

    assert same(moved["plain"][0], moved["penalty"][0])
    assert not same(moved["plain"][1], moved["penalty"][1])
    assert same(moved["plain"][1], moved["weight"][1])
    assert not same(moved["plain"][0], moved["weight"][0])


@pytest.mark.slow
def test_an_adversary_begins_with_a_flow_map_and_draws(tmp_path):
    flow = flow_map.Config(workdir=tmp_path / "flow", method="mean_flow", **SMALL)
    train(flow, flow_map.make_task)
    config, task, state = made_adversary(generator=tmp_path / "flow")
    want = read(flow.folder).params
    jax.tree.map(np.testing.assert_array_equal, state.params["generator"], want)
    config = dataclasses.replace(config, workdir=tmp_path / "run", num_samples=10)
    summary = train(config, adversary.make_task)
    assert (tmp_path / "run" / summary["few_steps"]).exists()
    shutil.rmtree(tmp_path / "flow")  # a run that has begun needs it no more
    train(dataclasses.replace(config, num_steps=4, num_samples=0), adversary.make_task)
    trained = read(config.folder)
    assert trained.step == 4
    u = trained.velocity(trained.params, jnp.arange(2))(jnp.array(0.5), jnp.ones((2, 8, 8, 1)))
    own = network_of(trained).apply(
        trained.params["generator"], jnp.array(0.5), jnp.ones((2, 8, 8, 1)), jnp.arange(2)
    )
    np.testing.assert_allclose(u, own, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("module", [flow_map, adversary])
def test_four_devices_that_share_the_state_train_as_one(tmp_path, module):
    optimizer = "muon" if module is flow_map else "adam"
    config = module.Config(**SMALL | {"num_steps": 3}, optimizer=optimizer)
    found = []
    for number in (1, 4):
        folder = tmp_path / str(number)
        flags = {"workdir": folder, "num_devices": number, "fsdp": number, "checkpoint_every": 3}
        train(dataclasses.replace(config, **flags), module.make_task)
        found.append(losses(folder))
    assert len(found[0]) == 3
    np.testing.assert_allclose(*found, rtol=2e-5)  # sums are taken in another order


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"init_from": "runs/flow"}, "Give --generator runs/flow"),
        ({"model": dataclasses.replace(TINY, horizon=False)}, "Give --model.horizon"),
        ({"method": "alpha_flow"}, "got --method alpha_flow"),
        ({"penalty": -1.0}, "--penalty must be finite"),
    ],
)
def test_adversaries_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        made_adversary(**flags)


def test_few_steps_of_a_known_average_velocity_end_where_the_flow_does():
    exact = gaussian_average_velocity(PATH, np.array([2.0]), np.array([0.5]))
    x0 = jnp.linspace(-2.0, 2.0, 9)[:, None]
    for name in ("mean_flow", "shortcut"):
        for num_steps in (1, 3):
            x1 = METHODS[name].sample(jax.random.key(0), exact, x0, num_steps)
            np.testing.assert_allclose(x1, 2 + 0.5 * x0, atol=1e-5)
    renoised = METHODS["consistency"].sample(jax.random.key(0), exact, jnp.tile(x0, (2000, 1)), 3)
    np.testing.assert_allclose([renoised.mean(), renoised.std()], [2, 0.5], atol=0.02)
