"""Encoders: functions from images to features, whose distributions the metrics compare.

A figure is comparable only with others from the same encoder: the same weights, hence the hash, and
the same processing of pixels for the network, hence the protocol. Weights are never downloaded.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from ..files import hash_file
from ..weights import read_tensors
from . import inception, resize, resnet

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
_INCEPTION_SOURCE = f"""The FID's weights are {FILE_NAME}, whose SHA-256 begins with 6726825d; \
nothing is downloaded here. It is usually had from
  release fid_weights of github.com/mseitzer/pytorch-fid
  release v0.2.0 of github.com/toshas/torch-fidelity, as \
weights-inception-2015-12-05-6726825d.pth"""
_RESNET_SOURCE = """Trained CIFAR-10 ResNets are pretrained_models/*.th of \
github.com/akamaster/pytorch_resnet_cifar10; nothing is downloaded here."""


class Encoder(NamedTuple):
    """Features of images, and where they come from.

    Attributes:
      name: as it is written beside a figure.
      digest: SHA-256 of the weights, 64 hexadecimal digits.
      features: uint8 images `[batch, height, width, channel]` -> float32 `[batch, num_features]`.
        It compiles once for each batch size: keep to one.
      logits: features `[n, num_features]` -> class scores `[n, num_classes]`; None where the
        encoder has no classes.
      num_features: length of a feature vector.
    """

    name: str
    digest: str
    features: Callable[[np.ndarray], np.ndarray]
    logits: Callable[[np.ndarray], np.ndarray] | None
    num_features: int


class Protocol(NamedTuple):
    """The processing of 8-bit images for the InceptionV3.

    Attributes:
      name: a letter, as it is written beside a figure.
      preprocess: uint8 `[batch, height, width, channel]` -> float32 `[batch, 299, 299, 3]`.
    """

    name: str
    preprocess: Callable[[jax.Array], jax.Array]


LEGACY_TENSORFLOW = Protocol("A", resize.legacy_tensorflow)
"""clean-fid's mode `legacy_tensorflow`, which torchcfm reports: TensorFlow 1's resize."""

TORCHMETRICS = Protocol("B", resize.torchmetrics)
"""torchmetrics' FrechetInceptionDistance, which flow_matching reports: an antialiased resize."""


def inception_encoder(
    weights: str | os.PathLike[str], protocol: Protocol, *, sha256: str = "6726825d"
) -> Encoder:
    """The FID's InceptionV3 with the weights of a file, whose hash is checked before it is read.

    Args:
      weights: `pt_inception-2015-12-05-6726825d.pth`, or the same tensors as safetensors.
      protocol: `LEGACY_TENSORFLOW` or `TORCHMETRICS`.
      sha256: the hash that the file must have, or its first 8 digits or more. The usual file
        carries its first 8 in its name; a safetensors file has another.

    Returns:
      An `Encoder` with 2048 features and the logits of 1008 classes without their bias.

    Raises:
      FileNotFoundError: if there is no such file; the message says which, and where it is had.
      ValueError: for another hash, and for a file that `read_tensors` or
        `params_from_state_dict` refuses.

    Example:
      >>> encoder = inception_encoder(FILE_NAME, LEGACY_TENSORFLOW)  # doctest: +SKIP
      >>> encoder.features(np.zeros((2, 32, 32, 3), np.uint8)).shape  # doctest: +SKIP
      (2, 2048)
    """
    path = Path(weights)
    digest = _checked_digest(path, sha256, _INCEPTION_SOURCE)
    params = inception.params_from_state_dict(read_tensors(path))
    preprocess = jax.jit(protocol.preprocess)

    def features(images: np.ndarray) -> np.ndarray:
        resize.check_images(images)  # before JAX narrows another dtype
        return np.asarray(_features(params, preprocess(images)))

    def logits(features: np.ndarray) -> np.ndarray:
        return np.asarray(_logits(params, features))

    name = f"InceptionV3, protocol {protocol.name}"
    return Encoder(name, digest, features, logits, inception.NUM_FEATURES)


def resnet_encoder(weights: str | os.PathLike[str], *, sha256: str | None = None) -> Encoder:
    """A trained CIFAR-10 ResNet as an encoder, of the depth that its weights have.

    Its features are the mean of the last stage over its 8 x 8 positions, its logits those of the
    ten classes of CIFAR-10 in the data set's order. See `fmjax.metrics.resnet`.

    Args:
      weights: a file of github.com/akamaster/pytorch_resnet_cifar10, pretrained_models/*.th, or the
        same tensors under the same names as safetensors or .npz.
      sha256: the hash that the file must have, or its first 8 digits or more; None for any.

    Returns:
      An `Encoder` with 64 features and the logits of 10 classes. Its `features` takes uint8 images
      `[batch, 32, 32, 3]` of 256 levels and raises a `ValueError` for others.

    Raises:
      FileNotFoundError: if there is no such file; the message says where it is had.
      ValueError: for another hash, and for a file that `read_tensors` or
        `params_from_state_dict` refuses.

    Example:
      >>> encoder = resnet_encoder("resnet56.npz")  # doctest: +SKIP
      >>> encoder.name, encoder.features(np.zeros((2, 32, 32, 3), np.uint8)).shape  # doctest: +SKIP
      ('CIFAR-10 ResNet-56', (2, 64))

    Source: He et al. 2015, arXiv 1512.03385 (section 4.2).
    """
    path = Path(weights)
    digest = _checked_digest(path, sha256, _RESNET_SOURCE)
    depth, params = resnet.params_from_state_dict(read_tensors(path))
    apply = jax.jit(resnet.ResNet(depth).apply, static_argnames="method")

    def features(images: np.ndarray) -> np.ndarray:
        resnet.check_images(images)  # before JAX narrows another dtype
        return np.asarray(apply(params, images, method="features"))

    def logits(features: np.ndarray) -> np.ndarray:
        return np.asarray(apply(params, features, method="logits"))

    return Encoder(f"CIFAR-10 ResNet-{depth}", digest, features, logits, resnet.NUM_FEATURES)


@jax.jit
def _features(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Compiled apart from the resize, so that images of any size share one network."""
    output = inception.InceptionV3().apply(params, x)
    return cast(inception.InceptionOutput, output).features


_logits = jax.jit(inception.unbiased_logits)


def _checked_digest(path: Path, sha256: str | None, source: str) -> str:
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
        raise ValueError(
            f"sha256 must be 8 to 64 hexadecimal digits, a hash or its beginning; got {sha256!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. {source}")
    digest = hash_file(path)
    if sha256 is not None and not digest.startswith(sha256.lower()):
        raise ValueError(
            f"{path} must have the SHA-256 {sha256.lower()}{'...' if len(sha256) < 64 else ''}; "
            f"got {digest}. Fetch the file anew, or pass its own hash if it is another on purpose."
        )
    return digest
