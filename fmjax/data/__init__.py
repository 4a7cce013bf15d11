"""Data sets, their pixel values, and the order of batches."""

from .tfds import ImageDataset as ImageDataset
from .tfds import batches as batches
from .tfds import load as load
from .tfds import load_digits as load_digits
