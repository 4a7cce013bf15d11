"""Parameters as a safetensors file, which any framework reads and no code hides in.

A tensor's name is the path to it, joined by dots: params.Dense_0.kernel. What else belongs to them,
the flags of a run for instance, stands in the file's header as JSON.

Source: the format, https://github.com/huggingface/safetensors.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..files import write_whole
from .torch_files import read_tensors


def export_safetensors(
    path: str | os.PathLike[str], params: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> None:
    """Writes parameters by an atomic write; a file that is there is never overwritten.

    Args:
      path: ends in .safetensors.
      params: nested mappings of arrays, as Flax has them.
      record: what else is kept with them, as JSON can hold it.

    Raises:
      FileExistsError: if the file is there.
      ValueError: for another ending, a leaf that is no array, or a name that is empty or holds a
        dot.

    Example:
      >>> export_safetensors("moons.safetensors", params)  # doctest: +SKIP
    """
    from safetensors.numpy import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"The file must end in .safetensors; got {path.name}.")
    if path.exists():
        raise FileExistsError(f"{path} is there and stays as it is. Name another file.")
    tensors = dict(_flat(params))
    if not tensors:
        raise ValueError("params must hold arrays; got none.")
    content = save(tensors, {"record": json.dumps(dict(record or {}), default=str)})
    write_whole(path, lambda file: file.write(content))


def load_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `export_safetensors` wrote.

    Args:
      path: the file.

    Returns:
      The parameters, nested dictionaries of NumPy arrays, and the record, empty in a file of
      another origin.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged or no safetensors file.

    Example:
      >>> params, record = load_safetensors("moons.safetensors")  # doctest: +SKIP
    """
    from safetensors import safe_open

    path, params = Path(path), {}
    for name, tensor in read_tensors(path).items():
        *folders, leaf = name.split(".")
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[leaf] = tensor
    with safe_open(path, "numpy") as file:
        record = json.loads((file.metadata() or {}).get("record", "{}"))
    return params, record


def _flat(params: Any, above: tuple[str, ...] = ()) -> Any:
    """(name, array) of every leaf."""
    if isinstance(params, Mapping):
        for key, value in params.items():
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(f"Names must be strings without a dot; got {key!r}.")
            yield from _flat(value, (*above, key))
    elif isinstance(params, jax.Array | np.ndarray):
        yield ".".join(above), np.ascontiguousarray(params).reshape(np.shape(params))
    else:
        raise ValueError(
            f"params must be nested mappings of arrays; got {type(params).__name__} at "
            f"{'.'.join(above) or 'the top'}. Of another pytree take flax.serialization."
            "to_state_dict(params) first."
        )
