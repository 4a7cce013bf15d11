"""The types that the rooms share, and the checks of a caller's arrays and functions.

Time runs from the source at t = 0 to the data at t = 1. A batch is always there: `x` is
`[batch, *event]`, and `t` is `[]` (one time for all, as a solver gives it) or `[batch]` (as
training gives it), so that `t.shape` is a prefix of `x.shape`.

Arrays that a caller gives may be lists or NumPy's; they become JAX arrays of a floating dtype. What
a caller's function returns must have the very shape that is asked for: nothing is broadcast, since
a wrong shape that broadcasts is a wrong number that looks right.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class PathSample(NamedTuple):
    """A point on a conditional path and its velocity: all that a flow-matching loss needs.

    Attributes:
      t: times in [0, 1], `[]` or `[batch]`.
      x_t: points, `[batch, *event]`.
      u_t: conditional velocities d/dt x_t, `[batch, *event]`.
    """

    t: jax.Array
    x_t: jax.Array
    u_t: jax.Array


class Velocity(Protocol):
    """`velocity(t, x) -> u`: any callable. Parameters and conditions are closed over.

    `t` is `[]` or `[batch]`; `x` and the returned `u` are arrays `[batch, *event]`.
    """

    # Any, not jax.Array: Flax declares what `model.apply` returns that loosely.
    def __call__(self, t: jax.Array, x: jax.Array, /) -> Any: ...


class Coupling(Protocol):
    """`coupling(key, x0, x1) -> x0`: the source re-paired with the data. Only `x0` moves."""

    def __call__(self, key: jax.Array, x0: jax.Array, x1: jax.Array, /) -> jax.Array: ...


class Pairs(NamedTuple):
    """Who is paired with whom: x0[rows0[k]] with x1[rows1[k]].

    Attributes:
      rows0: rows of the source, `[num]`, int32; any may come several times or not at all.
      rows1: rows of the data, `[num]`, int32, likewise.
    """

    rows0: jax.Array
    rows1: jax.Array


class Pairing(Protocol):
    """`pairing(key, x0, x1) -> Pairs`: pairs that are no permutation of `x0`.

    `x0` is `[n, *event]` and `x1` `[m, *event]`; labels of `x1` are taken at `rows1` too.
    """

    def __call__(self, key: jax.Array, x0: jax.Array, x1: jax.Array, /) -> Pairs: ...


class TimeSampler(Protocol):
    """`times(key, shape) -> t`: training times in [0, 1]."""

    def __call__(self, key: jax.Array, shape: tuple[int, ...], /) -> jax.Array: ...


class Divergence(Protocol):
    """`divergence(velocity, t, x) -> (u, div)`: the velocity and its divergence in one call.

    `u` is `[batch, *event]`; `div` is `[batch]`, exact or an unbiased estimate, or
    `[num_estimates, batch]`, a leading axis of estimates.
    """

    def __call__(
        self, velocity: Velocity, t: jax.Array, x: jax.Array, /
    ) -> tuple[jax.Array, jax.Array]: ...


class SourceLogProb(Protocol):
    """`source_log_prob(x0) -> [batch]`: log-density of the source, in nats per example."""

    def __call__(self, x0: jax.Array, /) -> jax.Array: ...


def broadcast_time(t: jax.Array, x: jax.Array, name: str = "t") -> jax.Array:
    """Shapes a time, or a function of time, so that it multiplies `x` example by example.

    Args:
      t: `[]` or `[batch]`.
      x: `[batch, *event]`.
      name: names `t` in the error.

    Returns:
      `t` with ones appended to its shape, of rank `x.ndim`.

    Raises:
      ValueError: if `t.shape` is no prefix of `x.shape`.

    Example:
      >>> broadcast_time(jnp.zeros(4), jnp.zeros((4, 8, 8, 3))).shape
      (4, 1, 1, 1)
    """
    t, shape = jnp.asarray(t), np.shape(x)
    if t.ndim > 1 or t.shape != shape[: t.ndim]:
        raise ValueError(
            f"{name} must have the shape [] or [batch], a prefix of the shape of x; "
            f"got {name} {t.shape} and x {shape}. A column of times needs {name}[:, 0]."
        )
    return t.reshape(t.shape + (1,) * (len(shape) - t.ndim))


def check_same_shape(what: str, a: jax.Array, b: jax.Array) -> None:
    """Refuses two arrays whose shapes differ; `what` names them in the error."""
    if np.shape(a) != np.shape(b):
        raise ValueError(
            f"{what} must have one shape, [batch, *event]; got {np.shape(a)} and {np.shape(b)}. "
            "Nothing is broadcast here: repeat the smaller one."
        )


def as_array(what: str, x: Any) -> jax.Array:
    """`x` as a JAX array; a list or an array of NumPy's will do, `what` names it in the error."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        hint = " Are the arguments in order?" if callable(x) else ""
        raise ValueError(f"{what} must be an array of numbers; got {kind(x)}.{hint}") from None


