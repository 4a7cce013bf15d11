"""3x3 convolutions on a CPU with 2.25 times fewer multiplications.

Winograd's minimal filtering F(2x2, 3x3) makes a 2x2 tile of the output from a 4x4 tile of the
input, with 16 multiplications per pair of channels instead of 36:

    y = A' [(G w G') * (B' d B)] A,

d the input's tile, w the filter, * the product of corresponding entries. Over all tiles and
channels, each of the 16 entries is one matrix product [tiles, in] x [in, out], at which CPUs are
good. The transforms B, G, A hold 0, 1, -1 and 1/2 only, so that the result differs from the direct
sum by rounding. A few images are transformed together: their 16 matrices stay in the cache.

A convolution y = conv(x, w) is bilinear. Its derivatives are convolutions of the same kind:

    <dy, conv(x, w)> = <conv_transpose(dy, w), x> = <filter_gradient(x, dy), w>,

and these three are closed under differentiation. They stand here as two primitives, so that
forward and reverse mode of any order run the same way.

Source: Lavin and Gray (2015), arXiv 1509.09308, section 4.1.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# With fewer tiles or channels the transforms cost more than the products save; more tiles at a
# time leave the cache.
_FEWEST_TILES, _FEWEST_CHANNELS, _TILES_AT_A_TIME = 256, 64, 1024
_LAYOUT = ("NHWC", "HWIO", "NHWC")
_PADDING = ((1, 1), (1, 1))


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **kwargs: Any
) -> jax.Array:
    """`lax.conv_general_dilated` for `flax.linen.Conv`, by Winograd's method where it is faster.

    That is on a CPU, for a dense 3x3 filter with stride 1, padding 1 and at least 64 channels, over
    float32 or float64 images of even height and width. Everything else is
    `lax.conv_general_dilated` itself. Several devices share a batch by cutting it, and so does
    this: there images would travel.

    Args:
      lhs: `[batch, height, width, in]`.
      rhs: `[3, 3, in, out]`.
      window_strides: of `lax.conv_general_dilated`.
      padding: the same.
      **kwargs: the same.

    Returns:
      `[batch, height, width, out]`, equal to `lax.conv_general_dilated` up to rounding.

    Source: Lavin and Gray (2015), arXiv 1509.09308.
    """
    if not fits(lhs, rhs, window_strides, padding, **kwargs):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs)
    return conv3x3(lhs, rhs, kwargs.get("precision"))


def fits(lhs: Any, rhs: Any, window_strides: Sequence[int], padding: Any, **kwargs: Any) -> bool:
    """Whether `conv_general_dilated` takes Winograd's method. Of lhs, shape and dtype are read."""
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.get("dimension_numbers"))
    dilations = [*kwargs.get("lhs_dilation", ()), *kwargs.get("rhs_dilation", ())]
    return (
        lhs.ndim == 4
        and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and rhs.shape[:2] == (3, 3)
        and tuple(window_strides) == (1, 1)
        and not isinstance(padding, str)
        and tuple(map(tuple, padding)) == _PADDING
        and all(dilation == 1 for dilation in dilations)
        and rhs.shape[2] == lhs.shape[-1]
        and min(rhs.shape[2:]) >= _FEWEST_CHANNELS
        and lhs.shape[1] % 2 == lhs.shape[2] % 2 == 0
        and lhs.shape[0] * lhs.shape[1] * lhs.shape[2] >= 4 * _FEWEST_TILES
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.float64)
        and kwargs.get("preferred_element_type") is None
        and kwargs.get("batch_group_count", 1) == 1
    )


