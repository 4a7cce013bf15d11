"""The progress bar of every command."""

import sys
from collections.abc import Iterable
from typing import Any

import tqdm

from fmjax.harness.pods import cluster


def progress(
    items: Iterable[Any] | None = None,
    label: str | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    leave: bool = True,
    disable: bool | None = False,
) -> Any:
    """A bar of tqdm's over `items`, or one to be updated; in a log file a line every 15 seconds.

    In a pod it is process 0's alone.

    Args:
      items: what is gone through; None for a bar that is updated by hand, up to `total`.
      label: what stands before the bar.
      total: the number of items, where `items` does not know it.
      initial: how many are done already.
      unit: of the items.
      leave: whether the bar stays when it is full.
      disable: whether there is none; None for none in a log file.
    """
    return tqdm.tqdm(
        items,
        label,
        total=total,
        initial=initial,
        unit=unit,
        leave=leave,
        disable=disable if cluster.is_main() else True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )
