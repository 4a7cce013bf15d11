"""Standardised columns: moments, precision at large offsets, and the density in original units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fmjax.inference import Standardizer, fit_standardizer, log_det, standardize, unstandardize

RNG = np.random.default_rng(0)
MEAN, STD = np.array([3.0, -20.0, 0.5]), np.array([0.5, 40.0, 1e-3])
X = MEAN + STD * RNG.normal(size=(500, 3))


def test_moments_are_those_of_the_rows():
    s = fit_standardizer(X)
    assert s.mean.dtype == s.std.dtype == np.float64
    np.testing.assert_allclose(s.mean, X.mean(0), rtol=1e-12)
    np.testing.assert_allclose(s.std, X.std(0), rtol=1e-12)
    z = standardize(s, X)
    assert z.dtype == np.float32 and type(z) is np.ndarray
    np.testing.assert_allclose(z.mean(0, np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(z.std(0, dtype=np.float64), 1, rtol=1e-6)
    np.testing.assert_allclose(unstandardize(s, z), X, rtol=0, atol=1e-6 * np.abs(z).max() * 40)


def test_an_offset_of_1e9_keeps_its_noise():
    noise = RNG.normal(size=(1000, 1))
    x = 1e9 + noise
    s = fit_standardizer(x)
    exact = (noise - noise.mean()) / noise.std()
    z = standardize(s, x)
    # 1e9 + noise is a multiple of 1.2e-7 in float64, and z one of 1.2e-7 to 4.8e-7 in float32.
    np.testing.assert_allclose(z, exact, rtol=0, atol=1e-6)
    np.testing.assert_allclose(unstandardize(s, z) - 1e9, noise, rtol=0, atol=1e-6)
    # Of many rows too: a sum of the values themselves would be off by more than a deviation's 1e-5.
    many = 1e9 + 1e-3 * np.tile([[-1.0], [1.0]], (200_000, 1))
    s = fit_standardizer(many)
    np.testing.assert_allclose(s.mean, 1e9, rtol=0, atol=1e-7 + 1e-9)
    np.testing.assert_allclose(s.std, 1e-3, rtol=2e-4)  # the values are multiples of 1.2e-7


def test_the_log_density_is_that_in_original_units():
    """A Gaussian: N(z; 0, I) and the correction give N(x; m, diag s^2)."""
    s = Standardizer(MEAN, STD)
    z = standardize(s, X)
    log_p = scipy.stats.norm.logpdf(z.astype(np.float64)).sum(1) + log_det(s)
    expected = scipy.stats.norm.logpdf(X, MEAN, STD).sum(1)
    np.testing.assert_allclose(log_p, expected, rtol=0, atol=1e-5)
    jacobian = jax.jacobian(lambda x: standardize(s, x))(jnp.asarray(MEAN, jnp.float32))
    assert log_det(s) == pytest.approx(float(jnp.linalg.slogdet(jacobian)[1]), abs=1e-5)
    assert type(log_det(s)) is float
    assert (jnp.ones(2, jnp.bfloat16) + log_det(s)).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jax_arrays_keep_their_dtype_and_transformations_change_nothing(dtype):
    s = fit_standardizer(X)
    x = jnp.asarray(X, dtype)
    z = standardize(s, x)
    assert isinstance(z, jax.Array) and z.dtype == dtype and unstandardize(s, z).dtype == dtype
    exact = (np.asarray(x, np.float64) - s.mean) / s.std
    # The means are rounded to float32, the difference and the quotient too, and z to its dtype.
    rounding = 2.0**-24 * np.abs(s.mean) / s.std + 2.0**-22 * np.abs(exact)
    tolerance = rounding + float(jnp.finfo(dtype).eps) * np.abs(exact)
    assert (np.abs(np.asarray(z, np.float64) - exact) <= tolerance).all()
    near = {"rtol": 2 * float(jnp.finfo(dtype).eps), "atol": 1e-5}
    np.testing.assert_allclose(jax.jit(standardize)(s, x), z, **near)  # moments as arguments
    by_row = jax.vmap(lambda x: standardize(s, x))(x)
    np.testing.assert_array_equal(by_row, z)
    back = jax.jit(lambda z: unstandardize(s, z))(z)
    np.testing.assert_allclose(back, unstandardize(s, z), **near)
    slope = jax.grad(lambda x: standardize(s, x).sum())(jnp.zeros(3, jnp.float32))
    np.testing.assert_allclose(slope, 1 / s.std, rtol=1e-6)
    traced = jax.jit(log_det)(s)
    assert traced.dtype == jnp.float32 and float(traced) == pytest.approx(log_det(s), abs=1e-5)


def test_leading_axes_and_lists():
    s = Standardizer(np.array([1.0, 2.0]), np.array([2.0, 4.0]))
    np.testing.assert_array_equal(standardize(s, [3, 10]), [1, 2])
    np.testing.assert_array_equal(standardize(s, np.full((2, 5, 2), 6.0))[1, 3], [2.5, 1])
    np.testing.assert_array_equal(unstandardize(s, jnp.ones((2, 5, 2)))[1, 3], [3, 6])


def with_cell(value):
    x = X[:5].copy()
    x[3, 1] = value
    return x


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[:, 0], r"must be \[num, D\] .*got \(500,\).*x\[:, None\]"),
        (X[:1], "two rows or more"),
        (X[:, :0], r"got \(500, 0\)"),
        (with_cell(np.nan), "finite; got nan in row 3, column 1, the first of 1"),
        (with_cell(np.inf), "finite; got inf in row 3, column 1"),
        (np.c_[X, np.full(500, 0.1)], "must vary.* got all 500 are 0.1 in column 3"),
        (X * [1, 1e-41, 1], "got mean .* in column 1. .*another unit"),
        (X * [1, 1, 1e300], "in column 2"),
        (X + 1j, "real numbers; got complex128"),
        (X > 0, "real numbers; got bool"),
        ([["a"], ["b"]], "real numbers; got list"),
    ],
)
def test_rows_without_moments(x, message):
    with pytest.raises(ValueError, match=message):
        fit_standardizer(x)


def test_arrays_of_another_width_and_traced_rows():
    s = fit_standardizer(X)
    for x in (X[:, :1], jnp.zeros((4, 2)), np.zeros(())):
        for function in (standardize, unstandardize):
            with pytest.raises(ValueError, match=r"must be \[..., 3\].*; got \("):
                function(s, x)
    with pytest.raises(ValueError, match="must be floating; got int32"):
        standardize(s, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="on the host; got a traced array"):
        jax.jit(fit_standardizer)(jnp.asarray(X, jnp.float32))
