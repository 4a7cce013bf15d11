"""Tables of one's own: rows of real numbers in a .npz, .csv, .tsv or .txt file.

Values are kept in float64, for a column like 1e9 + noise would lose its noise in float32.
`fmjax.inference.fit_standardizer` of the training rows brings them to float32 without that loss.

Where nobody has said which rows are for testing, a tenth is: those with a small draw of a seeded
generator, a draw for each row in turn, so that rows added later leave the others where they are.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import splits
from .columns import Columns, Rows, open_npz
from .delimited import open_text

TEST_SHARE = 0.1
_READERS = {".npz": open_npz, ".csv": open_text, ".tsv": open_text, ".txt": open_text}


class Table(NamedTuple):
    """Rows of real numbers in the host's memory.

    Attributes:
      x: what is modelled, float64 `[num, D]`.
      conditions: what is given, float64 `[num, C]`, or None.
      names: of the columns of `x`.
      condition_names: of the columns of `conditions`.
    """

    x: np.ndarray
    conditions: np.ndarray | None
    names: tuple[str, ...]
    condition_names: tuple[str, ...]


def load_table(
    path: str | os.PathLike,
    split: str = "train",
    *,
    columns: Sequence[str] | None = None,
    conditions: Sequence[str] = (),
    seed: int = 0,
) -> Table:
    """Reads a table of real numbers into memory, without pandas and without pickle.

    A text file has one row a line, its cells between tabs, semicolons, commas or spaces, and
    perhaps a first line of names; without one the columns are x_0, x_1 and so on. A .npz file holds
    arrays `[num]`, a column each, or `[num, D]`, the columns NAME_0, NAME_1 and so on; or just the
    arrays `train` and `test`, which are the splits. Else a tenth of the rows is "test".

    Args:
      path: the file.
      split: "train" or "test", with TFDS's slices: "train[:1000]", "train[:90%]+test".
      columns: names of the columns of `x`, in this order, or of arrays of several; None takes all
        that are not in `conditions`. Columns that nobody asks for aren't checked.
      conditions: names of the columns that are given and not modelled.
      seed: of what is held out, and of the order.

    Returns:
      The rows in a fixed order that mixes them, so that a slice is a random sample.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for another suffix; a file that is empty or can't be read; names that the file
        lacks or that come twice; no column left to model; text, booleans or complex numbers; lines
        of unequal length; a cell that is missing, not finite, or beyond float32; fewer than two
        rows to train on; a column that is constant over the training rows; an unknown split or an
        empty slice. Each names the file and, where there is one, the row and the column.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp()) / "points.csv"
      >>> _ = file.write_text("a,b,c\\n" + "".join(f"{k},{k * k},{-k}\\n" for k in range(50)))
      >>> table = load_table(file, "train[:20]", conditions=["c"])
      >>> table.x.shape, table.names, table.condition_names
      ((20, 2), ('a', 'b'), ('c',))
    """
    if seed < 0:
        raise ValueError(f"seed can't be negative; got {seed}.")
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.exists() else "does not exist"
        raise FileNotFoundError(f"There is no file {file} with a table: it {what}.")
    if file.suffix.lower() not in _READERS:
        raise ValueError(
            f"A table's file must end in {', '.join(_READERS)}; got {file}. Rename text with a "
            "delimiter to .csv; numpy.savez writes arrays as .npz."
        )
    source = _READERS[file.suffix.lower()](file)
    modelled, given = _chosen(file, source, columns, conditions)
    names = [source.names[number] for number in modelled + given]
    parts = source.read(modelled + given)
    for rows in parts.values():
        _check_cells(file, names, rows)
    rows = _division(parts, seed)
    values = np.concatenate([part.values for part in parts.values()])
    _check_training(file, names, values[rows["train"]], "train" in parts)
    values = values[splits.mixed(split, rows, seed)]
    return Table(
        np.ascontiguousarray(values[:, : len(modelled)]),
        np.ascontiguousarray(values[:, len(modelled) :]) if given else None,
        tuple(names[: len(modelled)]),
        tuple(names[len(modelled) :]),
    )


def _chosen(
    file: Path, source: Columns, columns: Sequence[str] | None, conditions: Sequence[str]
) -> tuple[list[int], list[int]]:
    """The numbers of the columns to model, and of those that are given."""
    names = source.names
    twice = next((name for k, name in enumerate(names) if name and name in names[:k]), None)
    if twice is not None:
        places = [str(k + 1) for k, name in enumerate(names) if name == twice]
        raise ValueError(
            f"{file}: columns must have different names; {twice!r} is that of columns "
            f"{' and '.join(places)}. Rename them."
        )
    given = _numbers(file, source, "conditions", conditions)
    if columns is None:
        for why in source.refused.values():
            raise ValueError(f"{file}: {why}")
        modelled = [number for number in range(len(source.names)) if number not in given]
        if "" in (unnamed := [source.names[number] for number in modelled]):
            number = modelled[unnamed.index("")] + 1
            raise ValueError(
                f"{file}: all columns must have names; column {number} has none. Name it, or "
                "choose the others by `columns`; pandas leaves its index out with "
                "to_csv(index=False)."
            )
    else:
        modelled = _numbers(file, source, "columns", columns)
    both = [source.names[number] for number in modelled if number in given]
    if both:
        raise ValueError(
            f"{file}: a column is modelled or given, not both; got {both[0]!r} in `columns` and in "
            "`conditions`. Take it out of one."
        )
    if not modelled:
        got = "all of them are conditions" if given else "none"
        raise ValueError(f"{file}: a column must be left to model; got {got}.")
    return modelled, given


def _numbers(file: Path, source: Columns, what: str, names: Any) -> list[int]:
    """The numbers of the columns with these names, an array's name standing for all of its."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what} must be a list of names; got {names!r}. Write {what}=['a', 'b'].")
    found = []
    for name in names:
        if name in source.refused:
            raise ValueError(f"{file}: {source.refused[name]}")
        members = source.groups.get(name, [name])
        if not name or not {*members} <= {*source.names}:
            known = [*dict.fromkeys([*source.groups, *source.names])]
            near = difflib.get_close_matches(name, known, 1)
            fix = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{file}: {what} must be of the columns {', '.join(filter(None, known))}; got "
                f"{name!r}.{fix}"
            )
        found += [source.names.index(member) for member in members]
    twice = next((number for k, number in enumerate(found) if number in found[:k]), None)
    if twice is not None:
        raise ValueError(
            f"{file}: {what} must be different; got {source.names[twice]!r} twice. Take one out."
        )
    return found


