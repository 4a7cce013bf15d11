"""The residual networks for CIFAR-10 of depth 6 n + 2, in Flax, for inference.

Images of 32 x 32 pixels go through a 3 x 3 convolution and three stages of n blocks each, with 16,
32 and 64 channels at 32 x 32, 16 x 16 and 8 x 8. The mean over the last 8 x 8 positions are the
features, `[batch, 64]`; a linear layer makes the logits of 10 classes of them. A block is

    y = relu(bn1(conv1(x))),    block(x) = relu(bn2(conv2(y)) + shortcut(x)),

where conv1 and conv2 are 3 x 3 without a bias, padded by one zero on each side. The first block of
the second and of the third stage halves the image in conv1, and its shortcut ("option A") has no
parameters: every second pixel, the new channels zero, half of them before the old ones and half
after. The other shortcuts are the identity. A batch normalisation has the statistics of training,

    bn(x) = weight (x - running_mean) / sqrt(running_var + 1e-5) + bias,

and pixels enter as (v / 255 - mean) / std per channel with ImageNet's mean and std, which the
trained weights were made for.

Sources: He et al. 2015, arXiv 1512.03385 (section 4.2); the weights and the names of their entries
are those of Y. Idelbayev, github.com/akamaster/pytorch_resnet_cifar10.
"""

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ..weights import check_entries

IMAGE_SHAPE = (32, 32, 3)
NUM_FEATURES = 64
NUM_CLASSES = 10
BATCH_NORM_EPS = 1e-5
_MEAN = np.array([0.485, 0.456, 0.406], np.float32).reshape(1, 1, 1, 3)
_STD = np.array([0.229, 0.224, 0.225], np.float32).reshape(1, 1, 1, 3)
# A leaf of the Flax tree and the last part of its name in PyTorch.
_ENTRIES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
_ENTRIES |= {"mean": "running_mean", "var": "running_var"}
_TO_PYTORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}  # axes of vectors, matrices, 2-D kernels
_TO_FLAX = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_HINT = (
    "The trained ones are pretrained_models/*.th of github.com/akamaster/pytorch_resnet_cifar10; "
    "torchvision's networks are others."
)


class ResNet(nn.Module):
    """uint8 images `[batch, 32, 32, 3]` -> logits `[batch, 10]`.

    Its variables come from `params_from_state_dict`. Products are of full float32 precision on
    every device.

    Attributes:
      depth: 6 n + 2 with n blocks in each stage: 20, 32, 44, 56, 110, ...

    Raises:
      ValueError: when it is applied, if there are no networks of this depth.

    Example:
      >>> images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8)
      >>> jax.eval_shape(ResNet(20).init_with_output, jax.random.key(0), images)[0].shape
      (2, 10)
    """

    depth: int

    def setup(self) -> None:
        n = (self.depth - 2) // 6
        if n < 1 or self.depth != 6 * n + 2:
            raise ValueError(
                f"depth must be 6 n + 2 with n at least 1; got {self.depth}. Usual are 20 and 56."
            )
        self.conv1, self.bn1 = _conv(16), _norm()
        self.layer1 = [_Block(16) for _ in range(n)]
        self.layer2 = [_Block(32, stride=1 if i else 2) for i in range(n)]
        self.layer3 = [_Block(64, stride=1 if i else 2) for i in range(n)]
        self.linear = nn.Dense(NUM_CLASSES, precision=jax.lax.Precision.HIGHEST)

    def features(self, images: jax.Array) -> jax.Array:
        """float32 `[batch, 64]`."""
        x = (images.astype(jnp.float32) / 255 - _MEAN) / _STD
        x = nn.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            x = block(x)
        return jnp.mean(x, axis=(1, 2))

    def logits(self, features: jax.Array) -> jax.Array:
        """`[batch, 10]`."""
        return self.linear(features)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(self.features(images))


