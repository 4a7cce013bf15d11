"""Quality against cost: which ways stand in the curve of a run, and what a flow map's jumps are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import untrained

import fmjax as fm
from experiments import digits, flow_map
from fmjax.evaluation import curve, evaluate, protocol
from fmjax.evaluation.drawing import JUMPS, Way
from fmjax.evaluation.protocol import Config
from fmjax.harness import keys
from fmjax.harness.read import read
from fmjax.harness.store import Store
from fmjax.metrics import Estimate
from fmjax.tasks.flow_map_methods import METHODS
from fmjax.tasks.flow_maps import average_velocity_of, network_of
from fmjax.tasks.images import UNetConfig

UNET = {"channels": 8, "channel_multipliers": (1,), "num_res_blocks": 1}
FLOW_MAP = UNetConfig(**UNET, horizon=True, time_scale=16.0)
NUM = 12  # a batch of 8, and one of which 4 are kept


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "consistency"])
def test_a_flow_maps_jumps_are_its_own_from_the_noise_of_all(tmp_path, name):
    config = flow_map.Config(workdir=tmp_path / "run", method=name, model=FLOW_MAP)
    untrained(config, flow_map.make_task)
    trained, seen = read(config.folder), []

    def quality(x1):
        seen.append(x1)
        return Estimate(1.0, 0.1)

    store, points = Store(tmp_path, "curve", {}), [Way(JUMPS, num_steps=n) for n in (1, 2)]
    rows = curve.measure(trained, store, 8, NUM, points, quality, seed=3, tight=0.1)
    assert [row["num_evaluations"] for row in rows[:2]] == [1, 2]
    assert all(row["error_rms"] > 0 for row in rows[:2])

    key, key_jumps = keys.key(3, "curve"), keys.key(3, "jumps")
    x0 = jnp.concatenate([trained.source.sample(jax.random.fold_in(key, i), 8) for i in (0, 1)])
    average = average_velocity_of(network_of(trained), trained.params, jnp.arange(NUM) % 10)
    ends = jax.jit(lambda x0: fm.flow_maps.flow_map(average)(0.0, 1.0, x0))(x0[:NUM])
    np.testing.assert_allclose(seen[0], ends, rtol=1e-4, atol=1e-5)
    for k in (0, 11):
        one = average_velocity_of(network_of(trained), trained.params, jnp.array([k % 10]))
        want = METHODS[name].sample(jax.random.fold_in(key_jumps, k), one, x0[k : k + 1], 2)
        np.testing.assert_allclose(seen[1][k], want[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_curve_has_jumps_where_a_run_has_and_is_not_guided(tmp_path):
    settings = Config(tmp_path, curve_evaluations=(8,), curve_tolerances=(0.1,), curve_jumps=(2, 1))
    config = flow_map.Config(workdir=tmp_path / "run", model=FLOW_MAP)
    untrained(config, flow_map.make_task)
    solvers = curve.ways(settings, read(config.folder, guidance=2.0))
    assert {way.solver for way in solvers} == {"Euler", "Heun", "Midpoint", "Tsit5", "Dopri5"}
    jumps = [Way(JUMPS, num_steps=1), Way(JUMPS, num_steps=2)]
    assert curve.ways(settings, read(config.folder)) == [*solvers, *jumps]
    assert [str(way) for way in jumps] == ["1 jump", "2 jumps"]
    plain = digits.Config(workdir=tmp_path / "digits", model=UNetConfig(**UNET))
    untrained(plain, digits.make_task)
    velocity = read(plain.folder)
    assert curve.ways(settings, velocity) == solvers
    for run in (velocity, read(config.folder, guidance=2.0)):
        assert "curve_jumps" not in protocol.record(settings, run)["flags"]
    assert protocol.record(settings, read(config.folder))["flags"]["curve_jumps"] == [2, 1]
    with pytest.raises(ValueError, match="a run of digits, a velocity alone"):
        evaluate.main(dataclasses.replace(settings, run=plain.folder, guidance=1.0))
