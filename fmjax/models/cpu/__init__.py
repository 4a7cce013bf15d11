"""Convolutions and attention that one CPU device computes faster: `UNet(kernels=cpu.KERNELS)`.

Not on several devices, over which a batch is cut. The programs take longer to compile.
"""

from fmjax.models.kernels import Kernels

from .attention import attention
from .upsampling import upsampled_conv_general_dilated
from .winograd import conv_general_dilated

KERNELS = Kernels(conv_general_dilated, upsampled_conv_general_dilated, attention)
