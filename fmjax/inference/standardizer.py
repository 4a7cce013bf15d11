"""Columns brought to mean 0 and standard deviation 1, and densities brought back.

With the moments m_d and s_d of the training rows, z_d = (x_d - m_d) / s_d, and a density of z gives
that of x in x's own units:

    log p(x) = log p(z) + log |det dz/dx| = log p(z) - sum_d log s_d.

The moments are float64, and NumPy arrays are standardised in float64 on the host: of a column like
1e9 + noise float32 would keep no noise. JAX arrays are standardised in their own dtype, float32 at
least, under any transformation; `x` has then been rounded to that dtype before, and `unstandardize`
rounds to it. Where that matters, give `numpy.asarray(z)`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..types import as_floating, at_least_float32, is_concrete, kind


class Standardizer(NamedTuple):
    """The moments of every column.

    Attributes:
      mean: m, float64 `[D]`.
      std: s, float64 `[D]`, positive.
    """

    mean: Any
    std: Any


def fit_standardizer(x: Any) -> Standardizer:
    """The mean and the standard deviation, sqrt(mean (x - m)^2), of every column.

    Computed in float64 on the host, with an error that doesn't grow with the mean.

    Args:
      x: rows to train on, `[num, D]`, of real numbers, two rows or more; best float64, as
        `fmjax.data.load_table` gives them.

    Returns:
      The moments, `[D]`, in the units of x.

    Raises:
      ValueError: for another shape; values that are not finite; a column that is constant, or whose
        mean or deviation float32 can't hold; under a JAX transformation.

    Example:
      >>> x = 1e9 + np.array([[1.0, 20.0], [3.0, 60.0]])
      >>> fit_standardizer(x)._asdict()
      {'mean': array([1.00000000e+09, 1.00000004e+09]), 'std': array([ 1., 20.])}
    """
    if not is_concrete(x):
        raise ValueError(
            "fit_standardizer computes on the host; got a traced array. Call it outside of jax.jit "
            "and close over what it returns."
        )
    x = _host("x", x)
    if x.ndim != 2 or len(x) < 2 or not x.shape[1]:
        raise ValueError(
            f"x must be [num, D] with two rows or more; got {x.shape}. Numbers of one column need "
            "x[:, None]."
        )
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"x must be finite; got {x[row, column]} in row {row}, column {column}, the first of "
            f"{len(bad)}. Remove such rows or fill them in."
        )
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
        centred = x - x[0]  # small where the offset is large
        shift = centred.mean(0)
        centred -= shift
        mean, std = x[0] + shift, np.sqrt(np.mean(np.square(centred), 0))
    limits = np.finfo(np.float32)
    held = (std >= limits.tiny) & (std <= limits.max) & (np.abs(mean) <= limits.max)
    for column in np.flatnonzero(~held):
        what = f"all {len(x)} are {x[0, column]:g}"
        if x[:, column].min() < x[:, column].max():
            what = f"mean {mean[column]:g}, deviation {std[column]:g}"
        raise ValueError(
            f"Every column of x must vary, within float32's range; got {what} in column {column}. "
            "Leave a constant column out, and measure others in another unit."
        )
    return Standardizer(mean, std)


def standardize(standardizer: Standardizer, x: Any) -> Any:
    """z = (x - m) / s.

    Args:
      standardizer: from `fit_standardizer`.
      x: `[..., D]`, in its own units.

    Returns:
      z `[..., D]`, without units: float32 of NumPy's for an array of NumPy's or a list, computed in
      float64; for one of JAX's a JAX array of its dtype.

    Raises:
      ValueError: if the last axis isn't D, or x isn't of real numbers.

    Example:
      >>> standardize(Standardizer(np.array([1e9]), np.array([2.0])), [[1e9 + 3]])
      array([[1.5]], dtype=float32)
    """
    mean, std, x, like = _together("x", standardizer, x)
    z = (x - mean) / std
    return z.astype(np.float32 if like is None else like)


def unstandardize(standardizer: Standardizer, z: Any) -> Any:
    """x = m + s z, in the units that the data had.

    Args:
      standardizer: from `fit_standardizer`.
      z: `[..., D]`.

    Returns:
      x `[..., D]`: float64 of NumPy's for an array of NumPy's or a list; for one of JAX's a JAX
      array of its dtype, to which x is rounded.

    Raises:
      ValueError: if the last axis isn't D, or z isn't of real numbers.

    Example:
      >>> unstandardize(Standardizer(np.array([100.0]), np.array([2.0])), [[1.5]])
      array([[103.]])
    """
    mean, std, z, like = _together("z", standardizer, z)
    x = mean + std * z
    return x if like is None else x.astype(like)


def log_det(standardizer: Standardizer) -> Any:
    """log |det dz/dx| = -sum_d log s_d, in nats: log p(x) = log p(z) + log_det.

    Returns:
      A Python float, which keeps the dtype of what it is added to; a scalar JAX array if the
      moments are JAX's.

    Example:
      >>> log_det(Standardizer(np.zeros(2), np.array([1.0, np.e])))
      -1.0
    """
    if isinstance(standardizer.std, jax.Array):
        return -jnp.sum(jnp.log(at_least_float32(standardizer.std)))
    return -float(np.sum(np.log(np.asarray(standardizer.std, np.float64))))


def _together(what: str, standardizer: Standardizer, x: Any) -> tuple[Any, Any, Any, Any]:
    """The moments shaped like x and x, to compute with, and x's dtype if that is by JAX."""
    if any(isinstance(value, jax.Array) for value in (*standardizer, x)):
        x = as_floating(what, x)
        like, x = x.dtype, at_least_float32(x)
        mean, std = (jnp.asarray(value, x.dtype) for value in standardizer)
    else:
        like, x = None, _host(what, x)
        mean, std = (np.asarray(value, np.float64) for value in standardizer)
    if np.shape(x)[-1:] != np.shape(mean):
        raise ValueError(
            f"{what} must be [..., {np.size(mean)}], one number for each column that was fitted; "
            f"got {np.shape(x)}."
        )
    shape = (1,) * (np.ndim(x) - 1) + np.shape(mean)
    return mean.reshape(shape), std.reshape(shape), x, like


def _host(what: str, x: Any) -> np.ndarray:
    """A host array in float64."""
    try:
        array = np.asarray(x)
        if array.dtype.kind in "iuf" or jnp.issubdtype(array.dtype, jnp.floating):
            return array.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{what} must be an array of real numbers; got {kind(x)}.")
