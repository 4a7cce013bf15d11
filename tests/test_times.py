"""The densities of training times, by Kolmogorov-Smirnov against their distribution functions.

The keys are fixed, so no test is flaky; 20,000 draws tell a shift of the distribution function by
0.014 (p = 0.001).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy import stats
from scipy.special import logit

import fmjax as fm

NUM, P_VALUE = 20_000, 1e-3


def logit_normal_cdf(mean, std):
    return lambda t: stats.norm.cdf((logit(t) - mean) / std)


def edm_cdf(mean, std):
    """Of t = 1 / (1 + s) with log s ~ N(mean, std^2): t small where s is large."""
    return lambda t: stats.norm.sf((np.log(1 / t - 1) - mean) / std)


TIMES = {
    "uniform": (fm.uniform, stats.uniform.cdf),
    "logit_normal": (fm.logit_normal(), logit_normal_cdf(0.0, 1.0)),
    "logit_normal_shifted": (fm.logit_normal(0.8, 0.5), logit_normal_cdf(0.8, 0.5)),
    "edm_skewed": (fm.edm_skewed(), edm_cdf(-1.2, 1.2)),
    "edm_skewed_other": (fm.edm_skewed(0.5, 0.7), edm_cdf(0.5, 0.7)),
    # P(t <= c) where t = u / (u + 3 (1 - u)) and u is uniform.
    "shifted": (fm.shifted(fm.uniform, 3.0), lambda t: 3 * t / (1 + 2 * t)),
    "shifted_twice": (
        fm.shifted(fm.shifted(fm.uniform, 3.0), 0.2),
        lambda t: 0.6 * t / (1 - 0.4 * t),
    ),
}
all_times = pytest.mark.parametrize("name", TIMES)


@all_times
def test_density(name):
    times, cdf = TIMES[name]
    t = np.asarray(times(jax.random.key(0), (NUM,)), np.float64)
    assert t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t, cdf).pvalue > P_VALUE
    # The test has the power to tell the densities apart.
    for other, (_, wrong) in TIMES.items():
        if other != name:
            assert stats.kstest(t, wrong).pvalue < P_VALUE


@all_times
def test_shape_dtype_and_key(name):
    times, key = TIMES[name][0], jax.random.key(3)
    for shape in ((), (4,), (2, 3)):
        t = times(key, shape)
        assert (t.shape, t.dtype) == (shape, jnp.float32)
    np.testing.assert_array_equal(times(key, (4,)), times(key, (4,)))
    np.testing.assert_allclose(jax.jit(lambda k: times(k, (4,)))(key), times(key, (4,)), rtol=1e-6)
    assert not np.isin(times(jax.random.key(4), (4,)), times(key, (4,))).any()
    with jax.enable_x64(True):
        assert times(key, (4,)).dtype == jnp.float32


def test_edm_skewed_leans_towards_the_data():
    t = fm.edm_skewed()(jax.random.key(0), (NUM,))
    # The median of t is that of s: 1 / (1 + exp(-1.2)). Its standard error is 0.0019 here.
    np.testing.assert_allclose(np.median(t), 1 / (1 + np.exp(-1.2)), atol=0.008)


def test_edm_skewed_is_clipped_at_t_min():
    t = np.asarray(fm.edm_skewed(2.0, 3.0, t_min=0.25)(jax.random.key(0), (NUM,)))
    assert t.min() == 0.25 and t.max() <= 1
    at_the_clip = stats.norm.sf((np.log(3) - 2.0) / 3.0)  # t < 1/4 where s > 3
    standard_error = np.sqrt(at_the_clip * (1 - at_the_clip) / NUM)  # 0.0034
    np.testing.assert_allclose((t == 0.25).mean(), at_the_clip, atol=4 * standard_error)


def test_errors():
    for make in (lambda: fm.logit_normal(std=0.0), lambda: fm.edm_skewed(std=-1.0)):
        with pytest.raises(ValueError, match="std must be positive"):
            make()
    for how in ({"std": np.nan}, {"std": np.inf}, {"mean": np.nan}, {"mean": "a"}, {"mean": None}):
        for make in (fm.logit_normal, fm.edm_skewed):
            with pytest.raises(ValueError, match="must be a finite number"):
                make(**how)
    for shift in (0.0, -1.0, np.nan, np.inf, None):
        with pytest.raises(ValueError, match="shift must be"):
            fm.shifted(fm.uniform, shift)
    with pytest.raises(ValueError, match=r"times must be a sampler.*got 3.0"):
        fm.shifted(3.0, fm.uniform)
    for t_min in (-0.1, 1.0, np.nan):
        with pytest.raises(ValueError, match="t_min must be in"):
            fm.edm_skewed(t_min=t_min)
