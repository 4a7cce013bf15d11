"""The network of `fmjax.evaluation.encoder`, its files, and how they become an `Encoder`.

Pixels enter as x = 2 (v + 1/2) / num_levels - 1. Convolutions, each with GroupNorm and SiLU, are
averaged over the image; a dense layer and SiLU make the features, a last dense layer the logits.
No layer mixes the images of a batch, and the activations are smooth.

A folder holds encoder.safetensors, the parameters under their names in the Flax tree, joined by
"/", and encoder.json, their record with the weights' SHA-256. The record is written last: with it
the encoder is complete.
"""

import json
import pathlib
import shlex
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fmjax.files import hash_bytes
from fmjax.harness.records import write_json, write_whole, writing
from fmjax.metrics.encoders import Encoder
from fmjax.training import digests

_KEYS = frozenset({"name", "dataset", "config", "network", "image_shape", "sha256"})


class Classifier(nn.Module):
    """uint8 images `[batch, height, width, channel]` -> logits `[batch, num_classes]`.

    Attributes:
      num_classes: the number of classes.
      num_levels: the number of pixel values.
      strides: of each convolution.
      widths: channels of each convolution, multiples of 8.
      num_features: length of a feature vector.
    """

    num_classes: int
    num_levels: int
    strides: tuple[int, ...]
    widths: tuple[int, ...] = (32, 64, 64, 64)
    num_features: int = 64

    def setup(self) -> None:
        exact = jax.lax.Precision.HIGHEST  # an accelerator's default rounds factors to TF32 or less
        self.convs = [
            nn.Conv(width, (3, 3), strides=stride, precision=exact)
            for width, stride in zip(self.widths, self.strides, strict=True)
        ]
        self.norms = [nn.GroupNorm(num_groups=8) for _ in self.widths]
        self.hidden = nn.Dense(self.num_features, precision=exact)
        self.head = nn.Dense(self.num_classes, precision=exact)

    def features(self, images: jax.Array) -> jax.Array:
        """float32 `[batch, num_features]`."""
        x = (2 * images.astype(jnp.float32) + 1) / self.num_levels - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nn.silu(norm(conv(x)))
        return nn.silu(self.hidden(jnp.mean(x, axis=(1, 2))))

    def logits(self, features: jax.Array) -> jax.Array:
        """`[batch, num_classes]`."""
        return self.head(features)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.logits(self.features(images))


def network(model: Classifier) -> dict[str, Any]:
    """The attributes of a classifier, as the record keeps them."""
    names = ("num_classes", "num_levels", "strides", "widths", "num_features")
    return {name: getattr(model, name) for name in names}


def as_encoder(
    model: Classifier, params: Any, image_shape: tuple[int, ...], *, name: str, digest: str
) -> Encoder:
    """The network as the metrics take it: NumPy in, NumPy out, images checked.

    Args:
      model: the network.
      params: its parameters.
      image_shape: `[height, width, channel]`.
      name: as it is written beside a figure.
      digest: SHA-256 of the weights' file.
    """
    params = jax.device_put(params)
    apply = jax.jit(model.apply, static_argnames="method")

    def features(images: np.ndarray) -> np.ndarray:
        _check_images(images, image_shape, model.num_levels)
        return np.asarray(apply(params, images, method="features"))

    def logits(features: np.ndarray) -> np.ndarray:
        return np.asarray(apply(params, features, method="logits"))

    return Encoder(name, digest, features, logits, model.num_features)


def to_bytes(params: Any) -> bytes:
    """The parameters as the bytes of a safetensors file; equal parameters give equal bytes."""
    flat = digests.named(params, "/")
    return safetensors.numpy.save({name: np.ascontiguousarray(x) for name, x in flat.items()})


def write(folder: pathlib.Path, weights: bytes, record: dict[str, Any]) -> None:
    """Writes both files by atomic writes, the record last."""
    with writing(folder, lambda: "the encoder is trained again"):
        write_whole(folder / "encoder.safetensors", lambda file: file.write(weights))
        write_json(folder / "encoder.json", record)


