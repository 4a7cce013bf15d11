"""Runs of flow maps and of adversaries: what they begin with, draw, share, and what is refused."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import losses
from oracles import x64 as x64

from experiments import adversary, digits, flow_map
from fmjax.evaluation import sample
from fmjax.harness import keys, train
from fmjax.harness.read import read
from fmjax.tasks import adversaries, image_networks
from fmjax.tasks.flow_map_methods import (
    METHODS,
)
from fmjax.tasks.flow_maps import average_velocity_of, network_of
from fmjax.tasks.images import UNetConfig

TINY = UNetConfig(
    channels=8, channel_multipliers=(1,), num_res_blocks=1, horizon=True, time_scale=16.0
)
SMALL = {"model": TINY, "num_steps": 2, "batch_size": 8, "num_samples": 0, "eval_examples": 0}
SMALL |= {"preview_every": 0, "checkpoint_every": 2, "log_every": 1, "warmup_steps": 0}


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
    train(config, flow_map.make_task)
    trained = read(config.folder)
    t, x, labels = jnp.full(3, 0.4), jnp.ones((3, 8, 8, 1)), jnp.arange(3)
    average = average_velocity_of(network_of(trained), trained.params, labels)
    u = trained.velocity(trained.params, labels)(t, x)
    np.testing.assert_allclose(average(t, t, x), u, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "consistency"])
def test_samples_by_a_methods_own_way_are_theirs_alone_whatever_is_drawn_beside_them(
    tmp_path, name
):
    flags = {"workdir": tmp_path / "run", "method": name, **SMALL, "num_samples": 10}
    summary = train(flow_map.Config(**flags), flow_map.make_task)
    folder, out = tmp_path / "run", tmp_path / "drawn"
    assert (folder / summary["few_steps"]).exists()
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
