"""State dicts, tensors by the names of a PyTorch network, held against the network's own."""

from collections.abc import Mapping

import numpy as np


def check_entries(
    state_dict: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    network: str,
    hint: str,
) -> None:
    """Refuses a state dict that is not a network's, entry by entry.

    Args:
      state_dict: arrays by name.
      wanted: the shape of every entry that the network has. Names that end with `running_var` are
        variances.
      network: what a message calls the network.
      hint: what a message says of a wrong entry's likely cause.

    Raises:
      ValueError: if an entry is missing, unknown, of another shape, or holds no finite numbers.

    Example:
      >>> check_entries({"w": np.zeros(2)}, {"w": (2,)}, network="a line", hint="")
    """
    rule = f"The state dict must be that of {network}"
    missing, unknown = sorted(wanted.keys() - state_dict), sorted(state_dict.keys() - wanted)
    if missing or unknown:
        raise ValueError(
            f"{rule}; got {len(missing)} entries missing {missing[:3]} and {len(unknown)} unknown "
            f"{unknown[:3]} (at most three of each shown). {hint}"
        )
    for name, shape in wanted.items():
        value = state_dict[name]
        if value.shape != shape or not np.issubdtype(value.dtype, np.floating):
            raise ValueError(
                f"{rule}, where {name} is {shape}, floating; got {value.shape}, {value.dtype}. "
                f"{hint}"
            )
        if not np.isfinite(value).all() or (name.endswith("running_var") and value.min() < 0):
            raise ValueError(
                f"{rule}, of finite numbers and variances of at least 0; {name} holds others. "
                "The file is damaged: fetch it anew."
            )