class _Block(nn.Module):
    """Two convolutions and a shortcut, `[batch, h, w, c]` -> `[batch, h / s, w / s, channels]`."""

    channels: int
    stride: int = 1

    def setup(self) -> None:
        self.conv1, self.bn1 = _conv(self.channels, self.stride), _norm()
        self.conv2, self.bn2 = _conv(self.channels), _norm()

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.bn1(self.conv1(x)))
        return nn.relu(self.bn2(self.conv2(y)) + self.shortcut(x))

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Option A: every `stride`-th pixel, zeros for the new channels on both sides."""
        new = (self.channels - x.shape[-1]) // 2
        return jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (new, new)))


def _conv(channels: int, stride: int = 1) -> nn.Conv:
    """3 x 3, one zero on each side: "SAME" would put both on one side where the stride is 2."""
    exact = jax.lax.Precision.HIGHEST  # an accelerator's default rounds factors to TF32 or less
    return nn.Conv(channels, (3, 3), strides=stride, padding=1, use_bias=False, precision=exact)


def _norm() -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=BATCH_NORM_EPS)


def check_images(images: np.ndarray) -> None:
    """Refuses images that the network was not made for.

    Args:
      images: they must be uint8 `[batch, 32, 32, 3]`, pixel values 0 to 255.

    Raises:
      ValueError: if they are not.

    Example:
      >>> check_images(np.zeros((2, 32, 32, 3), np.uint8))
    """
    if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(
            "A CIFAR-10 ResNet takes uint8 images [batch, 32, 32, 3], 0 to 255; got "
            f"{images.dtype} {list(images.shape)}. Take an encoder of the images' own data set; "
            "fmjax.data.pixels.quantize makes pixel values of floats."
        )


def params_from_state_dict(state_dict: Mapping[str, np.ndarray]) -> tuple[int, dict[str, Any]]:
    """The depth and the variables of a trained network, from PyTorch's names and layouts.

    Args:
      state_dict: `layer1.0.conv1.weight` and so on, as `read_tensors` gives it; all names may have
        the prefix `module.` of a network that was trained in parallel. What ends with
        `num_batches_tracked` is not used.

    Returns:
      `(depth, {"params": ..., "batch_stats": ...})`, float32, for `ResNet(depth).apply`.

    Raises:
      ValueError: if an entry is missing, unknown, of another shape, or holds no finite numbers. The
        depth is told by the entries of the first stage.

    Example:
      >>> zeros = {name: np.zeros(shape) for name, shape in torch_shapes(20).items()}
      >>> depth, variables = params_from_state_dict(zeros)
      >>> depth, variables["params"]["layer2_0"]["conv1"]["kernel"].shape
      (20, (3, 3, 16, 32))
    """
    used = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    if used and all(name.startswith("module.") for name in used):
        used = {name.removeprefix("module."): value for name, value in used.items()}
    blocks = [k for k in used if k.startswith("layer1.") and k.endswith(".conv1.weight")]
    depth = 6 * max(len(blocks), 1) + 2
    network = f"a CIFAR-10 ResNet of depth {depth}"
    check_entries(used, torch_shapes(depth), network=network, hint=_HINT)
    variables = {}
    for path, name in _torch_names(depth).items():
        value = used[name].astype(np.float32)
        variables[path] = jnp.asarray(value.transpose(_TO_FLAX[value.ndim]))
    return depth, traverse_util.unflatten_dict(variables)


def torch_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """The entries of a network's state dict and their shapes, from the network's own.

    Args:
      depth: 6 n + 2.

    Returns:
      `{"bn1.bias": (16,), ...}`, sorted by name.

    Raises:
      ValueError: if there are no networks of this depth.

    Example:
      >>> torch_shapes(20)["layer2.0.conv1.weight"]
      (32, 16, 3, 3)
    """
    shapes = {}
    for path, name in _torch_names(depth).items():
        shape = _leaves(depth)[path].shape
        shapes[name] = tuple(shape[axis] for axis in _TO_PYTORCH[len(shape)])
    return dict(sorted(shapes.items()))


def _torch_names(depth: int) -> dict[tuple[str, ...], str]:
    """PyTorch's name of each leaf: params, layer1_0, bn1, scale -> layer1.0.bn1.weight."""
    return {
        path: ".".join([*(part.replace("_", ".") for part in path[1:-1]), _ENTRIES[path[-1]]])
        for path in _leaves(depth)
    }


@functools.cache
def _leaves(depth: int) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.uint8)
    variables = jax.eval_shape(ResNet(depth).init, jax.random.key(0), images)
    return cast(dict[tuple[str, ...], jax.ShapeDtypeStruct], traverse_util.flatten_dict(variables))
