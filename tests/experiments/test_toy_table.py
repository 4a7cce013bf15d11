"""The table of 2-D pairs: its data, pairing, energies, training, and the command as a whole."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.distance import cdist

from experiments import toy_data, toy_flows, toy_report, toy_table
from fmjax.metrics.transport import wasserstein2

PI = np.pi
# Mean, and covariance's diagonal, of every distribution; (x, y) are uncorrelated only on the ring.
WIDE = 7.0 / np.sqrt((1.625 - 1 / PI) / 2 + 0.01 - 0.375**2)
MOMENTS = {
    "gaussian": (toy_data.gaussian, [0, 0], [1, 1]),
    "ring": (toy_data.ring(5.0, 1.0), [0, 0], [13.5, 13.5]),
    "wide ring": (toy_data.ring(12.0, 1.5), [0, 0], [74.25, 74.25]),
    "moons": (toy_data.moons, [0, 0.5], [3.01, 4 * (9 / 16 - 1 / PI + 0.0025)]),
    "wide moons": (
        toy_data.wide_moons,
        [0.125 * WIDE, -0.125 * WIDE],
        [0.76 * WIDE**2, (9 / 16 - 1 / PI + 0.01) * WIDE**2],
    ),
    "S-curve": (toy_data.s_curve, [0, 0], [2.25 * 0.5025, 2.25 * (1.5025 + 4 / (3 * PI))]),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments(name):
    """Within four standard errors of 400,000 points."""
    sampler, mean, variance = MOMENTS[name]
    x = sampler(np.random.default_rng(0), 400_000)
    assert x.shape == (400_000, 2)
    error = np.sqrt(np.array(variance) / len(x))
    assert (abs(x.mean(0) - mean) < 4 * error).all()
    squares = (x - mean) ** 2
    assert (abs(squares.mean(0) - variance) < 4 * squares.std(0) / np.sqrt(len(x))).all()


def test_wide_moons_have_deviation_seven_over_both_coordinates():
    x = toy_data.wide_moons(np.random.default_rng(1), 400_000)
    assert abs(x.mean()) < 0.05 and abs(x.std() - 7.0) < 0.03  # four standard errors


def test_ring_has_eight_modes():
    """cos(8 angle) has mean 1 without noise: exp(-32 sigma^2) with noise sigma on the angle."""
    x = toy_data.ring(1000.0, 1.0)(np.random.default_rng(0), 1000)
    angles = np.arctan2(x[:, 1], x[:, 0])
    assert np.cos(8 * angles).min() > 0.999
    assert len(set(np.round(angles / (PI / 4)).astype(int) % 8)) == 8


def test_exact_pairing_has_optax_cost():
    rng = np.random.default_rng(0)
    pair = toy_data.PAIRS["moons-8gaussians"]
    x0, x1 = (sampler(rng, 128).astype(np.float32) for sampler in pair)
    paired = toy_data.exact(x0, x1)
    assert sorted(map(tuple, paired)) == sorted(map(tuple, x0))
    rows, columns = optax.assignment.hungarian_algorithm(jnp.array(cdist(x0, x1, "sqeuclidean")))
    best = ((x0[np.array(rows)] - x1[np.array(columns)]).astype(np.float64) ** 2).sum()
    cost = ((paired - x1).astype(np.float64) ** 2).sum()
    np.testing.assert_allclose(cost, best, rtol=1e-6)
    assert cost < 0.7 * ((x0 - x1) ** 2).sum()


def test_batches_are_paired_whole_and_drawn_from_the_training_points():
    trains = [toy_data.split("moons-8gaussians", seed, 50, 5)[0] for seed in (3, 4)]

    def draw(pairing, seeds, trains):
        chunks = toy_data.batches(
            "moons-8gaussians", seeds, trains, pairing, num_steps=5, chunk_steps=3, batch_size=16
        )
        return [np.concatenate(x) for x in zip(*chunks, strict=True)]

    x0, x1 = draw(toy_data.independent, (3, 4), trains)
    paired0, paired1 = draw(toy_data.exact, (3, 4), trains)
    assert x0.shape == x1.shape == (5, 2, 16, 2) and x0.dtype == np.float32
    np.testing.assert_array_equal(paired1, x1)
    for step in range(5):
        for seed in range(2):
            want = toy_data.exact(x0[step, seed], x1[step, seed])
            np.testing.assert_array_equal(paired0[step, seed], want)
            for points, train in ((x0, trains[seed][0]), (x1, trains[seed][1])):
                assert set(map(tuple, points[step, seed])) <= set(map(tuple, train))
    alone0, alone1 = draw(toy_data.exact, (4,), trains[1:])
    np.testing.assert_array_equal(alone0[:, 0], paired0[:, 1])
    np.testing.assert_array_equal(alone1[:, 0], paired1[:, 1])


def test_squared_distance_of_a_shift_is_its_square():
    """Centring takes away the bias, 7 % of the plain estimate's 4 here."""
    shift = np.array([2.0, 0.0])
    pair = toy_data.Pair(toy_data.gaussian, lambda rng, num: toy_data.gaussian(rng, num) + shift)
    estimate = toy_data.squared_distance(
        pair, np.random.default_rng(0), num_points=100, num_draws=200
    )
    assert abs(estimate.value - 4.0) < 4 * estimate.standard_error < 0.3


