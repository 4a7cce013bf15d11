"""The likelihood's table, against models whose probabilities of discrete images are known."""

import jax
import numpy as np
import pytest
from made_runs import known
from test_dequantization import diagonal_trace, exact_bits, images_and_flow

import fmjax as fm
from fmjax import data
from fmjax.data import dequantization
from fmjax.evaluation import densities
from fmjax.harness import store
from fmjax.metrics import Estimate

SETTINGS = {"dequantization": "uniform", "solver": "Tsit5", "tolerance": 1e-4, "seed": 0}


def measure(folder, images, velocity, divergence, num_draws, name="exact"):
    how = densities.Likelihood(
        dequantizer=dequantization.uniform_dequantizer(),
        divergence=divergence,
        num_draws=num_draws,
        tolerance=1e-4,
        batch_size=64,
        settings=SETTINGS | {"divergence": name},
    )
    dataset = data.ImageDataset(np.asarray(images), np.zeros(len(images), np.int32), 1)
    batches = store.Store(folder, "log_prob", how.settings)
    model = known(lambda params, condition: velocity)
    return densities.measure(how, model, dataset, batches, 0, conditional=False)


@pytest.mark.slow
def test_the_table_agrees_with_the_truth(tmp_path):
    """200 images of 192 independent pixels: 0.001 bits/dim is three times what the draws leave."""
    images, flow = images_and_flow(200, std_in_levels=12.0)
    result = measure(tmp_path, images, flow.velocity, lambda key: diagonal_trace, 2)
    one, two = result["bounds"]
    truth = exact_bits(images, flow)
    gap = 1 / (24 * 12.0**2) / np.log(2)  # of uniform dequantisation, per pixel
    assert abs(one["bits_per_dim"] - truth.mean() - gap) < 1e-3
    assert abs(two["bits_per_dim"] - truth.mean() - gap / 2) < 1e-3
    assert truth.mean() - 1e-3 < two["bits_per_dim"] < one["bits_per_dim"]
    # What is reported is the error over images, which here is that of the truths themselves.
    error = truth.std(ddof=1) / np.sqrt(200)
    assert one["standard_error"] == pytest.approx(error, rel=0.05)  # 0.006 of noise beside 0.05
    entropy = np.log2(12.0 * np.sqrt(2 * np.pi * np.e))
    assert abs(one["bits_per_dim"] - entropy) < 3 * one["standard_error"]
    assert one["is_a_bound"] and two["is_a_bound"] and two["too_low_by_at_most"] is None
    error = result["solver_error"]
    assert abs(error["difference"]) < 1e-3 and error["num_images"] == 64


@pytest.mark.slow
def test_probes_lower_the_weighted_figure_by_less_than_is_said(tmp_path):
    """A velocity that mixes its pixels; the exact trace beside two probes, from the same draws."""
    mixing = np.random.default_rng(2).standard_normal((192, 192)).astype("f") / 14

    def velocity(t, x):
        return jax.numpy.tanh(x.reshape(len(x), -1) @ mixing).reshape(x.shape)

    images, _ = images_and_flow(24, std_in_levels=12.0)
    num_draws = 16
    probes = measure(
        tmp_path, images, velocity, lambda key: fm.hutchinson_estimates(key, 2), num_draws, "probes"
    )["bounds"]
    exact = measure(tmp_path, images, velocity, lambda key: fm.exact_divergence(64), num_draws)
    one, weighted = probes
    assert one["is_a_bound"] and not weighted["is_a_bound"]
    drop = one["bits_per_dim"] - weighted["bits_per_dim"]
    right = exact["bounds"][0]["bits_per_dim"] - exact["bounds"][1]["bits_per_dim"]
    assert right > 0 and drop - right < weighted["too_low_by_at_most"]
    error = np.hypot(one["standard_error"], exact["bounds"][0]["standard_error"])
    assert abs(one["bits_per_dim"] - exact["bounds"][0]["bits_per_dim"]) < 3 * error


def test_noise_between_draws():
    """Weights = what a draw has + what a probe has + noise: the noise's variance is found."""
    rng = np.random.default_rng(0)
    weights = 5 * rng.standard_normal((40, 1, 50)) + 7 * rng.standard_normal((1, 3, 50))
    weights = weights + 0.5 * rng.standard_normal((40, 3, 50))
    got = densities._noise_between_draws(weights)
    assert got == pytest.approx(0.25 / 3, rel=0.1)  # three probes' mean; 3900 free numbers
    assert densities._noise_between_draws(weights[:, :1]) is None


def test_interval():
    bits = np.array([[1.0, 2.0, 4.0], [1.2, 2.4, 3.8]])
    mean, probes, image = densities.interval(bits)
    per_image = np.array([1.1, 2.2, 3.9])
    assert mean == Estimate(per_image.mean(), per_image.std(ddof=1) / np.sqrt(3))
    variances = np.array([0.02, 0.08, 0.02]) / 2  # of two values d apart: d^2 / 2; of their mean
    assert probes == pytest.approx(np.sqrt(variances.sum()) / 3)
    assert image == pytest.approx(np.sqrt(variances.mean()))
    assert densities.interval(bits[:1])[1:] == (None, None)
