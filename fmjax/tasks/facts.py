"""What a run folder knows of its data, so that a finished run is drawn from without them."""

from collections.abc import Callable, Collection
from typing import Any


def known_or(
    known: dict[str, Any] | None, names: Collection[str], describe: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What the data of a finished run are, as its config.json says; in training `describe()`.

    Args:
      known: `RunConfig.known`.
      names: of what is needed.
      describe: reads the data.

    Raises:
      ValueError: if config.json lacks one of the names.
    """
    if known is None:
        return describe()
    if missing := sorted(set(names) - known.keys()):
        raise ValueError(
            f"config.json must say {', '.join(missing)} of the data; it does not. Evaluate the run "
            "with the version that trained it, or train again."
        )
    return known
