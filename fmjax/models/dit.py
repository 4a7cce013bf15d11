"""A transformer over the patches of an image, as a velocity.

The family is Peebles and Xie's DiT (2022, arXiv 2212.09748), with what later work made of it: time
and class are tokens before the image's and no modulation of the blocks, RMSNorm, normalised queries
and keys, gated feed-forward layers, rotary positions on the plane. With h the tokens of the
conditions and of the patches, every block is

    h <- h + Attention(RMSNorm(h)),    h <- h + W (silu(G RMSNorm(h)) * (V RMSNorm(h)))

Every residual branch and the output start at zero, so that an untrained network is the velocity
u = 0. Attention is written out and not cuDNN's: its forward-mode derivative exists.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fmjax.models import tokens
from fmjax.models.kernels import KERNELS, Kernels
from fmjax.models.layers import Dtypes, class_indices, horizon_rows, time_embedding
from fmjax.types import broadcast_time


class DiT(nn.Module):
    """A velocity over images: `model.apply(params, t, x, labels=None, *, horizon=None) -> u`.

    Attributes:
      patch_size: side of a patch, which divides height and width; 2 at 8 to 32 pixels, 16 at 256.
      width: channels of a token.
      depth: blocks.
      num_heads: attention heads; each has width / num_heads channels, a multiple of 4.
      num_classes: None, or the number of classes; index num_classes is the null class, "no
        label", which a model trained for guidance sees instead of a dropped label.
      horizon: whether the network is told how far ahead it looks, as an average velocity is.
      num_time_tokens: tokens of the time, and as many of the horizon and of the class.
      time_scale: the highest angular frequency at which time and horizon enter, the lowest being a
        hundredth. A smaller one makes the velocity smoother in t; derivatives in t, which flow maps
        are trained on, grow with it.
      dropout: the rate in every feed-forward layer.
      kernels: its `attention`.
      remat: the backward pass computes the activations inside every block again instead of keeping
        them: less memory for about a third more work.
      dtype: of the computation; None means the wider of x's and the parameters'. Statistics of
        normalisations and softmaxes are taken in at least float32, the output layer in at least the
        dtype of x.
      param_dtype: of the parameters.

    Example:
      >>> model = DiT(patch_size=2, width=32, depth=2, num_heads=4)
      >>> t, x = jnp.zeros(()), jnp.zeros((2, 8, 8, 3))  # to have the arrays: jax.jit(model.init)
      >>> params = jax.eval_shape(model.init, jax.random.key(0), t, x)
      >>> jax.eval_shape(model.apply, params, t, x).shape
      (2, 8, 8, 3)
    """

    patch_size: int = 2
    width: int = 256
    depth: int = 8
    num_heads: int = 4
    num_classes: int | None = None
    horizon: bool = False
    num_time_tokens: int = 4
    time_scale: float = 16.0
    dropout: float = 0.0
    kernels: Kernels = KERNELS
    remat: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        labels: jax.Array | None = None,
        *,
        horizon: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The velocity at time t and image x, or its average over the horizon that follows.

        Args:
          t: times in [0, 1], `[]` or `[batch]`.
          x: `[batch, height, width, channel]`, floating, of any number of channels; height and
            width divisible by patch_size.
          labels: integers in 0..num_classes, `[batch]`; None means the null class for all.
          horizon: s - t of an average from t to s, `[]` or `[batch]`; None means 0, the velocity.
          deterministic: False turns dropout on, and wants `rngs={"dropout": key}`.

        Returns:
          The shape and dtype of x. NaN where a traced label is out of range.

        Raises:
          ValueError: x, t, horizon or labels of a wrong shape or dtype; labels without num_classes;
            a horizon without horizon=True; a concrete label out of range; a width that the heads do
            not divide.
        """
        self._check(x)
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        dtypes = Dtypes(dtype=dtype, param_dtype=self.param_dtype)
        prefix = self._prefix(t, x, labels, horizon, dtypes)
        patches = nn.Dense(self.width, name="patches", **dtypes)(
            tokens.patchify(x, self.patch_size)
        )
        h = jnp.concatenate([*prefix, patches], axis=1)
        grid = x.shape[1] // self.patch_size, x.shape[2] // self.patch_size
        angles = tokens.rotary_angles(grid, self.width // self.num_heads)
        skipped = h.shape[1] - len(angles)
        # A condition has no place: it is not turned.
        angles = np.pad(angles, ((skipped, 0), (0, 0)))
        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for n in range(self.depth):  # named, since Flax would name a block under remat otherwise
            shape = (self.num_heads, self.dropout, self.kernels)
            h = block(*shape, name=f"Block_{n}", **dtypes)(h, angles, deterministic)
        out = TokenOutput(self.patch_size**2 * x.shape[-1], name="Output_0", **dtypes)
        return tokens.unpatchify(out(h[:, skipped:], x.dtype), grid, self.patch_size)

    def _prefix(
        self,
        t: jax.Array,
        x: jax.Array,
        labels: jax.Array | None,
        horizon: jax.Array | None,
        dtypes: Dtypes,
    ) -> list[jax.Array]:
        """The tokens of the conditions, `[batch, num_time_tokens, width]` each."""
        shape = (self.num_time_tokens, self.width)
        times = {"time": broadcast_time(t, x).reshape(-1)}
        rows = horizon_rows(horizon, self.horizon, x)
        if rows is not None:
            times["horizon"] = rows
        found = [
            TimeTokens(*shape, self.time_scale, name=name, **dtypes)(value)
            for name, value in times.items()
        ]
        indices = class_indices(labels, x.shape[0], self.num_classes)
        if self.num_classes is not None and indices is not None:
            num, features = self.num_classes + 1, math.prod(shape)
            table = nn.Embed(num, features, name="label", **dtypes)
            found.append(table(indices).reshape(-1, *shape))
        return [jnp.broadcast_to(tokens, (x.shape[0], *shape)) for tokens in found]

    def _check(self, x: jax.Array) -> None:
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "DiT takes floating images [batch, height, width, channel]; got x "
                f"{x.dtype} {x.shape}. A single image needs x[None], one without a channel axis "
                "x[..., None], and pixels in 0..255 x / 127.5 - 1."
            )
        if self.depth < 1 or self.num_time_tokens < 1:
            raise ValueError(
                "depth and num_time_tokens must be at least 1; got "
                f"{self.depth} and {self.num_time_tokens}."
            )
        if self.num_heads < 1 or self.width % (4 * self.num_heads):
            raise ValueError(
                "width must be divisible by 4 num_heads, since a head's channels are turned in "
                f"pairs by row and by column; got width={self.width} and num_heads="
                f"{self.num_heads}."
            )


