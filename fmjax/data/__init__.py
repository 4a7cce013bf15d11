"""Data sets, their pixel values, tables, and the order of batches."""

from .images import ImageDataset as ImageDataset
from .images import load_digits as load_digits
from .order import batches as batches
from .own import load_folder as load_folder
from .own import load_npz as load_npz
from .random_access import from_source as from_source
from .random_access import read_rows as read_rows
from .tables import Table as Table
from .tables import load_table as load_table
from .tfds import load as load
