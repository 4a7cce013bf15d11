"""Features and moments of a data set's split under an encoder: computed once, stored, reused.

A reference is two files, DATASET_KEY.npz with the arrays and DATASET_KEY.json with their record.
The key is a hash of all that the features depend on: the data set, the split, the images' bytes,
the encoder's name (which says the protocol) and its weights. Another encoder or other images give
another file. The record is written last and holds the SHA-256 of the arrays' file: a reference
without a record is incomplete and is computed again; one that disagrees with its record is an
error.
"""

import json
import pathlib
import re
import zipfile
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fmjax.files import hash_file
from fmjax.harness.progress import progress
from fmjax.harness.records import make_folder, write_json, write_whole, writing
from fmjax.metrics import Moments, moments
from fmjax.metrics.encoders import Encoder
from fmjax.training import digests

_KEYS = frozenset({"encoder", "encoder_digest", "arrays_sha256"})


class Reference(NamedTuple):
    """What generated images are compared with.

    Attributes:
      features: `[N, D]`, float32, in the order of the images.
      moments: their mean and covariance, float64.
      record: which data set, split, images and encoder; what stands in the JSON file.
    """

    features: np.ndarray
    moments: Moments
    record: dict[str, Any]


def load_or_compute(
    folder: pathlib.Path,
    encoder: Encoder,
    dataset_name: str,
    split: str,
    images: np.ndarray,
    *,
    batch_size: int,
) -> Reference:
    """The reference of `images` under `encoder`, from `folder` if it was computed before.

    Args:
      folder: where references are kept, made if absent; it may be shared by many runs.
      encoder: the encoder.
      dataset_name: the data set's name.
      split: in TFDS's notation.
      images: uint8 `[N, height, width, channel]`, N at least 2.
      batch_size: images per call of the encoder, all of one shape.

    Returns:
      The `Reference`, a stored one to the bit.

    Raises:
      ValueError: if a stored file is damaged (the message names it), the folder can't be written,
        or the images or the encoder's features are not what they must be.

    Example:
      >>> digits = data.load_digits("train")  # doctest: +SKIP
      >>> load_or_compute(
      ...     folder, encoder, "digits", "train", digits.images, batch_size=500
      ... ).features.shape  # doctest: +SKIP
      (1500, 64)
    """
    identity = identify(encoder, dataset_name, split, images)
    key = digests.hash_json(identity)[:16]
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', dataset_name)}_{key}.npz"
    if path.with_suffix(".json").exists():
        reference = load(path, encoder)
        _check_identity(path, reference.record, identity)
        return reference
    make_folder(folder)  # before the long work
    description = f"features of {dataset_name} {split}"
    features = encode(encoder, images, batch_size=batch_size, description=description)
    return _store(path, features, identity)


