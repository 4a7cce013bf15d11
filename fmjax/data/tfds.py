"""Image data sets of TFDS, decoded once into memory, without TensorFlow."""

import difflib
import io
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import splits
from .images import ImageDataset

_CHUNK = 4096  # encoded examples held in memory while reading
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def load(name: str, split: str, data_dir: str | os.PathLike | None = None) -> ImageDataset:
    """Reads an image classification data set of TFDS into memory, without TensorFlow.

    cifar10, mnist and fashion_mnist are prepared on the way if need be (`fmjax.data.prepare`): from
    a download, where there is a network. Any other data set with fixed-size 8-bit images under
    "image" and classes under "label" is read if it is prepared in ArrayRecord format.

    Args:
      name: TFDS's name of the data set.
      split: in TFDS's notation: "train", "train[:1000]", "test[50%:]", "train[:90%]+test".
      data_dir: where prepared data sets live; None takes TFDS_DATA_DIR or TFDS's own default.

    Returns:
      The images and labels in TFDS's order.

    Raises:
      ValueError: for an unknown name or split, an empty slice, a data set of another kind, a
        prepared copy that can't be read at random, or labels outside the classes.
      FileNotFoundError: if the data set is neither prepared nor can be.

    Example:
      >>> load("cifar10", "train[:1000]").images.shape  # doctest: +SKIP
      (1000, 32, 32, 3)
    """
    builder = _builder(name, split, data_dir)
    lengths = {key: info.num_examples for key, info in builder.info.splits.items()}
    slices = splits.slices(split, lengths)
    features = builder.info.features
    _check_features(name, features)
    images, labels = [], []
    for example in itertools.chain.from_iterable(_read(builder, *rows) for rows in slices):
        images.append(_decode(example["image"], features["image"].shape[-1]))
        labels.append(example["label"])
    if len(shapes := {image.shape for image in images}) > 1:
        raise ValueError(f"{name} must have images of one size; got {sorted(shapes)[:3]} and more.")
    num_classes = features["label"].num_classes
    labels = _check_labels(f"{name}, {split}", np.asarray(labels, np.int32), num_classes)
    return ImageDataset(np.stack(images), labels, num_classes)


def _builder(name: str, split: str, data_dir: str | os.PathLike | None) -> Any:
    """TFDS's builder of a data set that is prepared, or is now."""
    import tensorflow_datasets as tfds

    from . import archives, prepare

    root = prepare.data_root(data_dir)
    if name in archives.SOURCES and not prepare.is_prepared(name, root):
        # A wrong split fails before the work.
        splits.slices(split, archives.SOURCES[name].num_examples)
        prepare.prepare(name, data_dir=root)
    try:
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(name, known, 1)
        fix = f"Did you mean {near[0]!r}?" if near else "tfds.list_builders() lists them."
        raise ValueError(f"name must be a TFDS data set's; got {name!r}. {fix}") from None
    if not (builder.data_path / "dataset_info.json").exists():
        raise ValueError(
            f"{name} must be prepared in {builder.data_path}; got nothing there. fmjax prepares "
            f"{', '.join(archives.SOURCES)}; for others use TFDS and TensorFlow: "
            f"tfds build {name} --file_format=array_record --data_dir={root}"
        )
    return builder


def _read(builder: Any, split: str, rows: range) -> Iterator[dict[str, Any]]:
    """Examples with their images still encoded. Decoding them here rather than in TFDS is faster.

    Without threads: pictures so small would keep them waiting for the GIL.
    """
    import tensorflow_datasets as tfds

    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise ValueError(
            f"{builder.name} must be prepared in ArrayRecord format; {builder.data_path} has "
            f"{builder.info.file_format}. Prepare it into another data_dir with "
            "--file_format=array_record."
        ) from error
    for start in range(0, len(rows), _CHUNK):
        yield from source.__getitems__(rows[start : start + _CHUNK])


def _decode(encoded: bytes, channels: int) -> np.ndarray:
    """PNG or JPEG bytes to uint8 `[height, width, channels]`."""
    from PIL import Image

    mode = _MODES[channels]
    with Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG")) as image:
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_features(name: str, features: Mapping[str, Any]) -> None:
    """Refuses what is no set of 8-bit images with classes."""
    image = features["image"] if "image" in features else None
    label = features["label"] if "label" in features else None
    shape = getattr(image, "shape", None) or (0,)
    if getattr(image, "np_dtype", None) != np.uint8 or shape[-1] not in _MODES:
        raise ValueError(f"{name} must have 8-bit images under 'image'; got {features}")
    if getattr(label, "num_classes", None) is None:
        raise ValueError(f"{name} must have classes under 'label'; got {features}")


def _check_labels(what: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}; got {labels.min()}..{labels.max()} in {what}."
            " TFDS marks examples without a label by -1: take another split."
        )
    return labels
