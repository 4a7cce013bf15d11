"""Named columns of numbers in a text file, one row a line: CSV and its kin."""

import array
import csv
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .columns import Columns, Rows

MISSING = ("", "NA", "N/A", "#N/A", "null", "NULL", "?")  # float() reads "nan" in any case
_DELIMITERS = ("\t", ";", ",")


def open_text(file: Path) -> Columns:
    """The columns of a text file: numbers with a tab, semicolon, comma or spaces between them.

    The first line holds the columns' names if none of its cells is a number, or if it starts with
    a "#"; else the columns are x_0, x_1 and so on. Blank lines are passed over. A cell is missing
    if it is empty, "NA", "nan" or the like.

    Raises:
      ValueError: if the file is empty, or no UTF-8 text; if its first line has names and numbers;
        from `read`, for a line with another number of cells, or text in a cell.
    """
    delimiter = _delimiter(file)
    line, first, commented = next(_lines(file, delimiter), (0, [], False))
    first = [cell.strip() for cell in first]
    if not first:
        raise ValueError(f"{file} must hold rows of numbers; it is empty.")
    text = [cell for cell in first if _number(cell) is None]
    numbers = [cell for cell in first if cell not in MISSING and cell not in text]
    if text and numbers and not commented:
        raise ValueError(
            f"{file}, line {line}: the first line must be names or numbers; got "
            f"{text[0]!r:.40} in column {first.index(text[0]) + 1} and {numbers[0]!r:.40} in "
            f"column {first.index(numbers[0]) + 1}. Rename the column or correct the cell."
        )
    headed = bool(text) or commented
    names = first if headed else [f"x_{k}" for k in range(len(first))]

    def read(chosen: Sequence[int]) -> dict[str, Rows]:
        return {"": _read_text(file, delimiter, names, chosen, int(headed))}

    return Columns(names, {}, {}, read)


def _read_text(
    file: Path, delimiter: str | None, names: list[str], chosen: Sequence[int], skip: int
) -> Rows:
    values, places = array.array("d"), array.array("q")
    pick = operator.itemgetter(*chosen) if len(chosen) > 1 else lambda cells: (cells[chosen[0]],)
    for line, cells, _ in itertools.islice(_lines(file, delimiter), skip, None):
        if len(cells) != len(names):
            raise ValueError(
                f"{file}, line {line}: every line must have as many cells as the first, "
                f"{len(names)}; got {len(cells)}. Complete the line, or quote a cell with the "
                "delimiter in it."
            )
        numbers = _numbers(pick(cells))
        if None in numbers:
            column = chosen[numbers.index(None)]
            comma = re.fullmatch(r"\s*[-+]?\d+,\d+\s*", cells[column])
            fix = "Number its values, or leave the column out by `columns`."
            raise ValueError(
                f"{file}, line {line}, column {names[column]!r}: cells must be numbers; got "
                f"{cells[column].strip()!r:.40}. {'Write a decimal point.' if comma else fix}"
            )
        values.extend(numbers)
        places.append(line)
    table = np.frombuffer(values, np.float64) if values else np.zeros(0)
    return Rows(table.reshape(-1, len(chosen)), lambda row: f"line {places[row]}")


def _numbers(cells: Sequence[str]) -> list[Any]:
    """`_number` of every cell, faster where all are numbers."""
    try:
        if "_" not in "".join(cells):
            return [*map(float, cells)]
    except ValueError:
        pass
    return [_number(cell.strip()) for cell in cells]


def _number(cell: str) -> float | None:
    """A cell's number, NaN if it is missing, None if it is text."""
    try:
        return float(cell) if "_" not in cell else None  # float() reads "1_0" as 10
    except ValueError:
        return np.nan if cell in MISSING else None


def _lines(file: Path, delimiter: str | None) -> Iterator[tuple[int, list[str], bool]]:
    """Each line that isn't blank: its number from 1, its cells, and whether "#" is before them."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            commented = handle.read(1) == "#"
            if not commented:
                handle.seek(0)
            for k, (line, cells) in enumerate(_cells(handle, delimiter)):
                if len(cells) > 1 or any(map(str.strip, cells)):
                    yield line, cells, commented and k == 0
    except UnicodeDecodeError:
        raise ValueError(f"{file} must be UTF-8 text; got other bytes. Save it as UTF-8.") from None
    except csv.Error as error:
        raise ValueError(f"{file} must be text with a delimiter; got {error}.") from None


def _cells(handle: TextIO, delimiter: str | None) -> Iterator[tuple[int, list[str]]]:
    if delimiter is None:
        yield from ((number, line.split()) for number, line in enumerate(handle, 1))
    else:
        reader = csv.reader(handle, delimiter=delimiter, skipinitialspace=True)
        for cells in reader:
            yield reader.line_num, cells


def _delimiter(file: Path) -> str | None:
    """The first of tab, semicolon and comma that cuts the first lines alike; None for spaces."""
    found = []
    for delimiter in _DELIMITERS:
        widths = [len(cells) for _, cells, _ in itertools.islice(_lines(file, delimiter), 5)]
        if widths and widths[0] > 1:
            found.append((len({*widths}) > 1, delimiter))
    return min(found, key=operator.itemgetter(0))[1] if found else None
