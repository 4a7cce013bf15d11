"""A small convolutional discriminator: from an image, and perhaps its class, to one number.

    D(x, y) = w f(x) + b + <E[y], f(x)>

with features f(x) from residual blocks at falling resolutions, pooled. The class enters by
projection (Miyato and Koyama 2018, arXiv 1802.05637). There is no normalisation: statistics would
mix what a gradient penalty keeps apart, the size of gradients and the examples of a batch. SiLU has
the second derivatives that the penalty's gradient holds.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.models.layers import Dtypes, class_indices, conv3x3


class Discriminator(nn.Module):
    """One number per image: `model.apply(params, x, labels=None) -> d`, larger for real ones.

    Attributes:
      channels: of the first level.
      channel_multipliers: one per resolution; between levels 2x2 means halve the image, whose sides
        must be divisible by 2 as often.
      num_res_blocks: residual blocks per level; the identity at first.
      num_classes: None, or the number of classes; index num_classes is the null class, "no label".
      dtype: of the computation; None means the wider of x's and the parameters'. The last layer
        works in the wider of it and float32.
      param_dtype: of the parameters.

    Example:
      >>> model = Discriminator(channels=8, channel_multipliers=(1, 2))
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
      >>> jax.jit(model.apply)(params, jnp.zeros((5, 8, 8, 3))).shape
      (5,)
    """

    channels: int = 32
    channel_multipliers: Sequence[int] = (1, 2, 4)
    num_res_blocks: int = 1
    num_classes: int | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, labels: jax.Array | None = None) -> jax.Array:
        """What the network says of every image.

        Args:
          x: `[batch, height, width, channel]`, floating.
          labels: integers in 0..num_classes, `[batch]`; None means the null class for all.

        Returns:
          `[batch]`, in at least float32. NaN where a traced label is out of range.

        Raises:
          ValueError: x or labels of a wrong shape or dtype; labels without num_classes; a concrete
            label out of range.
        """
        _check(self, x)
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        dtypes = Dtypes(dtype=dtype, param_dtype=self.param_dtype)
        h = conv3x3(self.channels, **dtypes)(x)
        for level, multiplier in enumerate(self.channel_multipliers):
            if level:
                h = nn.avg_pool(h, (2, 2), (2, 2))
            width = self.channels * multiplier
            if h.shape[-1] != width:
                h = nn.Dense(width, **dtypes)(h)
            for _ in range(self.num_res_blocks):
                inner = conv3x3(width, **dtypes)(nn.silu(h))
                zeros = nn.initializers.zeros
                h = h + conv3x3(width, kernel_init=zeros, **dtypes)(nn.silu(inner))
        wide = Dtypes(dtype=jnp.promote_types(dtype, jnp.float32), param_dtype=self.param_dtype)
        features = jnp.mean(nn.silu(h).astype(wide["dtype"]), axis=(1, 2))
        d = nn.Dense(1, **wide)(features)[:, 0]
        indices = class_indices(labels, len(x), self.num_classes)
        if self.num_classes is None or indices is None:
            return d
        table = nn.Embed(self.num_classes + 1, features.shape[-1], name="label", **wide)
        return d + jnp.sum(table(indices) * features, axis=-1)


def _check(model: Discriminator, x: jax.Array) -> None:
    halvings = len(model.channel_multipliers) - 1
    divisible = x.ndim == 4 and not (x.shape[1] % 2**halvings or x.shape[2] % 2**halvings)
    if not divisible or halvings < 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            "Discriminator takes floating images [batch, height, width, channel] whose sides are "
            f"divisible by 2^(levels - 1); got x {x.dtype} {x.shape} and channel_multipliers="
            f"{tuple(model.channel_multipliers)}. A single image needs x[None]; smaller images "
            "need fewer levels."
        )
