"""The network of image experiments: its flags, and what they make."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fmjax import models
from fmjax.harness.config import mesh
from fmjax.models import cpu
from fmjax.models import kernels as xla

KERNELS = {"xla": xla.KERNELS, "cpu": cpu.KERNELS}
PAID_BACK = 300  # steps, and fewer in every run whose compilation was measured


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The U-Net. Image sides must be divisible by 2^(levels - 1)."""

    channels: int = 32
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level, as multiples; the image is halved between levels."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """Image heights at which there is attention."""
    num_heads: int = 1
    """Attention heads, unless head_channels is given."""
    head_channels: int | None = None
    """Channels per attention head."""
    dropout: float = 0.0
    """Dropout rate in the residual blocks."""
    scale_shift_norm: bool = False
    """Whether time scales and shifts the normalised features, or is added to them."""
    conv_resample: bool = True
    """Whether to resample by convolutions, or by pooling and repetition."""
    num_groups: int | None = None
    """Groups of the normalisations; up to 32 with at least four channels in each without it."""
    time_scale: float = 1000.0
    """What times are multiplied by before their embedding."""
    horizon: bool = False
    """Whether it is an average velocity's, and also takes s - t."""


def choose_kernels(config: Any) -> Literal["xla", "cpu"]:
    """The kernels to train with, as the flag says or as the break-even was measured."""
    if config.kernels != "auto":
        return config.kernels
    devices = mesh(config).devices
    one_cpu = devices.size == 1 and devices.flat[0].platform == "cpu"
    return "cpu" if one_cpu and config.num_steps >= PAID_BACK else "xla"


def make_unet(config: Any, num_classes: int) -> models.UNet:
    """The U-Net that the flags describe, with the classes of its data if it is conditional."""
    known = num_classes if config.conditional else None
    kernels = KERNELS[choose_kernels(config)]
    return models.UNet(**dataclasses.asdict(config.model), num_classes=known, kernels=kernels)


def init_params(model: models.UNet, event_shape: tuple[int, ...], key: jax.Array) -> Any:
    """The U-Net's first parameters."""
    return model.init(key, t=jnp.zeros(()), x=jnp.zeros((1, *event_shape)))