def conv3x3(x: jax.Array, w: jax.Array, precision: Any = None) -> jax.Array:
    """The same by Winograd's method, whatever the device and the sizes.

    Args:
      x: `[batch, height, width, in]` of even height and width.
      w: `[3, 3, in, out]`.
      precision: of the matrix products, as `jax.lax.dot` takes it.

    Returns:
      `[batch, height, width, out]`.
    """
    # Inside shard_map, what does not vary over an axis must be made to, as lax's own operations do.
    axes = jax.typeof(x).mat.varying | jax.typeof(w).mat.varying
    return _conv_p.bind(_varying(x, axes), _varying(w, axes), transpose=False, precision=precision)


def _varying(a: jax.Array, axes: frozenset) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(a).mat.varying))
    return lax.pcast(a, missing, to="varying") if missing else a


def _direct_conv(x: jax.Array, w: jax.Array, *, transpose: bool, precision: Any) -> jax.Array:
    if transpose:
        w = w[::-1, ::-1].swapaxes(2, 3)
    return lax.conv_general_dilated(
        x, w, (1, 1), _PADDING, dimension_numbers=_LAYOUT, precision=precision
    )


def _direct_filter_gradient(x: jax.Array, dy: jax.Array, *, precision: Any) -> jax.Array:
    w = jax.ShapeDtypeStruct((3, 3, x.shape[-1], dy.shape[-1]), x.dtype)
    conv = functools.partial(_direct_conv, x, transpose=False, precision=precision)
    return jax.linear_transpose(conv, w)(dy)[0]


def _input_transform(d: Sequence[jax.Array]) -> list[jax.Array]:
    """B' d."""
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _filter_transform(w: Sequence[jax.Array]) -> list[jax.Array]:
    """G w."""
    even, odd = 0.5 * (w[0] + w[2]), 0.5 * w[1]
    return [w[0], even + odd, even - odd, w[2]]


def _filter_transform_t(u: Sequence[jax.Array]) -> list[jax.Array]:
    """G' u."""
    even, odd = 0.5 * (u[1] + u[2]), 0.5 * (u[1] - u[2])
    return [u[0] + even, odd, even + u[3]]