@pytest.mark.slow
def test_a_translation_has_no_excess_energy():
    """v = a: every path is straight, E int |v|^2 = |a|^2 = W2^2, NPE = 0."""
    a = jnp.array([3.0, -1.0])
    x0 = jax.random.normal(jax.random.key(0), (50, 2))
    trajectory = np.asarray(toy_flows.solve(lambda t, x: jnp.broadcast_to(a, x.shape), x0))
    assert trajectory.shape == (101, 50, 3)
    end, energy = trajectory[-1, :, :2], trajectory[-1, :, 2]
    np.testing.assert_allclose(end, np.asarray(x0) + np.asarray(a), atol=1e-5)
    np.testing.assert_allclose(energy, 10.0, rtol=1e-5)
    distance = wasserstein2(x0, end) ** 2
    np.testing.assert_allclose(toy_report.path_energy_excess(energy, distance), 0.0, atol=2e-5)


@pytest.mark.slow
def test_a_rotation_pays_for_its_arc():
    """v = w J x keeps |x|, so int |v|^2 = w^2 |x|^2, where W2 between N(0, I) and itself is 0.

    Euler's circle grows: |x_n|^2 = (1 + (w h)^2)^n |x_0|^2, summed as a geometric series.
    """
    w, h = 0.5 * PI, 0.01
    x0 = jax.random.normal(jax.random.key(0), (20, 2))
    turn = jnp.array([[0.0, w], [-w, 0.0]])
    end = np.asarray(toy_flows.solve(lambda t, x: x @ turn, x0))[-1]
    squares = np.asarray(jnp.sum(x0**2, axis=1))
    growth = (1 + (w * h) ** 2) ** np.arange(100)
    np.testing.assert_allclose(end[:, 2], w**2 * squares * growth.mean(), rtol=1e-5)
    np.testing.assert_allclose(end[:, 2], w**2 * squares, rtol=0.013)  # half of 100 (w h)^2


@pytest.mark.slow
def test_paths_of_the_methods():
    """Means and deviations of x_t and u_t around a fixed pair (x0, x1)."""
    num, sigma = 200_000, 0.1
    x0, x1 = jnp.broadcast_to(jnp.array([1.0, -2.0]), (num, 2)), jnp.full((num, 2), 3.0)
    for method in toy_flows.METHODS:
        t, x_t, u_t = toy_flows.draw(method, sigma, jax.random.key(0), x0, x1)
        straight = t[:, None] * x1 + (1 - t[:, None]) * x0
        rest = np.asarray(x_t - straight)
        if method == "FM":
            np.testing.assert_allclose(rest, sigma * t[:, None] * x0, atol=1e-6)
            np.testing.assert_allclose(u_t, x1 - (1 - sigma) * x0, rtol=1e-6)
        else:
            np.testing.assert_allclose(u_t, x1 - x0, rtol=1e-6)
            assert abs(rest.std() / sigma - 1) < 0.01 and abs(rest.mean()) < 1e-3
        assert abs(np.asarray(t).mean() - 0.5) < 0.003