def load_encoder(folder: pathlib.Path) -> Encoder:
    """Reads an encoder that `python -m fmjax.evaluation.encoder` has written.

    Args:
      folder: it holds encoder.json and encoder.safetensors.

    Returns:
      An `Encoder` whose name says the data set and the accuracy. Its `features` takes uint8 images
      of the data set's size and levels, and raises a `ValueError` for others.

    Raises:
      FileNotFoundError: if the folder or a file is not there; the message has the command.
      ValueError: if a file is damaged, or the two are not of one encoder.

    Example:
      >>> load_encoder(pathlib.Path("runs/encoder_digits")).num_features  # doctest: +SKIP
      64
    """
    record, path = read_record(folder), folder / "encoder.safetensors"
    weights = _existing(path).read_bytes()
    digest = hash_bytes(weights)
    if digest != record["sha256"]:
        raise ValueError(
            f"{path} must have the SHA-256 that encoder.json records, {record['sha256']}; got "
            f"{digest}. It is truncated or changed: delete {folder} and make it anew by "
            f"{_command(folder, record['dataset'])}"
        )
    fields = record["network"]
    model = Classifier(**fields | {name: tuple(fields[name]) for name in ("strides", "widths")})
    image_shape = tuple(record["image_shape"])
    params = _as_params(folder, model, safetensors.numpy.load(weights), image_shape)
    return as_encoder(model, params, image_shape, name=record["name"], digest=digest)


def read_record(folder: pathlib.Path) -> dict[str, Any]:
    """What stands in a folder's encoder.json.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it is damaged.
    """
    path = _existing(folder / "encoder.json")
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        raise ValueError(
            f"{path} must be a JSON record with {', '.join(sorted(_KEYS))}; got something else. "
            f"Delete {folder} and make it anew by {_command(folder, 'DATASET')}"
        )
    return record


def _as_params(
    folder: pathlib.Path,
    model: Classifier,
    flat: dict[str, np.ndarray],
    image_shape: tuple[int, ...],
) -> Any:
    """The weights as the parameters of the network that the record describes."""
    images = jnp.zeros((1, *image_shape), jnp.uint8)
    fresh = jax.eval_shape(model.init, jax.random.key(0), images)
    wanted = {name: x.shape for name, x in digests.named(fresh, "/").items()}
    got = {name: x.shape for name, x in flat.items()}
    if wanted != got:
        differences = sorted(k for k in wanted | got if wanted.get(k) != got.get(k))
        raise ValueError(
            f"{folder}/encoder.json describes another network than encoder.safetensors holds: they "
            f"differ in {', '.join(differences)}. Delete the folder and make it anew."
        )
    return jax.tree.unflatten(jax.tree.structure(fresh), [flat[name] for name in wanted])


def _check_images(images: np.ndarray, shape: tuple[int, ...], num_levels: int) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
        raise ValueError(
            f"This encoder takes uint8 images [batch, {', '.join(map(str, shape))}]; got "
            f"{images.dtype} {list(images.shape)}. Take the encoder of the images' own data set; "
            "fmjax.data.pixels.quantize makes pixel values of floats."
        )
    if images.size and (largest := int(images.max())) >= num_levels:
        raise ValueError(
            f"This encoder takes pixel values in 0..{num_levels - 1}; got {largest}. Quantise the "
            "images to the levels of the encoder's data set."
        )


def _existing(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"An encoder's folder holds encoder.json and encoder.safetensors; {path} is not there. "
            f"Make one by {_command(path.parent, 'DATASET')}"
        )
    return path


def _command(folder: pathlib.Path, dataset: str) -> str:
    program = "python -m fmjax.evaluation.encoder"
    return f"{program} --dataset {dataset} --workdir {shlex.quote(str(folder))}"
