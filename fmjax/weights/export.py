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
import jax.numpy as jnp
import numpy as np

from ..files import write_whole
from ..types import kind
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
      ValueError: for another ending, no parameters, an empty mapping, a leaf that is no array of
        ordinary numbers, or a name that is empty or holds a dot.

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
    from safetensors import SafetensorError, safe_open

    path, params = Path(path), {}
    tensors = read_tensors(path)
    try:
        with safe_open(path, "numpy") as file:
            record = json.loads((file.metadata() or {}).get("record", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file; got another: {error}") from None
    except json.JSONDecodeError:
        record = {}  # another program's record
    for name, tensor in tensors.items():
        *folders, leaf = name.split(".")
        inner = params
        for folder in folders:
            inner = inner.setdefault(folder, {})
            if not isinstance(inner, dict):
                break
        if not isinstance(inner, dict) or leaf in inner:
            raise ValueError(f"{path} names a tensor and others below it: {name}.")
        inner[leaf] = tensor
    return params, record if isinstance(record, dict) else {}


def _flat(params: Any, above: tuple[str, ...] = ()) -> Any:
    """(name, array) of every leaf."""
    if isinstance(params, Mapping) and (params or not above):
        for key, value in params.items():
            if not isinstance(key, str) or not key or "." in key:
                raise ValueError(f"Names must be strings without a dot; got {key!r}.")
            yield from _flat(value, (*above, key))
    elif above and isinstance(params, jax.Array | np.ndarray) and _kept(params.dtype):
        yield ".".join(above), np.ascontiguousarray(params).reshape(np.shape(params))
    else:
        raise ValueError(
            f"params must be nested mappings of arrays of ordinary numbers; got {kind(params)} at "
            f"{'.'.join(above) or 'the top'}. Of another pytree take flax.serialization."
            "to_state_dict(params) first."
        )


def _kept(dtype: Any) -> bool:
    """Whether the format and its reader for NumPy hold numbers of this dtype."""
    return dtype == jnp.bfloat16 or (np.dtype(dtype).kind in "biuf" and dtype.itemsize > 0)
