"""Named columns of numbers in a file, and those of the arrays in a .npz file.

A reader says first which columns there are, then reads as float64 those that are asked for.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Rows(NamedTuple):
    """Rows of numbers, and where each is in its file.

    Attributes:
      values: float64 `[num, len(names)]`; NaN where a cell is missing.
      place: row -> its place, for an error.
    """

    values: np.ndarray
    place: Callable[[int], str]


class Columns(NamedTuple):
    """The columns that a file holds.

    Attributes:
      names: of all columns, "" where one has no name.
      groups: the columns of an array that holds several, by the array's name.
      refused: why an array can't be read as columns, by its name.
      read: columns' numbers -> their rows; those of the file under "", or its "train" and "test".
    """

    names: list[str]
    groups: Mapping[str, list[str]]
    refused: Mapping[str, str]
    read: Callable[[Sequence[int]], dict[str, Rows]]


def open_npz(file: Path) -> Columns:
    """The columns of the arrays in a .npz file.

    Arrays are `[num]`, a column of the array's name, or `[num, D]`, columns NAME_0, NAME_1 and so
    on. Arrays `train` and `test` are the rows of the splits, their columns x_0, x_1 and so on.

    Raises:
      ValueError: if the file can't be read, holds no arrays, or an array of Python objects; if
        `train` or `test` is without the other, or beside a third.
    """
    arrays = _arrays(file)
    parts = [name for name in ("train", "test") if name in arrays]
    if parts and arrays.keys() != {"train", "test"}:
        raise ValueError(
            f"{file}: arrays train and test must come together and alone; got {', '.join(arrays)}. "
            "Rename or remove arrays."
        )
    refused = {name: why for name, x in arrays.items() if (why := _refusal(name, x))}
    for name in parts:
        if name in refused:
            raise ValueError(f"{file}: {refused[name]}")
    tables = {name: x[:, None] if x.ndim == 1 else x for name, x in arrays.items()}
    if parts:
        widths = [tables[name].shape[1] for name in parts]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{file}: train and test must have the same columns; got {widths[0]} and "
                f"{widths[1]}."
            )
        names = [f"x_{k}" for k in range(widths[0])]
        return Columns(names, {}, {}, lambda chosen: _parts(tables, chosen))
    groups = {
        name: [name] if x.ndim == 1 else [f"{name}_{k}" for k in range(x.shape[1])]
        for name, x in arrays.items()
        if name not in refused
    }
    owner = [(name, k) for name, members in groups.items() for k in range(len(members))]
    names = list(itertools.chain.from_iterable(groups.values()))

    def read(chosen: Sequence[int]) -> dict[str, Rows]:
        picked = [owner[number] for number in chosen]
        lengths = {name: len(tables[name]) for name, _ in picked}
        if len({*lengths.values()}) > 1:
            raise ValueError(
                f"{file}: arrays must have equally many rows; got "
                f"{', '.join(f'{name} {n}' for name, n in lengths.items())}. Choose `columns` of "
                "one length."
            )
        values = np.stack([tables[name][:, k].astype(np.float64) for name, k in picked], axis=1)
        return {"": Rows(values, lambda row: f"row {row}")}

    return Columns(names, groups, refused, read)


def _parts(tables: Mapping[str, np.ndarray], chosen: Sequence[int]) -> dict[str, Rows]:
    return {
        name: Rows(
            tables[name][:, list(chosen)].astype(np.float64), f"array {name}, row {{}}".format
        )
        for name in ("train", "test")
    }


def _arrays(file: Path) -> dict[str, Any]:
    name = None
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {}
            for name in archive.files:
                arrays[name] = np.asarray(archive[name])
    except Exception as error:  # a damaged archive raises one of many
        if name is not None and "allow_pickle" in str(error):
            raise ValueError(
                f"{file}: array {name} must be of numbers; got Python objects, which are not "
                "unpickled. Save it as float64."
            ) from None
        raise ValueError(
            f"{file} must be an .npz file of arrays, as numpy.savez writes it; got something else, "
            "or a damaged one."
        ) from None
    if not arrays:
        raise ValueError(f"{file} must hold arrays; it is empty.")
    return arrays


def _refusal(name: str, x: np.ndarray) -> str | None:
    """Why an array can't be read as columns, if so."""
    fixes = {
        "b": "Save it as uint8.",
        "c": "Save its real and imaginary parts.",
        "U": "Number its values, or leave it out by `columns`.",
    }
    if x.dtype.kind not in "iuf":
        fix = fixes.get("U" if x.dtype.kind == "S" else x.dtype.kind, "Save it as float64.")
        return f"array {name} must be of real numbers; got {x.dtype}. {fix}"
    if x.ndim not in (1, 2):
        fix = f"Reshape it to {(len(x), -1)}, or leave it out by `columns`." if x.ndim else ""
        return f"array {name} must be [num] or [num, D]; got {x.shape}. {fix}".rstrip()
    return None
