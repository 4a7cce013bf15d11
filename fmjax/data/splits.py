"""TFDS's notation of splits, "train[:90%]+test", read without TFDS."""

import re
from collections.abc import Mapping


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


def _bound(text: str | None, n: int, end: int) -> int:
    if text is None:
        return end
    value = round(int(text[:-1]) * n / 100) if text.endswith("%") else int(text)
    return value + n if value < 0 else value
