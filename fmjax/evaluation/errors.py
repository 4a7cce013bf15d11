"""The standard error of a mean, where there is one."""

import numpy as np


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of `[num]` values; None for one value, which shows no spread."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1) / np.sqrt(len(values)))
