"""Data sets, their pixel values, and the order of batches."""

from .images import ImageDataset as ImageDataset
from .images import load_digits as load_digits
from .order import batches as batches
from .tfds import load as load
