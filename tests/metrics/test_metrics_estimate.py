"""The jackknife, what the metrics ask of samples, and the examples of their docstrings."""

import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fmjax import metrics


def test_the_jackknife_of_a_mean_is_the_textbook_error():
    x = np.random.default_rng(0).exponential(size=(40, 1))
    estimate = metrics.jackknife(np.mean, x, num_splits=40)
    np.testing.assert_allclose(estimate, (x.mean(), x.std(ddof=1) / np.sqrt(40)), rtol=1e-12)
    # Groups of 4 give the error of the mean of 10 group means.
    estimate = metrics.jackknife(np.mean, x, num_splits=10)
    error = x.reshape(10, 4).mean(axis=1).std(ddof=1) / np.sqrt(10)
    np.testing.assert_allclose(estimate.standard_error, error, rtol=1e-12)


def test_groups_cover_all_samples_in_order():
    """Groups of 2, 2, 3 and 3: what is left out, seen through sums of powers of two."""
    seen = []
    metrics.jackknife(lambda x: seen.append(x.sum()) or 0.0, 2.0 ** np.arange(10), num_splits=4)
    left_out = [2.0**10 - 1 - total for total in seen[:4]]
    assert left_out == [0b11, 0b11100, 0b1100000, 0b1110000000] and seen[4:] == [2.0**10 - 1]


def test_bad_features_and_splits_are_refused():
    with pytest.raises(ValueError, match="at least 2 rows"):
        metrics.moments(np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        metrics.moments(np.zeros((4, 2, 2)))
    with pytest.raises(ValueError, match="real numbers; got dtype complex"):
        metrics.moments(np.zeros((4, 2), complex))
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="1 of 4 rows hold a NaN"):
            metrics.moments(np.where(np.arange(8).reshape(4, 2) == 5, bad, 0.0))
    with pytest.raises(ValueError, match="got num_splits=1"):
        metrics.jackknife(np.mean, np.zeros((4, 1)), num_splits=1)
    with pytest.raises(ValueError, match="got 4 samples for num_splits=5"):
        metrics.jackknife(np.mean, np.zeros((4, 1)), num_splits=5)
    with pytest.raises(ValueError, match="at least 2 of the samples; got 9 samples"):
        metrics.frechet_estimate(
            np.zeros((9, 1)), metrics.Moments(9, np.zeros(1), np.eye(1)), num_splits=5
        )


@pytest.mark.parametrize(
    ("statistic", "got"),
    [
        (lambda x: x.mean(axis=0), r"float64\[1\]"),
        (lambda x: np.nan, "nan"),
        (lambda x: 1j, "complex"),
        (lambda x: None, "object"),
    ],
)
def test_a_statistic_is_one_finite_real_number(statistic, got):
    with pytest.raises(ValueError, match=f"statistic must return one finite real.*{got}"):
        metrics.jackknife(statistic, np.zeros((4, 1)), num_splits=2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0, -1, 2.5])
def test_counts_are_whole_numbers(bad):
    with pytest.raises(ValueError, match="degree must be a positive integer"):
        metrics.polynomial_kernel(bad)
    with pytest.raises(ValueError, match="two or more groups"):
        metrics.jackknife(np.mean, np.zeros((4, 1)), num_splits=bad)


@pytest.mark.parametrize("name", ["estimate", "frechet", "kernel", "scores", "transport"])
def test_docstring_examples_run(name):
    done = doctest.testmod(importlib.import_module(f"fmjax.metrics.{name}"))
    assert done.attempted > 0 and done.failed == 0


@pytest.mark.slow
def test_metrics_load_neither_flax_nor_with_fmjax():
    code = "import sys, fmjax; print('fmjax.metrics' in sys.modules); import fmjax.metrics; "
    code += "print([m for m in ('flax', 'orbax', 'torch', 'tensorflow') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"], done.stderr
