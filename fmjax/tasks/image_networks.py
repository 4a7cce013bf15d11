"""The network of image experiments: its flags, and what they make."""

import dataclasses
import json
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fmjax import models
from fmjax.harness import places
from fmjax.harness.config import mesh
from fmjax.models import cpu
from fmjax.models import kernels as xla
from fmjax.training.checkpoints import steps_in

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


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """The transformer. Image sides must be divisible by patch_size."""

    patch_size: int = 2
    """Side of a patch, which is one token."""
    width: int = 128
    """Channels of a token, a multiple of 4 num_heads."""
    depth: int = 6
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_time_tokens: int = 4
    """Tokens of the time, and as many of the class."""
    time_scale: float = 16.0
    """The highest frequency at which time enters, the lowest being a hundredth."""
    horizon: bool = False
    """Whether it is an average velocity's, and also takes s - t."""
    dropout: float = 0.0
    """Dropout rate in the feed-forward layers."""


def choose_kernels(config: Any) -> Literal["xla", "cpu"]:
    """The kernels to train with, as the flag says or as the break-even was measured."""
    if config.kernels != "auto":
        return config.kernels
    devices = mesh(config).devices
    one_cpu = devices.size == 1 and devices.flat[0].platform == "cpu"
    return "cpu" if one_cpu and config.num_steps >= PAID_BACK else "xla"


def make_network(config: Any, num_classes: int) -> models.UNet | models.DiT:
    """The network that the flags describe, with the classes of its data if it is conditional."""
    known = num_classes if config.conditional else None
    kernels = KERNELS[choose_kernels(config)]
    make, flags = (
        (models.DiT, config.dit) if config.network == "dit" else (models.UNet, config.model)
    )
    return make(**dataclasses.asdict(flags), num_classes=known, kernels=kernels)


def check_network(config: Any, event_shape: tuple[int, ...] | None = None) -> None:
    """Refuses flags that make no network, or that the chosen one has no use for.

    Args:
      config: an `ImageConfig`.
      event_shape: of the images, once it is known.

    Raises:
      ValueError: naming the flag, what it must be and what was got.
    """
    if config.network == "dit":
        width, heads, patch = config.dit.width, config.dit.num_heads, config.dit.patch_size
        if heads and width % (4 * heads):
            raise ValueError(
                f"--dit.width must be divisible by 4 times --dit.num-heads; got {width} and "
                f"{heads}. Take {4 * heads * max(1, round(width / (4 * heads)))}."
            )
        if event_shape is not None and any(side % patch for side in event_shape[:2]):
            height, width = event_shape[:2]
            fits = [n for n in range(1, 33) if not math.gcd(height, width) % n]
            raise ValueError(
                f"--dit.patch-size must divide the sides of the images; got {patch} for "
                f"{height}x{width}. Take one of {' '.join(map(str, fits))}."
            )
    # A finished run's other flags are what the defaults were when it was made.
    used, unused = ("dit", "model") if config.network == "dit" else ("model", "dit")
    if config.known is None and getattr(config, unused) != getattr(type(config), unused):
        network = "unet" if config.network == "dit" else "dit"
        raise ValueError(
            f"--{unused}.* is for --network {network}; got {getattr(config, unused)} with "
            f"--network {config.network}, whose flags are --{used}.*"
        )


def has_begun(config: Any) -> bool:
    """Whether a run has parameters of its own: it is finished, or resumes from a checkpoint."""
    if config.known is not None:
        return True
    return config.workdir is not None and bool(steps_in(config.folder / "checkpoints"))


def check_beginning(config: Any, folder: places.Folder, flag: str) -> None:
    """Refuses to begin with the parameters of a run of another network.

    Args:
      config: an `ImageConfig`. A run that has begun needs nothing of the folder.
      folder: that run's. One that is no image run is left to those who read its parameters.
      flag: which names it.

    Raises:
      ValueError: naming the flags that make the folder's network.
    """
    if has_begun(config):
        return
    try:
        theirs = json.loads((folder / "config.json").read_text())["config"]
        theirs = {name: theirs[name] for name in ("network", "conditional", "model", "dit")}
    except (OSError, ValueError, KeyError, TypeError):
        return
    wrong = _differing(theirs, json.loads(json.dumps(dataclasses.asdict(config), default=str)))
    if wrong:
        flags = " ".join(_as_flag(name, value) for name, value in wrong.items())
        raise ValueError(
            f"{flag} needs a run of the same network; got {folder}, which has {flags}. Give these."
        )


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The flags of the first network that the second has not, with their values."""
    group = "dit" if theirs["network"] == "dit" else "model"
    named = {name: (theirs[name], ours[name]) for name in ("network", "conditional")}
    named |= {
        f"{group}.{name}": (value, ours[group].get(name))
        for name, value in theirs[group].items()
        if name != "dropout"  # has no parameters
    }
    return {name: value for name, (value, mine) in named.items() if value != mine}


def _as_flag(name: str, value: Any) -> str:
    *group, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        last, words = last if value else f"no-{last}", []
    else:
        words = [str(word) for word in (value if isinstance(value, list) else [value])]
    return " ".join([f"--{'.'.join([*group, last])}", *words])


def init_params(
    model: models.UNet | models.DiT, event_shape: tuple[int, ...], key: jax.Array
) -> Any:
    """The network's first parameters."""
    return model.init(key, t=jnp.zeros(()), x=jnp.zeros((1, *event_shape)))