def _check_cells(file: Path, names: Sequence[str], rows: Rows) -> None:
    """Refuses cells that are missing, not finite or beyond float32: how many, and the first."""
    finite = np.isfinite(rows.values)
    bad, rule = ~finite, "finite numbers"
    what, fix = "missing, NaN or infinite", "Fill it in, or remove its row."
    if finite.all():
        bad, rule = np.abs(rows.values) > np.finfo(np.float32).max, "within float32, 3.4e38"
        what, fix = "beyond it", "Measure the column in another unit."
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"{file}, {rows.place(int(row))}, column {names[column]!r}: cells must be {rule}; got "
            f"{rows.values[row, column]:g}, the first of {bad.sum()} that are {what}. {fix}"
        )


def _division(parts: Mapping[str, Rows], seed: int) -> dict[str, np.ndarray]:
    """The rows of "train" and "test": the file's own parts, or a tenth of all for testing."""
    if "train" in parts:
        num = len(parts["train"].values)
        return {"train": np.arange(num), "test": np.arange(num, num + len(parts["test"].values))}
    return hold_out(len(parts[""].values), seed)


def hold_out(num: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers, a tenth for testing: at least one of three or more, and two to train on."""
    place = np.random.default_rng([seed, 2]).random(num)  # 0 and 1 are of the order of the splits
    test = place < TEST_SHARE
    if num < 3:
        test[:] = False
    elif not 0 < test.sum() <= num - 2:
        test = place == place.min()
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}


def _check_training(file: Path, names: Sequence[str], values: np.ndarray, is_array: bool) -> None:
    """Refuses fewer than two rows, and a column whose values are all the same."""
    if len(values) < 2:
        where = "array train" if is_array else "the file"
        raise ValueError(
            f"{file}: a table must have two rows or more to train on; {where} has {len(values)}."
        )
    constant = np.flatnonzero(values.min(0) == values.max(0))
    if len(constant):
        more = f" and {len(constant) - 1} more" if len(constant) > 1 else ""
        raise ValueError(
            f"{file}, column {names[constant[0]]!r}{more}: a column must vary over the training "
            f"rows, or it has no density; all are {values[0, constant[0]]:g}. Leave it out by "
            "`columns`."
        )