def as_floating(what: str, x: Any) -> jax.Array:
    """`as_array` that refuses all but floats, such as pixels that nobody has scaled."""
    x = as_array(what, x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{what} must be floating; got {x.dtype}. Pixels need fmjax.data.pixels.dequantize, "
            "other integers .astype(float), complex numbers their real and imaginary parts as two."
        )
    return x


def as_batch(what: str, x: Any) -> jax.Array:
    """`as_floating` that refuses a single number, which has no batch axis."""
    x = as_floating(what, x)
    if x.ndim == 0:
        raise ValueError(f"{what} must be [batch, *event]; got a single number. It needs x[None].")
    return x


def refuse_explicit_mesh(what: str, x: jax.Array) -> None:
    """Refuses an array on a mesh with Explicit axes, under which Diffrax's solves can't run."""
    if getattr(jax.typeof(x).sharding.mesh, "explicit_axes", ()):
        raise ValueError(
            f"{what} must be on a mesh with Auto axes; got {jax.typeof(x)}, whose mesh has "
            "Explicit axes, the default of jax.make_mesh. Make the mesh with "
            "fmjax.training.sharding.make_mesh(), or with "
            "axis_types=(jax.sharding.AxisType.Auto,) * num_axes."
        )


def wider(a: jnp.dtype, b: jnp.dtype) -> jnp.dtype:
    """The floating-point dtype with more bits; unlike a promotion, also under strict promotion."""
    return max(jnp.dtype(a), jnp.dtype(b), key=lambda dtype: jnp.finfo(dtype).bits)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own dtype where that is wider."""
    return x.astype(wider(x.dtype, jnp.float32))


def is_concrete(*values: Any) -> bool:
    """Whether the values of all of these are known now, and not only when the program runs."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def kind(value: Any) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return f"{value.dtype} {np.shape(value)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if callable(value):
        return f"the function {getattr(value, '__name__', type(value).__name__)}"
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    return f"{type(value).__name__} {value!r:.40}"


def known_number(value: Any) -> float | None:
    """A real number whose value is known, Python's or of an array `[]`; None for all else."""
    if isinstance(value, int | float):
        return None if isinstance(value, bool) else float(value)
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    real = array and not value.shape and jnp.issubdtype(value.dtype, jnp.number)
    if not real or not is_concrete(value) or jnp.iscomplexobj(value):
        return None
    return float(value)


def check_number(name: str, value: Any, usual: str, *, positive: bool = False) -> None:
    """Refuses what is no finite number, or, as far as it is known, is negative (or zero)."""
    traced = isinstance(value, Tracer) and not value.shape
    if traced and jnp.issubdtype(value.dtype, jnp.floating):
        return
    number = known_number(value)
    if number is None or not 0 <= number < math.inf or (positive and not number):
        rule = "positive" if positive else "not negative"
        raise ValueError(f"{name} must be a finite number, {rule}; got {kind(value)}. {usual}.")


def returned(what: str, value: Any, shape: tuple[int, ...], fix: str = "") -> jax.Array:
    """What a caller's function returned: a floating array of the shape asked for, or an error.

    Args:
      what: names the function in the error.
      value: what it returned.
      shape: what it must have.
      fix: what usually makes another shape right.

    Returns:
      The value as a JAX array, in its own dtype.

    Raises:
      ValueError: for None, a tuple, a list, an integer or complex dtype, or another shape.

    Example:
      >>> returned("the loss", jnp.float32(2.0), ())
      Array(2., dtype=float32)
    """
    array = isinstance(value, jax.Array | np.ndarray | np.generic | float)
    if array and np.shape(value) == shape and jnp.issubdtype(_dtype(value), jnp.floating):
        return jnp.asarray(value)
    if array and np.shape(value) == shape:
        fix = "Take its real part." if np.iscomplexobj(value) else "It needs .astype(float)."
    elif value is None:
        fix = "Is a return missing?"
    elif isinstance(value, tuple):
        fix = "Of (u, aux) return the first alone, as [0] takes it."
    elif not array:
        fix = "jnp.asarray makes an array of numbers."
    raise ValueError(
        f"{what} must return a floating array of the shape {shape}; got {kind(value)}. {fix}"
        " Nothing is broadcast."
    )


def _dtype(value: Any) -> Any:
    return getattr(value, "dtype", jnp.float32)


def checked(
    velocity: Velocity, dtype: Any = None, *, what: str = "the velocity"
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A caller's velocity, refused where it is none or returns another shape than that of x.

    Args:
      velocity: `(t, x) -> u`.
      dtype: u is cast to it; None for its own.
      what: names the velocity in the error.

    Returns:
      The velocity `(t, x) -> u`, for `x` `[batch, *event]`.

    Raises:
      ValueError: here, if `velocity` can't be called or is a Flax model without its parameters; by
        the velocity, as `returned` does, and if it maps over a time that is one for all.
    """
    check_velocity(what, velocity)

    def call(t: jax.Array, x: jax.Array) -> jax.Array:
        try:
            u = velocity(t, x)
        except ValueError as error:
            if np.ndim(t) == 0 and str(error).startswith("vmap was requested to map"):
                raise ValueError(
                    f"In a solve t has the shape [], one time for all examples; {what} maps over "
                    "it. Write jax.vmap(model, in_axes=(None, 0))."
                ) from error
            raise
        u = returned(what, u, np.shape(x), "It must be that of x, [batch, *event].")
        return u if dtype is None else u.astype(dtype)

    return call


def per_example(model: Callable[[jax.Array, jax.Array], Any]) -> Velocity:
    """A velocity from a model written for one example, such as one of Equinox.

    Args:
      model: `(t, x) -> u` for t `[]` and x `[*event]`, without a batch.

    Returns:
      A velocity `(t, x) -> u` for x `[batch, *event]`, and t `[]`, a solver's time that is one for
      all, or `[batch]`.

    Raises:
      ValueError: if `model` can't be called; by the velocity, if it returns another shape than that
        of one example, and as `broadcast_time` does.

    Example:
      >>> per_example(lambda t, x: t * x)(jnp.array(2.0), jnp.ones((3, 1))).shape
      (3, 1)
    """
    check_velocity("model", model)

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        broadcast_time(t, x)  # refuses another shape

        def one(t: jax.Array, x: jax.Array) -> jax.Array:
            return returned("model", model(t, x), np.shape(x), "It must be that of one example.")

        return jax.vmap(one, in_axes=(0 if np.ndim(t) else None, 0))(t, x)

    return velocity


def check_velocity(
    what: str,
    velocity: Any,
    form: str = "(t, x) -> u",
    fix: str = "functools.partial(model.apply, params)",
) -> None:
    """Refuses what can't be called, and a Flax model without its parameters, which `fix` gives."""
    if not callable(velocity):
        raise ValueError(f"{what} must be a function {form}; got {kind(velocity)}.")
    function: Any = velocity
    while not hasattr(function, "__self__") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__  # jax.jit's, say
    if isinstance(function, functools.partial) and not function.args:
        function = function if "variables" in function.keywords else function.func
    model: Any = getattr(function, "__self__", function)
    is_flax = any(c.__module__.startswith("flax.linen") for c in type(model).__mro__)
    unbound = is_flax and getattr(model, "scope", None) is None
    if is_flax and (unbound or getattr(function, "__name__", "") == "apply"):
        raise ValueError(
            f"{what} needs its parameters; got a Flax {type(model).__name__} without them. Write "
            f"{fix}."
        )
