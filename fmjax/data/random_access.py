"""Batches from data that is larger than memory: whatever has a length and gives a row by number.

A NumPy memory map, an ArrayRecord data source, a Grain data set and `tfds.data_source` are such
sources. A batch reads just its rows, each once and in the order in which the source has them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

Decode = Callable[[Any], Any]


def from_source(source: Any, decode: Decode | None = None) -> Callable[[np.ndarray], Any]:
    """A batch function of a source with random access.

    Args:
      source: has `len(source)` and `source[row]`; `source.__getitems__(rows)` is called instead
        where there is one. Or a dict of sources of equal length: a record is then a dict too.
      decode: makes a pytree of arrays or numbers of a record; None if records are such.

    Returns:
      `batch(rows)`: int rows `[num]`, in any order and repeated if wanted, -> the pytree of the
      records, its leaves `[num, ...]`, as `read_rows` gives it.

    Raises:
      ValueError: for a source without a length or without rows, such as an iterator; a .npz file,
        whose arrays can't be read in part; sources of unequal length in a dict.

    Example:
      >>> images = np.arange(20).reshape(10, 2)  # or np.load("images.npy", mmap_mode="r")
      >>> batch = from_source({"image": images, "label": np.arange(10)})
      >>> batch(np.array([7, 0, 7]))["image"].tolist()
      [[14, 15], [0, 1], [14, 15]]
    """
    _length(source)
    return lambda rows: read_rows(source, rows, decode)


def read_rows(source: Any, rows: Any, decode: Decode | None = None) -> Any:
    """Rows of a source with random access, stacked.

    Args:
      source: as `from_source` takes it.
      rows: int `[num]`, from 0 to below the source's length, in any order, repeated if wanted. The
        source is asked for each once, in ascending order.
      decode: makes a pytree of arrays or numbers of a record; None if records are such.

    Returns:
      The pytree of the records, with the dtypes that they have; its leaves `[num, ...]`.

    Raises:
      ValueError: as `from_source` does; for rows of another kind or out of range; where `decode`
        raises, which is its cause; for records that aren't of numbers, or that differ in structure,
        shape or dtype. The row is named.

    Example:
      >>> read_rows([b"ab", b"cd", b"ef"], [2, 0], lambda record: np.frombuffer(record, np.uint8))
      array([[101, 102],
             [ 97,  98]], dtype=uint8)
    """
    rows = _checked(rows, _length(source))
    unique, inverse = np.unique(rows, return_inverse=True)
    records: Any = _fetch(source, unique)
    if decode is None and isinstance(source, np.ndarray):
        _check_numbers(records, "an array")
        stacked = records
    else:
        stacked = _stack(records, unique.tolist(), decode)
    if np.array_equal(rows, unique):
        return stacked
    return jax.tree.map(lambda x: x[inverse], stacked)


def _length(source: Any) -> int:
    """The number of rows of a source, and of all in a dict."""
    if isinstance(source, np.lib.npyio.NpzFile):
        raise ValueError(
            "source must be able to read single rows; got a .npz file, of which NumPy reads whole "
            "arrays. Save each as .npy and give np.load(file, mmap_mode='r')."
        )
    if isinstance(source, Mapping):
        lengths = {name: _length(part) for name, part in source.items()}
        if len({*lengths.values()}) != 1:
            raise ValueError(f"sources of a dict must have one length; got {lengths}.")
        return next(iter(lengths.values()))
    random = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if not random or getattr(source, "shape", None) == ():
        raise ValueError(
            f"source must have len(source) and source[row]; got {type(source).__name__}. What can "
            "only be iterated over has no random access: write it to .npy or ArrayRecord first."
        )
    return len(source)


def _checked(rows: Any, num: int) -> np.ndarray:
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size:
        raise ValueError(
            f"rows must be whole numbers [num], one or more; got {rows.dtype} {rows.shape}."
        )
    out = rows[(rows < 0) | (rows >= num)]
    if out.size:
        raise ValueError(
            f"rows must be from 0 to {num - 1}, for the source has {num}; got {out[0]}. Is the "
            "number of examples that of this source?"
        )
    return rows


def _fetch(source: Any, rows: np.ndarray) -> Any:
    """The records of ascending rows; those of an array as one array, which is no view."""
    if isinstance(source, Mapping):
        parts = {name: _fetch(part, rows) for name, part in source.items()}
        return [{name: part[k] for name, part in parts.items()} for k in range(len(rows))]
    if isinstance(source, np.ndarray):
        return np.asarray(source[rows])
    numbers = rows.tolist()  # ArrayRecord and Grain want Python's own
    if not hasattr(source, "__getitems__"):
        return [source[number] for number in numbers]
    records = source.__getitems__(numbers)
    if len(records) != len(numbers):
        raise ValueError(
            f"source.__getitems__ must return a record for each row; got {len(records)} for "
            f"{len(numbers)} rows."
        )
    return records


def _stack(records: Sequence[Any], rows: Sequence[int], decode: Decode | None) -> Any:
    decoded = [_decoded(record, row, decode) for record, row in zip(records, rows, strict=True)]
    like = [jax.tree.map(lambda x: (x.shape, x.dtype.name), record) for record in decoded]
    for row, kind in zip(rows, like, strict=True):
        if kind != like[0]:
            raise ValueError(
                f"Records must have one structure, shape and dtype; row {row} has {kind} and row "
                f"{rows[0]} {like[0]}. Bring them to one by `decode`."
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *decoded)


def _decoded(record: Any, row: int, decode: Decode | None) -> Any:
    """A record as a pytree of arrays."""
    try:
        value = record if decode is None else decode(record)
    except Exception as error:
        raise ValueError(
            f"decode must read every record; it raised {type(error).__name__} at row {row}: {error}"
        ) from error
    leaves, tree = jax.tree.flatten(value)
    if not leaves:
        raise ValueError(f"Records must hold arrays; that of row {row} is {value!r:.40}.")
    arrays = [np.asarray(leaf) for leaf in leaves]
    for array in arrays:
        _check_numbers(array, f"that of row {row}")
    return jax.tree.unflatten(tree, arrays)


def _check_numbers(array: np.ndarray, what: str) -> None:
    if array.dtype.kind in "OSUMm":
        raise ValueError(
            f"Records must be of numbers; {what} holds {array.dtype}. Make numbers of it, or drop "
            "it, by `decode`."
        )
