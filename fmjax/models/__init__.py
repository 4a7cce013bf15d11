"""Velocity networks in Flax. Nothing in fmjax needs them: any callable (t, x) -> u will do."""

from .discriminator import Discriminator as Discriminator
from .dit import DiT as DiT
from .mlp import MLP as MLP
from .mlp import ConditionalMLP as ConditionalMLP
from .unet import UNet as UNet
from .unet import cifar10_unet as cifar10_unet
from .unet import cifar10_unet_large as cifar10_unet_large
