"""TFDS's notation of splits, "train[:90%]+test", read without TFDS."""

import re
from collections.abc import Mapping, Sequence

import numpy as np


def slices(split: str, lengths: Mapping[str, int]) -> list[tuple[str, range]]:
    """A split in TFDS's notation as (name, rows); percentages go to the nearest example."""
    found = []
    for part in re.split(r"\s*\+\s*", split.strip()):
        bound = r"(-?\d+%?)?"
        match = re.fullmatch(rf"([\w-]+)(?:\[{bound}:{bound}\])?", part)
        if match is None:
            raise ValueError(
                f"split must read like 'train', 'train[:1000]', 'test[50%:]' or "
                f"'train[:90%]+test'; got {split!r}."
            )
        name, *bounds = match.groups()
        if name not in lengths:
            raise ValueError(f"split must be one of {', '.join(lengths)}; got {name!r}.")
        n = lengths[name]
        start, stop = (_bound(text, n, end) for text, end in zip(bounds, (0, n), strict=True))
        if not 0 <= start < stop <= n:
            raise ValueError(
                f"a slice must hold examples, from 0 to at most the {n} of {name!r}; got "
                f"{part!r}, that is {start} to {stop}."
            )
        found.append((name, range(start, stop)))
    return found


def mixed(split: str, rows: Mapping[str, Sequence[int] | np.ndarray], seed: int) -> np.ndarray:
    """The rows of a split in a fixed order that mixes them, so that a slice has some of all.

    Args:
      split: in TFDS's notation.
      rows: the row numbers of each split.
      seed: of the order.
    """
    order = {
        name: np.random.default_rng([seed, k]).permutation(np.array(those, np.int64))
        for k, (name, those) in enumerate(rows.items())
    }
    parts = slices(split, {name: len(those) for name, those in order.items()})
    return np.concatenate([order[name][part.start : part.stop] for name, part in parts])


def _bound(text: str | None, n: int, end: int) -> int:
    if text is None:
        return end
    value = round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)
    return value + n if value < 0 else value