@pytest.mark.slow
def test_seeds_side_by_side_train_as_alone():
    def train(seeds):
        trains = [toy_data.split("gaussian-moons", seed, 100, 1)[0] for seed in seeds]
        chunks = toy_data.batches(
            "gaussian-moons", seeds, trains, toy_data.exact,
            num_steps=20, chunk_steps=10, batch_size=32,
        )  # fmt: skip
        return toy_flows.train(seeds, chunks, toy_flows.make("OT-CFM", 0.1))

    params, losses = train((0, 7))
    alone, alone_losses = train((7,))
    assert losses.shape == (20, 2) and abs(losses[:, 0] - losses[:, 1]).max() > 0.01
    np.testing.assert_allclose(losses[:, 1], alone_losses[:, 0], rtol=1e-5)
    for all_seeds, one in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(all_seeds[1], one[0], atol=1e-5)
    start = jax.tree.leaves(toy_flows.init(jax.random.split(jax.random.key(7))[0]).params)
    assert any(
        abs(a - b[0]).max() > 1e-3 for a, b in zip(start, jax.tree.leaves(alone), strict=True)
    )


def tiny(workdir, **kwargs):
    flags = dict(seeds=(0, 1), num_steps=200, batch_size=32, num_train=500, num_test=100)
    flags |= dict(chunk_steps=100, reference_draws=2, recorded=pathlib.Path("no such file"))
    return toy_table.Config(workdir=workdir, **flags | kwargs)


@pytest.mark.slow
def test_the_command_repeats_and_goes_on(tmp_path, capsys, monkeypatch):
    few = dict(list(toy_data.PAIRS.items())[:2])
    monkeypatch.setattr(toy_data, "PAIRS", few)
    whole = toy_table.main(tiny(tmp_path / "whole"))
    table = capsys.readouterr().out
    assert [(cell["pair"], cell["method"]) for cell in whole["cells"]] == toy_table.cells()
    assert len(whole["cells"]) == 11  # no FM from moons
    for cell in whole["cells"]:
        assert len(cell["wasserstein2"]) == len(cell["path_energy"]) == 2
        assert np.isfinite(cell["wasserstein2"] + cell["path_energy"]).all()
        assert f"| {cell['pair']} | {cell['method']}" in table
        assert (tmp_path / "whole" / f"{cell['pair']}_{cell['method']}.png").stat().st_size > 5000
    assert "no such file is not there" in table and "±" in table
    assert (
        json.loads((tmp_path / "whole" / "toy_table.json").read_text())["cells"] == whole["cells"]
    )

    # A run that was stopped before its fourth cell, and goes on.
    def stop(config, pair, method):
        if (pair, method) == toy_table.cells()[3]:
            raise KeyboardInterrupt
        return run_cell(config, pair, method)

    run_cell = toy_table.run_cell
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(toy_table, "run_cell", stop)
        toy_table.main(tiny(tmp_path / "parts"))
    calls = []
    monkeypatch.setattr(toy_table, "run_cell", lambda *a: calls.append(a[1:]) or run_cell(*a))
    parts = toy_table.main(tiny(tmp_path / "parts"))
    assert calls == toy_table.cells()[3:]

    def numbers(summary):
        names = ("wasserstein2", "path_energy", "last_loss")
        return [[cell[name] for name in names] for cell in summary["cells"]], summary["pairs"]

    assert numbers(parts) == numbers(whole)
    with pytest.raises(ValueError, match="Take another --workdir"):
        toy_table.main(tiny(tmp_path / "whole", sigma=0.2))


def test_seeds_must_be_two_and_different(tmp_path):
    for seeds in ((0,), (1, 1)):
        with pytest.raises(ValueError, match="--seeds must be different numbers, at least 2"):
            toy_table.main(tiny(tmp_path, seeds=seeds))
    with pytest.raises(ValueError, match="--num-steps must be positive; got 0"):
        toy_table.main(tiny(tmp_path, num_steps=0))


