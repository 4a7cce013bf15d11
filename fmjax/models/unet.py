"""The U-Net of diffusion models, as a velocity over images.

The architecture is Ho et al.'s (2020, arXiv 2006.11239) with Dhariwal and Nichol's changes (2021,
arXiv 2105.05233), the family that most published flow-matching results on images were made with:
residual blocks at falling and again rising resolutions, self-attention at some of them, and every
output on the way down handed over to the way up. Time (t times 1000) and the class reach
every residual block through one embedding. Every residual branch and the output start at zero, so
that an untrained network is the velocity u = 0.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.models import layers
from fmjax.models.kernels import KERNELS, Kernels, average_pool, nearest_upsample
from fmjax.types import broadcast_time


class UNet(nn.Module):
    """A velocity over images: `model.apply(params, t, x, labels=None) -> u`.

    With `horizon=True` an average velocity: `model.apply(params, t, x, horizon=s - t) -> U`.

    Attributes:
      channels: the base width.
      channel_multipliers: one per resolution; level n works on `channels * multiplier` channels
        at 1 / 2**n of the image's height and width.
      num_res_blocks: residual blocks per level on the way down; one more on the way up.
      attention_resolutions: the heights, in pixels, at which attention follows every residual
        block. The middle of the network always has it.
      num_heads: attention heads, unless `head_channels` is given.
      head_channels: channels per head; when given it decides, and num_heads is not used.
      dropout: the rate in every residual block.
      scale_shift_norm: the embedding scales and shifts the normalised features instead of being
        added to them.
      conv_resample: resample by a strided convolution, and by repetition and a convolution;
        otherwise by 2x2 means and by repetition alone.
      num_groups: groups of every GroupNorm, 32 in the published networks, or None: up to 32, with
        at least four channels in each.
      time_scale: times t before the sinusoidal embedding, which was made for 0..1000. A smaller one
        makes the velocity smoother in t and an adaptive solver's steps longer. Flow maps, whose
        losses take the derivative in t, want 1 to 16: at 1000 it is all oscillation.
      horizon: whether the network takes the horizon s - t, in a second embedding of the same scale,
        which adds zero at first: parameters that were trained without it can be trained on, their
        names are the same.
      num_classes: None, or the number of classes; index num_classes is the null class, "no
        label", which a model trained for guidance sees instead of a dropped label.
      kernels: how convolutions and attention are computed: XLA's way, or on a CPU by
        `fmjax.models.cpu.KERNELS`, which are faster and take longer to compile.
      remat: the backward pass computes the activations inside every residual block and attention
        again instead of keeping them: less memory for about a third more work.
      dtype: of the computation; None means the wider of x's and the parameters'. Statistics of
        normalisations and softmaxes are taken in at least float32, the output layer in at least the
        dtype of x.
      param_dtype: of the parameters.

    Example:
      >>> model = UNet(channels=16, channel_multipliers=(1, 2), attention_resolutions=(4,))
      >>> t, x = jnp.zeros(()), jnp.zeros((2, 8, 8, 3))  # to have the arrays: jax.jit(model.init)
      >>> params = jax.eval_shape(model.init, jax.random.key(0), t, x)
      >>> jax.eval_shape(model.apply, params, t, x).shape
      (2, 8, 8, 3)
    """

    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    num_heads: int = 1
    head_channels: int | None = None
    dropout: float = 0.0
    scale_shift_norm: bool = False
    conv_resample: bool = True
    num_groups: int | None = None
    time_scale: float = 1000.0
    horizon: bool = False
    num_classes: int | None = None
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
        """The velocity at time t and image x, or the average one from t to t + horizon.

        Args:
          t: times in [0, 1], `[]` or `[batch]`.
          x: `[batch, height, width, channel]`, floating, of any number of channels; height and
            width divisible by 2**(levels - 1).
          labels: integers in 0..num_classes, `[batch]`; None means the null class for all.
          horizon: s - t, not negative, `[]` or `[batch]`; None means 0.
          deterministic: False turns dropout on, and wants `rngs={"dropout": key}`.

        Returns:
          The shape and dtype of x. NaN where a traced label is out of range.

        Raises:
          ValueError: x, t, labels or horizon of a wrong shape or dtype; labels without
            num_classes, a horizon without `horizon=True`; a concrete label out of range or a
            negative horizon; channels that the heads do not divide.
        """
        self._check_image(x)
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        dtypes = layers.Dtypes(dtype=dtype, param_dtype=self.param_dtype)
        shared = {**dtypes, "num_groups": self.num_groups, "kernels": self.kernels}
        t = broadcast_time(t, x).reshape(-1)
        embedding = layers.Embedding(self.channels, self.time_scale, self.num_classes, **dtypes)
        rows = layers.horizon_rows(horizon, self.horizon, x)
        emb = embedding(t, labels, x.shape[0], rows)

        # Flax would name a block under remat otherwise, and its parameters with it.
        block_names = (f"ResBlock_{n}" for n in itertools.count())
        attention_names = (f"Attention_{n}" for n in itertools.count())
        ResBlock, Attention = layers.ResBlock, layers.Attention
        if self.remat:
            ResBlock, Attention = nn.remat(ResBlock, static_argnums=(3,)), nn.remat(Attention)

        def res_block(h, width):
            shape = (width, self.dropout, self.scale_shift_norm)
            block = ResBlock(*shape, name=next(block_names), **shared)
            return block(h, emb, deterministic)

        def attention(h):
            heads = self._num_heads(h.shape[-1])
            return Attention(heads, name=next(attention_names), **shared)(h)

        def block(h, width):
            h = res_block(h, width)
            return attention(h) if h.shape[1] in self.attention_resolutions else h

        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        conv = functools.partial(layers.conv3x3, conv_general_dilated=self.kernels.conv, **dtypes)
        upsampled_conv = functools.partial(conv, conv_general_dilated=self.kernels.upsampled_conv)
        h = conv(widths[0])(x)
        skips = [h]
        for level, width in enumerate(widths):
            if level > 0:
                down = conv(h.shape[-1], strides=2) if self.conv_resample else average_pool
                h = down(h)
                skips.append(h)
            for _ in range(self.num_res_blocks):
                h = block(h, width)
                skips.append(h)
        h = res_block(attention(res_block(h, widths[-1])), widths[-1])
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), width)
            if level > 0:
                up = upsampled_conv(width) if self.conv_resample else nearest_upsample
                h = up(h)
        return layers.Output(x.shape[-1], num_groups=self.num_groups, **dtypes)(h, x.dtype)

    def _num_heads(self, channels: int) -> int:
        name = "num_heads" if self.head_channels is None else "head_channels"
        divisor = self.num_heads if self.head_channels is None else self.head_channels
        if divisor < 1 or channels % divisor:
            raise ValueError(
                f"the channels at an attention block must be divisible by {name}; got {channels} "
                f"channels and {name}={divisor}. {math.gcd(channels, divisor)} would do."
            )
        return self.num_heads if self.head_channels is None else channels // divisor

    def _check_image(self, x: jax.Array) -> None:
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "UNet takes floating images [batch, height, width, channel]; got x "
                f"{x.dtype} {x.shape}. A single image needs x[None], one without a channel axis "
                "x[..., None], and pixels in 0..255 x / 127.5 - 1."
            )
        factor = 2 ** (len(self.channel_multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            first = x.shape[1] in (1, 3, 4) and x.shape[1] < min(x.shape[2:])
            fix = (
                "Are the channels first? Images are [batch, height, width, channel]: "
                "x.transpose(0, 2, 3, 1)."
                if first
                else "Pad or resize the images, or take fewer levels."
            )
            raise ValueError(
                f"height and width must be divisible by {factor}, that is 2**(levels - 1) for "
                f"{len(self.channel_multipliers)} channel_multipliers; got x {x.shape}. {fix}"
            )


def cifar10_unet() -> UNet:
    """The CIFAR-10 network of torchcfm: 35,746,307 parameters at 32x32x3.

    Heads of 64 channels make four at 16x16. A variant is a `clone`, Flax's own word. With
    torchcfm's weights it is torchcfm's function if `time_scale=1.0`, since torchcfm feeds t in
    [0, 1] to the embedding, and if the rows of each `qkv`, which are ordered (head, q k v, channel)
    there, are put in the order (q k v, head, channel).

    Example:
      >>> model = cifar10_unet().clone(num_classes=10, dtype=jnp.bfloat16)

    Source: Tong et al. (2023), arXiv 2302.00482.
    """
    return UNet(
        channels=128,
        channel_multipliers=(1, 2, 2, 2),
        num_res_blocks=2,
        attention_resolutions=(16,),
        head_channels=64,
        dropout=0.1,
    )


def cifar10_unet_large() -> UNet:
    """The CIFAR-10 network of Meta's flow_matching: 55,676,419 parameters at 32x32x3.

    About three times the work of `cifar10_unet`. A variant is a `clone`, Flax's own word. With
    flow_matching's weights it is flow_matching's function if `time_scale=1.0`, since that feeds t
    in [0, 1] to the embedding; the rows of `qkv` are in the same order.

    Example:
      >>> model = cifar10_unet_large().clone(dtype=jnp.bfloat16)

    Source: Lipman et al. (2024), arXiv 2412.06264.
    """
    return UNet(
        channels=128,
        channel_multipliers=(2, 2, 2),
        num_res_blocks=4,
        attention_resolutions=(16,),
        num_heads=1,
        dropout=0.3,
        scale_shift_norm=True,
        conv_resample=False,
    )
