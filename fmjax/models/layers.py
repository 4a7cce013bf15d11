"""What the networks are made of: the embedding of time, the labels, the U-Net's blocks.

Images are `[batch, height, width, channel]`. The embeddings that reach a block are `[batch,
features]`, or `[1, features]` where one time or one class holds for the whole batch, so that a
solver's scalar time is embedded once. No layer mixes the members of a batch.
"""

import functools
from typing import TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from fmjax.models.kernels import KERNELS, Kernels
from fmjax.types import broadcast_time


class Dtypes(TypedDict):
    """The dtype of the computation and that of the parameters, as every Flax layer names them."""

    dtype: DTypeLike
    param_dtype: DTypeLike


def time_embedding(t: jax.Array, features: int, *, highest: float, lowest: float) -> jax.Array:
    """Sinusoidal embedding of time, (cos(w_k t), sin(w_k t)) for geometric frequencies w_k.

    w_k = highest (lowest / highest)^(k / K), k = 0..K-1. Two times are told apart where their
    difference times `highest` is not small: `highest=1000, lowest=0.1` is the embedding of
    1000 t of Ho et al. (2020), which was made for integer times from 0 to 1000.

    Args:
      t: times in [0, 1], any shape.
      features: how many numbers describe one time; an odd one is rounded down.
      highest: the highest angular frequency, in radians per unit of t.
      lowest: the lowest, itself excluded.

    Returns:
      `[*t.shape, features]`, in at least float32, whatever the dtype of t.

    Example:
      >>> time_embedding(jnp.zeros(4), 64, highest=1000.0, lowest=0.1).shape
      (4, 64)
    """
    t = t.astype(jnp.promote_types(t.dtype, jnp.float32))
    num_frequencies = features // 2
    exponents = np.arange(num_frequencies) / max(num_frequencies, 1)
    frequencies = highest * (lowest / highest) ** exponents
    angles = t[..., None] * jnp.asarray(frequencies, t.dtype).reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def class_indices(
    labels: jax.Array | None, batch_size: int, num_classes: int | None
) -> jax.Array | None:
    """Indices into an embedding table of num_classes + 1 rows, the last for "no class".

    A label out of range is refused where its value is known; where it is traced its index points
    outside the table, whose look-up then gives NaN.

    Args:
      labels: `[batch]` of integers from 0 to num_classes, or None: the null class for all.
      batch_size: the batch that the labels must match.
      num_classes: None for a model without classes.

    Returns:
      int32 `[batch]`, or `[1]` for labels=None, or None for a model without classes.

    Raises:
      ValueError: labels for a model without classes; labels of another shape, of a dtype that is
        no integer, or out of range.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError(
                f"labels need a model with classes; got labels {jnp.shape(labels)} and "
                "num_classes=None. Build the model with num_classes=..., or pass labels=None."
            )
        return None
    if labels is None:
        return jnp.full((1,), num_classes, jnp.int32)
    if not isinstance(labels, Tracer):
        values = np.asarray(labels)
        if values.size and not (0 <= values.min() and values.max() <= num_classes):
            raise ValueError(
                f"labels must be in 0..{num_classes}, {num_classes} being the null class; got "
                f"labels from {values.min()} to {values.max()}. Is num_classes right?"
            )
    labels = jnp.asarray(labels)
    if labels.shape != (batch_size,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of the shape [batch] = ({batch_size},); got "
            f"{labels.dtype} {labels.shape}. One-hot labels need labels.argmax(-1), and one "
            "class for all jnp.full(batch, label)."
        )
    # A negative index would count from the table's end, and so be the null class.
    in_range = (labels >= 0) & (labels <= num_classes)
    return jnp.where(in_range, labels.astype(jnp.int32), num_classes + 1)


def horizon_rows(horizon: jax.Array | None, takes_one: bool, x: jax.Array) -> jax.Array | None:
    """The horizon s - t as `[batch]` or `[1]`; None where the network takes none.

    Args:
      horizon: `[]` or `[batch]`, not negative; None means 0, of which the network is the velocity.
      takes_one: whether the network was built with `horizon=True`.
      x: `[batch, *event]`.

    Raises:
      ValueError: a horizon for a network without one; another shape; a negative one, where it is
        known.
    """
    if not takes_one:
        if horizon is None:
            return None
        raise ValueError(
            f"horizon needs a network that takes one; got horizon {jnp.shape(horizon)} and "
            "horizon=False. Build the model with horizon=True: the parameters of the one without "
            "keep their names."
        )
    horizon = jnp.zeros((), jnp.float32) if horizon is None else horizon
    if not isinstance(horizon, Tracer) and np.min(np.asarray(horizon)) < 0:
        raise ValueError(
            f"horizon must not be negative, being s - t for t <= s; got {np.min(horizon)}. Are t "
            "and s swapped?"
        )
    return broadcast_time(horizon, x, "horizon").reshape(-1)


class Embedding(nn.Module):
    """The U-Net's embedding of time, horizon and class, activated once for all the blocks.

    Attributes:
      channels: the network's base width; the embedding is four times as wide.
      time_scale: times t, and the horizon, before the sines and cosines, whose frequencies run from
        1 to 1e-4.
      num_classes: None, or the number of classes.
      dtype: of the computation; the sines and cosines are taken in at least float32.
      param_dtype: of the parameters.
    """

    channels: int
    time_scale: float
    num_classes: int | None
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        labels: jax.Array | None,
        batch_size: int,
        horizon: jax.Array | None = None,
    ) -> jax.Array:
        dtypes = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        highest, lowest = self.time_scale, self.time_scale / 10_000
        embed = functools.partial(
            time_embedding, features=self.channels, highest=highest, lowest=lowest
        )
        dense = functools.partial(nn.Dense, 4 * self.channels, **dtypes)
        emb = nn.silu(dense()(embed(t).astype(self.dtype)))
        emb = dense()(emb)
        if horizon is not None:
            # Zero at first, so that a network trained without can be trained on.
            zeros = nn.initializers.zeros
            h = nn.silu(dense(name="horizon_in")(embed(horizon).astype(self.dtype)))
            emb = emb + dense(name="horizon_out", kernel_init=zeros)(h)
        indices = class_indices(labels, batch_size, self.num_classes)
        if self.num_classes is not None and indices is not None:
            emb = emb + nn.Embed(self.num_classes + 1, 4 * self.channels, **dtypes)(indices)
        return nn.silu(emb)


def num_groups(channels: int) -> int:
    """The most groups, up to 32, that divide the channels and hold at least four each.

    With fewer in a group, GroupNorm would erase each channel's own mean and scale.
    """
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


conv3x3 = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1)


def group_norm(
    channels: int, dtype: DTypeLike, param_dtype: DTypeLike, groups: int | None = None
) -> nn.GroupNorm:
    """GroupNorm over `channels`, whose mean and variance are taken in at least float32.

    Raises:
      ValueError: if `groups` does not divide the channels; None takes `num_groups(channels)`.
    """
    groups = num_groups(channels) if groups is None else groups
    if groups < 1 or channels % groups:
        raise ValueError(
            f"num_groups must divide the channels of every block; got {channels} channels and "
            f"num_groups={groups}. None takes {num_groups(channels)} there."
        )
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, param_dtype=param_dtype)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the embedding, added to their input. The identity at first.

    Attributes:
      channels: of the output; where the input has others, a 1x1 convolution carries it over.
      dropout: the rate, before the second convolution.
      scale_shift_norm: the embedding scales and shifts the second normalisation's output (Dhariwal
        and Nichol 2021, "AdaGN") instead of being added to its input.
      dtype: of the computation.
      param_dtype: of the parameters.
      num_groups: of the normalisations; None for `num_groups(channels)`.
      kernels: the convolution's.
    """

    channels: int
    dropout: float
    scale_shift_norm: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    num_groups: int | None = None
    kernels: Kernels = KERNELS

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, deterministic: bool) -> jax.Array:
        dtypes = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = functools.partial(
            conv3x3, self.channels, conv_general_dilated=self.kernels.conv, **dtypes
        )
        h = conv()(nn.silu(group_norm(x.shape[-1], groups=self.num_groups, **dtypes)(x)))
        norm = group_norm(self.channels, groups=self.num_groups, **dtypes)
        if self.scale_shift_norm:
            emb = nn.Dense(2 * self.channels, **dtypes)(emb)[:, None, None, :]
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + nn.Dense(self.channels, **dtypes)(emb)[:, None, None, :])
        h = nn.Dropout(self.dropout)(nn.silu(h), deterministic=deterministic)
        h = conv(kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, **dtypes)(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over an image's pixels, added to its input. The identity at first.

    Attributes:
      num_heads: into how many heads the channels are divided.
      dtype: of the computation; the softmax is taken in at least float32.
      param_dtype: of the parameters.
      num_groups: of the normalisation; None for `num_groups(channels)`.
      kernels: the attention's.
    """

    num_heads: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    num_groups: int | None = None
    kernels: Kernels = KERNELS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, height, width, channels = x.shape
        norm = group_norm(channels, groups=self.num_groups, **dtypes)
        h = norm(x).reshape(batch, height * width, channels)
        q, k, v = (
            a.reshape(batch, height * width, self.num_heads, channels // self.num_heads)
            for a in jnp.split(nn.Dense(3 * channels, **dtypes)(h), 3, axis=-1)
        )
        h = self.kernels.attention(q, k, v).reshape(h.shape)
        h = nn.Dense(channels, kernel_init=nn.initializers.zeros, **dtypes)(h)
        return x + h.reshape(x.shape)


class Output(nn.Module):
    """Normalisation, SiLU and a 3x3 convolution to the image's channels. Zero at first.

    Computed in the wider of `dtype` and the image's dtype: a solver adds velocities up, and what
    this last layer rounds off is lost.

    Attributes:
      channels: of the image.
      dtype: of the computation before.
      param_dtype: of the parameters.
      num_groups: of the normalisation; None for `num_groups(channels)`.
    """

    channels: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    num_groups: int | None = None

    @nn.compact
    def __call__(self, h: jax.Array, image_dtype: DTypeLike) -> jax.Array:
        wide = jnp.promote_types(self.dtype, image_dtype)
        dtypes = Dtypes(dtype=wide, param_dtype=self.param_dtype)
        h = nn.silu(group_norm(h.shape[-1], groups=self.num_groups, **dtypes)(h))
        zeros = nn.initializers.zeros
        h = nn.Conv(self.channels, (3, 3), padding=1, kernel_init=zeros, **dtypes)(h)
        return h.astype(image_dtype)
