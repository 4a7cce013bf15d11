"""Labelled images in memory.

A data set is in the host's memory as uint8; `fmjax.data.pixels` makes real numbers of its values.
"""

from typing import NamedTuple

import numpy as np

from . import splits


class ImageDataset(NamedTuple):
    """Labelled images in the host's memory.

    Attributes:
      images: uint8 `[N, height, width, channel]`, contiguous.
      labels: int32 `[N]`, in 0..num_classes-1.
      num_classes: the number of classes.
      num_levels: the number of pixel values, which are 0..num_levels-1.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    num_levels: int = 256


def load_digits(split: str) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 17 levels: nothing to download.

    The division into 1,500 for training and 297 for testing is fixed and stratified: every class
    has the same share of both, to within one example. So has every slice from the start.

    Args:
      split: "train" or "test", with TFDS's slices: "train[:100]", "test[50%:]".

    Returns:
      Images `[N, 8, 8, 1]` with `num_levels` = 17.

    Raises:
      ValueError: for an unknown split or an empty slice.

    Example:
      >>> load_digits("train[:100]").images.shape
      (100, 8, 8, 1)
    """
    from sklearn import datasets  # heavy, and wanted here alone

    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    # An example's quantile within its class: sorted by it, classes come by turns.
    quantile = np.empty(len(labels))
    for label in range(10):
        members = order[labels[order] == label]
        quantile[members] = (np.arange(len(members)) + 0.5) / len(members)
    order = order[np.argsort(quantile[order], kind="stable")]
    rows = {"train": order[:1500], "test": order[1500:]}
    slices = splits.slices(split, {key: len(value) for key, value in rows.items()})
    chosen = np.concatenate([rows[key][s.start : s.stop] for key, s in slices])
    images = pixels[chosen].astype(np.uint8).reshape(-1, 8, 8, 1)
    return ImageDataset(images, labels[chosen].astype(np.int32), 10, num_levels=17)