def test_cells_that_differ_are_listed():
    """Means 1 and 2 of 5 seeds with deviation 0.5: sqrt(2 * 0.25 / 5) apart is 0.316, z = -3.16."""
    spread = 0.5 * np.array([-1.0, -1.0, 0.0, 1.0, 1.0])
    same = [4.0, 4.1, 4.2, 4.3, 4.4]
    cells = [{"pair": "p", "method": "FM", "path_energy": same, "wasserstein2": list(1 + spread)}]
    runs = [
        {"pair": "p", "method": "FM", "path_energy": e, "wasserstein2": w}
        for e, w in zip(same, 2 + spread, strict=True)
    ]
    pairs = [
        {
            "pair": "p",
            "squared_distance": 2.0,
            "squared_distance_standard_error": 0.1,
            "data_to_data_wasserstein2": [0.1, 0.3],
        }
    ]
    text = toy_report.markdown(pairs, cells, runs)
    assert "| p | FM | 1.000 ± 0.500 | 2.000 ± 0.500 | 1.100 ± 0.079 | 1.100 ± 0.079 |" in text
    assert "| p | data to data | 0.200 ± 0.141 |" in text
    assert "- p, FM, W2: 1.000 ± 0.500 against 2.000 ± 0.500, -3.2 standard errors." in text
    assert "FM, NPE: " not in text
    for run, w in zip(runs, 1.1 + spread, strict=True):
        run["wasserstein2"] = w
    assert "None." in toy_report.markdown(pairs, cells, runs)
    assert "apart" not in toy_report.markdown(pairs, cells, [])  # nothing was compared


def test_two_samplers_of_one_training_are_two_rows():
    pair = {"pair": "p", "squared_distance": 2.0, "squared_distance_standard_error": 0.1}
    pair["data_to_data_wasserstein2"] = [0.1, 0.3]
    cell = {"pair": "p", "method": "SF2M", "path_energy": [3.0, 5.0], "wasserstein2": [1.0, 2.0]}
    cell["sde_wasserstein2"] = [0.5, 0.7]
    runs = [
        {"pair": "p", "method": "SF2M", "path_energy": e, "wasserstein2": w, "sde_wasserstein2": s}
        for e, w, s in ((3.0, 1.0, 4.5), (5.0, 2.0, 4.7))
    ]
    text = toy_report.markdown([pair], [cell], runs)
    assert "| SF2M, flow | 1.500 ± 0.707 | 1.500 ± 0.707 | 1.000 ± 0.707 | 1.000 ± 0.707 |" in text
    assert "| SF2M, SDE | 0.600 ± 0.141 | 4.600 ± 0.141 | - | - |" in text
    assert "- p, SF2M, SDE, W2: 0.600 ± 0.141 against 4.600 ± 0.141, -28.3 standard errors." in text
    assert text.count("standard errors.") == 1  # the flow's are equal


def test_torchcfm_runs_under_another_protocol_are_left_out(tmp_path, capsys):
    path = tmp_path / "recorded.json"
    config = tiny(tmp_path, recorded=path)
    own = {name: getattr(config, name) for name in toy_table.PROTOCOL}
    path.write_text(json.dumps({"protocol": own, "runs": ["a run"]}))
    assert toy_table.load_recorded(config) == ["a run"]
    path.write_text(json.dumps({"protocol": own | {"sigma": 0.3}, "runs": ["a run"]}))
    assert toy_table.load_recorded(config) == []
    assert "No runs of torchcfm under this protocol" in capsys.readouterr().out


@pytest.mark.slow
def test_fm_is_lipmans_velocity():
    """(x1 - (1 - sigma) x_t) / (1 - (1 - sigma) t), at the times and points that were drawn."""
    x0, x1 = jax.random.normal(jax.random.key(1), (2, 64, 2))
    t, x_t, u_t = toy_flows.draw("FM", 0.1, jax.random.key(0), x0, x1)
    want = (x1 - 0.9 * x_t) / (1 - 0.9 * t[:, None])
    np.testing.assert_allclose(u_t, want, rtol=1e-3, atol=1e-4)
