"""The images of a run: which data set its flags name, read when they are first asked for."""

import functools
import pathlib
from typing import Any, NamedTuple

import numpy as np

from fmjax import data
from fmjax.tasks.facts import known_or
from fmjax.training import digests

_FACTS = frozenset({"event_shape", "num_levels", "num_classes", "num_examples", "sha256"})
_OWN = {"folder": "folder", "npz": "file"}


class Images(NamedTuple):
    """Images `[batch, height, width, channel]`, uint8, and their classes `[batch]` or None."""

    images: Any
    labels: Any


class Pictures:
    """The images that a run's flags name.

    What they are (`facts`) a finished run knows from its folder: to draw from it takes no data.

    Args:
      config: an `ImageConfig`.

    Raises:
      ValueError: by the attributes, as `load` does.
    """

    def __init__(self, config: Any):
        self._config = config

    @functools.cached_property
    def train(self) -> data.ImageDataset:
        """The images that are trained on."""
        return load(self._config, self._config.train_split)

    @functools.cached_property
    def held_out(self) -> data.ImageDataset:
        """The images that are not."""
        return load(self._config, self._config.eval_split)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """`describe` of the images that are trained on."""
        return known_or(self._config.known, _FACTS, lambda: describe(self.train))

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.facts["event_shape"])

    @property
    def num_levels(self) -> int:
        return self.facts["num_levels"]

    @property
    def num_classes(self) -> int:
        return self.facts["num_classes"]

    def batch(self, rows: np.ndarray) -> Images:
        """Rows of the images that are trained on, with labels for a conditional network alone."""
        return rows_of(self.train, rows, self._config.conditional)

    def held_out_batch(self, rows: np.ndarray) -> Images:
        return rows_of(self.held_out, rows, self._config.conditional)


def rows_of(dataset: data.ImageDataset, rows: np.ndarray, labelled: bool) -> Images:
    return Images(dataset.images[rows], dataset.labels[rows] if labelled else None)


def describe(dataset: data.ImageDataset) -> dict[str, Any]:
    """What a run folder keeps of its data: enough to draw from it, and to know the data again."""
    return {
        "event_shape": list(dataset.images.shape[1:]),
        "num_levels": dataset.num_levels,
        "num_classes": dataset.num_classes,
        "num_examples": len(dataset.images),
        "sha256": digests.hash_json(
            [digests.hash_array(dataset.images), digests.hash_array(dataset.labels)]
        ),
    }


def load(config: Any, split: str) -> data.ImageDataset:
    """The split of the run's data set, in memory.

    Raises:
      ValueError: as `data.load` and its likes do; for a folder without "folder:", and for what TFDS
        can't load.
    """
    kind, colon, path = config.dataset.partition(":")
    if config.image_size is not None and kind != "folder":
        raise ValueError(
            f"--image-size is for --dataset folder:PATH; got {config.image_size} and "
            f"{config.dataset}."
        )
    if config.dataset == "digits":
        return data.load_digits(split)
    if colon and kind in ("folder", "npz"):
        if not path:
            raise ValueError(
                f"--dataset {kind}: must name a {_OWN[kind]}; got none behind the colon."
            )
        if kind == "npz":
            return data.load_npz(path, split)
        return data.load_folder(path, split, image_size=config.image_size)
    try:
        return data.load(config.dataset, split, config.data_dir)
    except (ValueError, AssertionError, ImportError) as error:
        reason = _no_dataset(config.dataset, str(error).splitlines()[0])
        if reason is None:
            raise
        raise ValueError(
            '--dataset must be "digits", folder:PATH, npz:FILE or the TFDS name of an image data '
            f"set, such as mnist, fashion_mnist or cifar10; got {config.dataset}: {reason}"
        ) from error


def _no_dataset(name: str, said: str) -> str | None:
    """Why a name is no data set's, where TFDS or `fmjax.data` could make nothing of it."""
    foreign = said.startswith(("Parsing builder name", "Failed to construct"))  # in TFDS's words
    if pathlib.Path(name).expanduser().is_dir() and (foreign or said.startswith("name must be")):
        return f"that is a folder. Write folder:{name}"
    if pathlib.Path(name).expanduser().is_file():
        return f"that is a file. Arrays in an .npz file are npz:{name}"
    return f"TFDS says: {said}" if foreign else None
