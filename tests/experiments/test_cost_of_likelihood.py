"""The densities that the cost of likelihood is measured against, its losses, and one short run."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmjax as fm
from experiments import cost_of_likelihood as cost
from experiments import toy_densities


@pytest.mark.slow
@pytest.mark.parametrize("name", ["moons", "8 Gaussians"])
def test_densities_sum_to_one_and_are_their_samples(name):
    data = toy_densities.data_sets()[name]
    side = np.linspace(-4, 4, 400)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    p = np.exp(np.concatenate([data.log_prob(part) for part in np.split(grid, 100)]))
    cell = (side[1] - side[0]) ** 2
    np.testing.assert_allclose(p.sum() * cell, 1.0, atol=1e-4)
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum() * cell
    log_p = data.log_prob(data.sample(np.random.default_rng(0), 4000))
    error = log_p.std() / math.sqrt(len(log_p))
    assert abs(entropy + log_p.mean()) < 4 * error


def test_the_density_of_one_gaussian():
    x = np.random.default_rng(0).standard_normal((5, 10))
    found = toy_densities.mixture(np.zeros((3, 10)), 2.0).log_prob(x)
    want = -np.square(x / 2).sum(1) / 2 - 10 * math.log(2) - 5 * math.log(2 * math.pi)
    np.testing.assert_allclose(found, want)


@pytest.mark.slow
def test_the_energy_of_a_linear_flow(monkeypatch):
    """v = a x carries x1 e^(-a) to x1, with int |v|^2 dt = a (1 - e^(-2 a)) |x1|^2 / 2."""
    a, x1 = 0.7, jax.random.normal(jax.random.key(0), (6, 3))

    class Linear:
        apply = staticmethod(lambda a, t, x: a * x)

    monkeypatch.setattr(cost, "MODEL", Linear)
    monkeypatch.setattr(cost, "TOLERANCE", 1e-6)
    got = [cost.likelihood(k)(jnp.float32(a), jax.random.key(0), x1) for k in (0.0, 2.0)]
    x0 = np.asarray(x1) * math.exp(-a)
    log_p = np.asarray(fm.standard_normal_log_prob(jnp.asarray(x0))) - 3 * a
    energy = a * (1 - math.exp(-2 * a)) * np.square(x1).sum(1) / 2
    np.testing.assert_allclose(got[0], -log_p.mean(), rtol=1e-5)
    np.testing.assert_allclose(got[1] - got[0], 2 * energy.mean(), rtol=1e-4)


@pytest.mark.slow
def test_a_short_run_prints_its_table_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "METHODS", ("FM", "FM, ML"))
    config = cost.Config(workdir=tmp_path, seconds=0.3, batch_size=32, num_test=64)
    first = cost.main(config)
    assert (tmp_path / "cost_of_likelihood.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "cost_of_likelihood.json").read_text())
    assert record["cells"] == json.loads(json.dumps(first))
    table = capsys.readouterr().out
    assert table.count("| FM |") == table.count("| FM, ML |") == 3
    monkeypatch.setattr(cost, "train", None)  # nothing is trained again
    assert cost.main(config) == first
    seconds, calls = np.asarray(first["moons"]["FM"]["looks"])[:, :2].T
    assert (np.diff(seconds) > 0).all() and calls[-1] == first["moons"]["FM"]["steps"]
