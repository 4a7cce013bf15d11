"""The kind of experiments on bridges: what is measured, the network of two fields, a small run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from made_runs import final_state
from oracles import jit
from PIL import Image

from experiments import bridges as experiment
from fmjax.harness import train
from fmjax.tasks import bridges
from fmjax.tasks.points import MLPConfig


def config(workdir=None, **kwargs):
    small = dict(num_train=2000, eval_examples=200, checkpoint_every=10, log_every=10)
    small |= dict(num_steps=40, first_steps=10, batch_size=16, steps_per_dispatch=10)
    small |= dict(num_devices=1, model=MLPConfig(features=(16,)))
    return experiment.Config(workdir=workdir, **small | kwargs)


def test_the_divergence_of_two_normal_distributions():
    """By hand in one dimension; of points of the very distribution it is its floor."""
    x = np.array([[-1.0], [1.0]]) * 2 + 0.5  # mean 0.5, variance 4
    want = 0.5 * (4 / 9 - 1 + 0.25 / 9 - np.log(4 / 9))
    got = bridges.divergence(x, np.array([0.0]), np.array([[9.0]]))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    rng, num, dim = np.random.default_rng(0), 500, 4
    cov = np.diag([1.0, 2.0, 0.5, 3.0])
    each = [
        bridges.divergence(rng.multivariate_normal(np.ones(dim), cov, num), np.ones(dim), cov)
        for _ in range(200)
    ]
    error = np.std(each) / np.sqrt(len(each))
    assert abs(np.mean(each) - dim * (dim + 3) / (4 * num)) < 4 * error


def test_the_measures_of_a_known_process():
    """Pairs of the Schroedinger bridge's own covariance, on their bridges at 21 times."""
    ends, num = bridges.gaussians(config(eval_examples=40_000), 3), 40_000
    np.testing.assert_allclose(ends.covariance, (np.sqrt(5) - 1) / 2, rtol=1e-12)
    assert ends.x0.shape == ends.x1.shape == (2000, 3) and ends.held_out.shape == (2, num, 3)
    assert abs(ends.x0.mean() + 0.1) < 4 / np.sqrt(6000) > abs(ends.x1.mean() - 0.1)
    rng, c = np.random.default_rng(3), ends.covariance
    a = rng.standard_normal((num, 3))
    b = c * a + np.sqrt(1 - c**2) * rng.standard_normal((num, 3))
    z, t = rng.standard_normal((num, 3)), np.linspace(0, 1, bridges.NUM_TIMES)[:, None, None]
    x = (1 - t) * (a - 0.1) + t * (b + 0.1) + np.sqrt(t * (1 - t)) * z
    figures = bridges.measure(ends, x, arrives=-1)
    error = figures["covariance_standard_error"]
    np.testing.assert_allclose(error, np.sqrt((1 + c**2) / (3 * num)), rtol=0.05)
    assert abs(figures["covariance"] - c) < 4 * error
    assert abs(figures["mean"] - 0.1) < 4 / np.sqrt(3 * num)
    assert abs(figures["variance"] - 1) < 4 * np.sqrt(2 / (3 * num))
    assert abs(figures["kl"] - figures["kl_floor"]) < 3 * figures["kl_floor"]
    other = bridges.measure(ends, (1 - t) * (a - 0.1) + t * (b + 0.1), arrives=-1)
    assert other["kl"] > 50 * other["kl_floor"]  # straight lines have other marginals


@pytest.mark.slow
def test_the_network_gives_the_fields_of_either_direction():
    network = bridges.make_network(config(sigma=0.5))
    params = jit(network.init, static_argnums=1)(jax.random.key(0), 3)
    x, sigma = jax.random.normal(jax.random.key(1), (5, 3)), 0.5
    w, z_hat = network.fields(params, jnp.array(0), jnp.array(0.3), x)
    other, _ = network.fields(params, jnp.array(1), jnp.array(0.3), x)
    assert abs(w - other).max() > 1e-3  # the direction is told
    mixed, _ = network.fields(params, jnp.array([0, 1, 0, 1, 0]), jnp.full(5, 0.3), x)
    np.testing.assert_allclose(mixed, jnp.where(jnp.arange(5)[:, None] % 2, other, w), rtol=1e-5)
    for end in (0.0, 1.0):
        assert (network.fields(params, jnp.array(0), jnp.array(end), x)[1] == 0).all()
    want = w - sigma * np.sqrt(0.3 / 0.7) * z_hat
    np.testing.assert_allclose(
        network.drift(params, False)(jnp.array(0.3), x), want, rtol=1e-4, atol=1e-5
    )
    want = w + sigma * 0.4 / (2 * np.sqrt(0.21)) * z_hat
    np.testing.assert_allclose(network.flow(params)(jnp.array(0.3), x), want, rtol=1e-4, atol=1e-5)


def test_bad_flags_are_refused():
    for flags, match in (
        (dict(sigma=0.0), "--sigma must be positive and finite; got 0.0"),
        (dict(eval_steps=50), "--eval-steps must be a multiple of 100.*got 50"),
        (dict(dim=0), "dim must be 1 or more; got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            experiment.make_task(config(**flags))


@pytest.mark.slow
def test_a_run_in_the_plane_resumes_and_draws(tmp_path):
    flags = dict(pair="moons-8gaussians")
    whole = train(config(tmp_path / "whole", **flags), experiment.make_task)
    train(config(tmp_path / "parts", num_steps=20, **flags), experiment.make_task)
    train(config(tmp_path / "parts", **flags), experiment.make_task)
    for a, b in zip(
        jax.tree.leaves(final_state(tmp_path / "whole")),
        jax.tree.leaves(final_state(tmp_path / "parts")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "whole/summary.json").read_text()) == whole
    assert {"wasserstein2", "cost", "covariance"} <= whole["forwards"].keys()
    picture = np.asarray(Image.open(tmp_path / "whole" / whole["samples"]))
    assert picture.shape == (600, 1152, 3) and picture.std() > 1


@pytest.mark.long
def test_fitting_reaches_the_covariance_of_the_schroedinger_bridge(tmp_path):
    """In one dimension and a minute: 0.618, and 0.546 where the pairs stay independent."""
    flags = dict(dim=1, num_train=50_000, eval_examples=50_000, learning_rate=2e-3)
    flags |= dict(model=MLPConfig(features=(64, 64)), num_steps=1500, batch_size=256)
    flags |= dict(checkpoint_every=500, log_every=500, steps_per_dispatch=50, ema_decay=0.99)
    for first, want in ((400, (np.sqrt(5) - 1) / 2), (1500, np.exp(-np.pi / (3 * np.sqrt(3))))):
        done = train(
            config(tmp_path / str(first), first_steps=first, **flags), experiment.make_task
        )
        for direction in ("forwards", "backwards"):
            # A hundredth for the network and Euler's steps, four standard errors for the points.
            error = 4 * done[direction]["covariance_standard_error"]
            assert abs(done[direction]["covariance"] - want) < 0.01 + error


@pytest.mark.slow
def test_the_flow_of_a_network_is_refused_at_an_end():
    network = bridges.make_network(config())
    params = jit(network.init, static_argnums=1)(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="bridge_flow has no finite value"):
        network.flow(params)(jnp.zeros(()), jnp.zeros((1, 2)))
    x = bridges.solve_flow(network, params, jnp.zeros((4, 2)))
    assert x.shape == (bridges.NUM_FRAMES, 4, 2)
