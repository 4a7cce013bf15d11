"""Which numbers a flag may have: what a command refuses before it loads or compiles anything."""

import dataclasses
import math
import numbers
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from etils import epath

# Without x64 jax.random.key drops the bits above: seed 2^32 would be seed 0.
NUM_SEEDS = 2**32


def check_numbers(
    config: Any,
    *,
    may_be_zero: Collection[str] = (),
    may_be_empty: Collection[str] = (),
    below_one: Collection[str] = (),
    among: Collection[str] | None = None,
) -> None:
    """Refuses numbers that are negative, zero, infinite or NaN, and lists without a value.

    Args:
      config: a dataclass of flags; those of a dataclass in it are checked too.
      may_be_zero: the flags that may be zero, by the names of their fields, "model.dropout".
      may_be_empty: the flags that may have no value.
      below_one: the flags that are less than one.
      among: the fields of `config` that are checked; None for all.

    Raises:
      ValueError: naming the flag, what it must be and what was got.
    """
    for name, value in _leaves(config):
        if among is not None and name.split(".")[0] not in among:
            continue
        several = isinstance(value, tuple | list)
        values = [x for x in (value if several else [value]) if _is_number(x)]
        if several and not value and name not in may_be_empty:
            raise ValueError(f"{flag(name)} must have at least one value; got none.")
        end = 1.0 if name in below_one else math.inf
        if any(not 0 <= x < end or (x == 0 and name not in may_be_zero) for x in values):
            rule = "zero or more" if name in may_be_zero else "positive"
            rule += " and below 1" if name in below_one else ""
            raise ValueError(f"{flag(name)} must be {rule}; got {' '.join(map(str, values))}.")


def check_seeds(
    name: str, seeds: Sequence[int], *, least: int = 1, num_seeds: int = NUM_SEEDS
) -> None:
    """Refuses seeds that are not in 0..num_seeds - 1, equal ones, and fewer than `least`.

    Args:
      name: of the flag's field.
      seeds: its values.
      least: how many there must be.
      num_seeds: how many seeds there are.

    Raises:
      ValueError: naming the flag, what it must be and what was got.
    """
    got = " ".join(map(str, seeds)) or "none"
    if not all(0 <= seed < num_seeds for seed in seeds):
        raise ValueError(f"{flag(name)} must be in 0..{num_seeds - 1}; got {got}.")
    if len(set(seeds)) < max(least, len(seeds)):
        raise ValueError(f"{flag(name)} must be different numbers, at least {least}; got {got}.")


def flag(name: str) -> str:
    """A field's flag: "model.num_heads" is --model.num-heads."""
    return f"--{name.replace('_', '-')}"


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The flags of a config and of those in it, as (dotted name, value)."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def check_local(config: Any) -> None:
    """Refuses an address where a flag is a local path: `gs://bucket` would be a folder `gs:`.

    Raises:
      ValueError: naming the flag.
    """
    for name, value in _leaves(config):
        local = isinstance(value, pathlib.PurePath) and not isinstance(value, epath.Path)
        if local and re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(value)):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} must be a local path; got {value}. Copy it from there to here."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