class TimeTokens(nn.Module):
    """Tokens of a time: sines and cosines, and two layers.

    Attributes:
      num_tokens: how many.
      width: of a token.
      time_scale: the highest angular frequency.
      dtype: of the computation; the sines and cosines are taken in at least float32.
      param_dtype: of the parameters.
    """

    num_tokens: int
    width: int
    time_scale: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Of times `[num]`: `[num, num_tokens, width]`."""
        dtypes = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        lowest = self.time_scale / 100
        emb = time_embedding(t, self.width, highest=self.time_scale, lowest=lowest)
        emb = nn.silu(nn.Dense(self.width, **dtypes)(emb.astype(self.dtype)))
        emb = nn.Dense(self.num_tokens * self.width, **dtypes)(emb)
        return emb.reshape(-1, self.num_tokens, self.width)


class Block(nn.Module):
    """Self-attention and a gated feed-forward layer, added to their inputs. The identity at first.

    Attributes:
      num_heads: into how many heads the channels are divided.
      dropout: the rate in the feed-forward layer.
      kernels: the attention's.
      dtype: of the computation; statistics and the softmax are taken in at least float32.
      param_dtype: of the parameters.
    """

    num_heads: int
    dropout: float
    kernels: Kernels
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(
        self, h: jax.Array, angles: np.ndarray | jax.Array, deterministic: bool
    ) -> jax.Array:
        """Of tokens `[batch, length, width]` at `rotary_angles` `[length, width / heads / 2]`."""
        dtypes = Dtypes(dtype=self.dtype, param_dtype=self.param_dtype)

        def dense(features: int, name: str, *, zero: bool = False) -> nn.Dense:
            init = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name, **dtypes)

        width = h.shape[-1]
        heads = (*h.shape[:2], self.num_heads, width // self.num_heads)
        a = nn.RMSNorm(name="attention_norm", **dtypes)(h)
        q, k, v = (
            part.reshape(heads) for part in jnp.split(dense(3 * width, "qkv")(a), 3, axis=-1)
        )
        q = tokens.rotate(nn.RMSNorm(name="q_norm", **dtypes)(q), angles)
        k = tokens.rotate(nn.RMSNorm(name="k_norm", **dtypes)(k), angles)
        h = h + dense(width, "attention_out", zero=True)(
            self.kernels.attention(q, k, v).reshape(h.shape)
        )
        a = nn.RMSNorm(name="feed_forward_norm", **dtypes)(h)
        hidden = hidden_width(width)
        a = nn.silu(dense(hidden, "gate")(a)) * dense(hidden, "value")(a)
        a = nn.Dropout(self.dropout)(a, deterministic=deterministic)
        return h + dense(width, "feed_forward_out", zero=True)(a)


class TokenOutput(nn.Module):
    """Normalisation and a dense layer from tokens to the pixels of their patches. Zero at first.

    Computed in the wider of `dtype` and the image's dtype: a solver adds velocities up, and what
    this last layer rounds off is lost.

    Attributes:
      features: pixels of a patch times channels.
      dtype: of the computation before.
      param_dtype: of the parameters.
    """

    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, h: jax.Array, image_dtype: DTypeLike) -> jax.Array:
        wide = jnp.promote_types(self.dtype, image_dtype)
        dtypes = Dtypes(dtype=wide, param_dtype=self.param_dtype)
        h = nn.RMSNorm(**dtypes)(h)
        zeros = nn.initializers.zeros
        return nn.Dense(self.features, kernel_init=zeros, **dtypes)(h).astype(image_dtype)


def hidden_width(width: int) -> int:
    """Of the feed-forward layers: 8/3 of the width, up to the next multiple of 8.

    Three matrices of this size cost what two of four times the width do.
    """
    return 8 * math.ceil(width / 3)