def _output_transform(m: Sequence[jax.Array]) -> list[jax.Array]:
    """A' m."""
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _output_transform_t(y: Sequence[jax.Array]) -> list[jax.Array]:
    """A y."""
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _tiles(x: jax.Array) -> list[jax.Array]:
    """B' d B for every tile d of `[_, height, width, _]`: 16 arrays `[_, height/2, width/2, _]`."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), *_PADDING, (0, 0)))
    rows = _input_transform([x[:, i : i + height - 1 : 2] for i in range(4)])
    columns = [[row[:, :, j : j + width - 1 : 2] for j in range(4)] for row in rows]
    return [tile for row in columns for tile in _input_transform(row)]


def _in_parts(f: Callable[..., Any], *images: jax.Array) -> Any:
    """f of a few images together: what it gives, array by array, stacked."""
    batch, height, width, _ = images[0].shape
    most = max(1, 4 * _TILES_AT_A_TIME // (height * width))
    size = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)
    parts = [a.reshape(batch // size, size, *a.shape[1:]) for a in images]
    return lax.map(lambda part: f(*part), parts)


def _winograd_conv(x: jax.Array, w: jax.Array, *, transpose: bool, precision: Any) -> jax.Array:
    _, height, width, _ = x.shape
    rows = _filter_transform([w[i] for i in range(3)])
    filters = [_filter_transform([row[j] for j in range(3)]) for row in rows]
    if transpose:  # turning a filter by 180 degrees swaps rows and columns 0 and 3 of G w G'
        filters = [[filters[i][j] for j in (3, 1, 2, 0)] for i in (3, 1, 2, 0)]
    filters = [u for row in filters for u in row]
    numbers = (((3,), (1 if transpose else 0,)), ((), ()))

    def conv(x: jax.Array) -> list[list[jax.Array]]:
        tiles = zip(_tiles(x), filters, strict=True)
        m = [lax.dot_general(v, u, numbers, precision) for v, u in tiles]
        columns = [_output_transform(m[4 * i : 4 * i + 4]) for i in range(4)]
        y = [_output_transform([column[b] for column in columns]) for b in range(2)]
        return [[y[b][a] for b in range(2)] for a in range(2)]

    # The four are interleaved after the loop, whose own writing is done by one thread.
    y = jnp.stack([jnp.stack(row, axis=4) for row in _in_parts(conv, x)], axis=3)
    return y.reshape(*x.shape[:3], y.shape[-1])


def _winograd_filter_gradient(x: jax.Array, dy: jax.Array, *, precision: Any) -> jax.Array:
    numbers = (((1, 2, 3), (0, 1, 2)), ((), ()))

    def filter_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
        # Channels first, once: else XLA would turn each of the 16 matrices.
        tiles, dy = _tiles(x.transpose(3, 1, 2, 0)), dy.transpose(1, 2, 0, 3)
        rows = _output_transform_t([dy[0::2], dy[1::2]])
        m = [m for r in rows for m in _output_transform_t([r[:, 0::2], r[:, 1::2]])]
        u = [lax.dot_general(v, m, numbers, precision) for v, m in zip(tiles, m, strict=True)]
        columns = [_filter_transform_t(u[4 * i : 4 * i + 4]) for i in range(4)]
        w = [_filter_transform_t([column[b] for column in columns]) for b in range(3)]
        return jnp.stack([jnp.stack([w[b][a] for b in range(3)]) for a in range(3)])

    return jnp.sum(_in_parts(filter_gradient, x, dy), axis=0)


_conv_p, _filter_gradient_p = Primitive("conv3x3"), Primitive("conv3x3_filter_gradient")


def _conv_shape(x, w, *, transpose, precision):
    return x.update(shape=(*x.shape[:3], w.shape[2 if transpose else 3]), weak_type=False)


def _filter_gradient_shape(x, dy, *, precision):
    return x.update(shape=(3, 3, x.shape[-1], dy.shape[-1]), weak_type=False)


def _conv_to_x(ct, x, w, *, transpose, precision):
    return _conv_p.bind(ct, w, transpose=not transpose, precision=precision)


def _conv_to_w(ct, x, w, *, transpose, precision):
    x, dy = (ct, x) if transpose else (x, ct)
    return _filter_gradient_p.bind(x, dy, precision=precision)


def _filter_gradient_to_x(ct, x, dy, *, precision):
    return _conv_p.bind(dy, ct, transpose=True, precision=precision)


def _filter_gradient_to_dy(ct, x, dy, *, precision):
    return _conv_p.bind(x, ct, transpose=False, precision=precision)


def _batch_conv(args, dims, **params):
    (x, w), (x_dim, w_dim) = args, dims
    if w_dim is not None:  # a filter for every example: one grouped convolution
        return jax.vmap(functools.partial(_direct_conv, **params), dims)(x, w), 0
    x = jnp.moveaxis(x, x_dim, 0)
    y = _conv_p.bind(x.reshape(-1, *x.shape[2:]), w, **params)
    return y.reshape(*x.shape[:2], *y.shape[1:]), 0


def _batch_filter_gradient(args, dims, **params):
    return jax.vmap(functools.partial(_direct_filter_gradient, **params), dims)(*args), 0


def _define(primitive, shape, winograd, transposes, batch):
    static = inspect.getfullargspec(winograd).kwonlyargs
    primitive.def_impl(jax.jit(winograd, static_argnames=static))
    primitive.def_abstract_eval(shape)
    ad.defbilinear(primitive, *transposes)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(winograd, multiple_results=False))


_define(_conv_p, _conv_shape, _winograd_conv, (_conv_to_x, _conv_to_w), _batch_conv)
_define(
    _filter_gradient_p,
    _filter_gradient_shape,
    _winograd_filter_gradient,
    (_filter_gradient_to_x, _filter_gradient_to_dy),
    _batch_filter_gradient,
)