def load(path: pathlib.Path, encoder: Encoder) -> Reference:
    """Reads a stored reference and makes sure that it is complete and of this encoder.

    Args:
      path: the .npz file; its record is next to it.
      encoder: the encoder that it is to be compared under.

    Returns:
      The `Reference`.

    Raises:
      FileNotFoundError: if a file is not there.
      ValueError: if a file is damaged, or was made by another encoder or protocol.

    Example:
      >>> load(folder / "digits_0123456789abcdef.npz", encoder)  # doctest: +SKIP
    """
    record = _read_record(path)
    theirs, ours = (record["encoder"], record["encoder_digest"]), (encoder.name, encoder.digest)
    if theirs != ours:
        raise ValueError(
            "Features of two encoders or protocols can't be compared; "
            f"{path} holds statistics of {theirs[0]} (SHA-256 {theirs[1][:12]}...); got "
            f"{ours[0]} ({ours[1][:12]}...). Take that encoder, or compute the statistics anew."
        )
    if (digest := hash_file(path)) != record["arrays_sha256"]:
        raise _damaged(path, f"its SHA-256 is {digest}, its record says {record['arrays_sha256']}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, mean, covariance = (arrays[k] for k in ("features", "mean", "covariance"))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise _damaged(path, str(error)) from error
    return Reference(features, Moments(len(features), mean, covariance), record)


def encode(
    encoder: Encoder, images: np.ndarray, *, batch_size: int, description: str = "features"
) -> np.ndarray:
    """Features of images in batches of one shape, with a progress bar.

    Args:
      encoder: the encoder.
      images: uint8 `[N, height, width, channel]`.
      batch_size: images per call. A short last batch is filled up, so that one shape is compiled.
      description: what the progress bar says.

    Returns:
      float32 `[N, encoder.num_features]`.

    Raises:
      ValueError: for images of another kind, or features of another shape or not finite.
    """
    _check_images(images)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    num, size = len(images), min(batch_size, len(images))
    features = np.empty((num, encoder.num_features), np.float32)
    with progress(label=description, total=num, unit="image") as bar:
        for start in range(0, num, size):
            rows = np.arange(start, start + size) % num
            batch = _checked(encoder, encoder.features(images[rows]), size)
            stop = min(start + size, num)
            features[start:stop] = batch[: stop - start]
            bar.update(stop - start)
    return features


def identify(encoder: Encoder, dataset_name: str, split: str, images: np.ndarray) -> dict[str, Any]:
    """All that a reference depends on, as JSON can hold it.

    Raises:
      ValueError: if `images` are not uint8 `[N, height, width, channel]`.
    """
    _check_images(images)
    return {
        "dataset": dataset_name,
        "split": split,
        "num_images": len(images),
        "image_shape": list(images.shape[1:]),
        "images_sha256": digests.hash_array(images),
        "encoder": encoder.name,
        "encoder_digest": encoder.digest,
        "num_features": encoder.num_features,
    }


def _store(path: pathlib.Path, features: np.ndarray, identity: dict[str, Any]) -> Reference:
    fitted = moments(features)

    def write(file: BinaryIO) -> None:
        np.savez(file, features=features, mean=fitted.mean, covariance=fitted.covariance)

    with writing(path.parent, lambda: "the features are computed again"):
        write_whole(path, write)
        record = identity | {"arrays_sha256": hash_file(path)}
        write_json(path.with_suffix(".json"), record)
    return Reference(features, fitted, record)


def _read_record(path: pathlib.Path) -> dict[str, Any]:
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(
                f"A reference is an .npz file and a .json record of one name; {file} is not there. "
                "Delete what is left of it, and it is computed again."
            )
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except ValueError as error:
        raise _damaged(path.with_suffix(".json"), str(error)) from error
    if not isinstance(record, dict) or not record.keys() >= _KEYS:
        raise _damaged(path.with_suffix(".json"), f"it must have {', '.join(sorted(_KEYS))}")
    return record


def _check_identity(path: pathlib.Path, record: dict[str, Any], identity: dict[str, Any]) -> None:
    """A file's name is a hash of its record, unless someone has changed either."""
    wrong = [name for name, value in identity.items() if record.get(name) != value]
    if wrong:
        raise _damaged(path.with_suffix(".json"), f"{', '.join(wrong)} don't fit the file's name")


def _checked(encoder: Encoder, features: np.ndarray, num: int) -> np.ndarray:
    finite, shape = bool(np.isfinite(features).all()), (num, encoder.num_features)
    if features.shape != shape or not finite:
        raise ValueError(
            f"An encoder must give finite features of shape {shape}; {encoder.name} gave "
            f"{features.shape}{'' if finite else ', some not finite'}."
        )
    return features


def _check_images(images: np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise ValueError(
            "images must be uint8 [N, height, width, channel], one at least; got "
            f"{images.dtype} {list(images.shape)}. fmjax.data.pixels.quantize makes pixel values."
        )


def _damaged(path: pathlib.Path, what: str) -> ValueError:
    both = f"{path.with_suffix('.npz')} and {path.with_suffix('.json').name}"
    return ValueError(f"{path} is damaged: {what}. Delete {both}; they are computed again.")
