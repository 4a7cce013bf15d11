"""Which leaves of a Flax network's parameters are matrices that Muon may orthogonalise.

A matrix is the kernel of a hidden dense layer, or of a hidden convolution, whose fan-in is all its
axes but the last. The names that Flax gives to modules tell which:

    an embedding         a module named embed..., time, horizon, label, condition or patches
    the first layer      Dense_0 or Conv_0 directly below the root
    the last layer       a module named output..., else the last Dense directly below the root
    queries, keys and    a dense kernel [d, 3 d] of a module named qkv..., or in one named
    values in one        attention...: three matrices [d, d]

Capitals make no difference. Nothing here knows a network; one with other names has other matrices.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers

_EMBEDDING = re.compile(r"(embed\w*|time|horizon|label|condition|patches)(_\d+)?$", re.I)
_OUTPUT = re.compile(r"output(_\d+)?$", re.I)
_NUMBERED = re.compile(r"(Dense|Conv)_(\d+)$")


class Matrix(NamedTuple):
    """How a leaf is a matrix, or several.

    Attributes:
      shape: the shape in which its axes have one meaning each.
      axes: which of these are fan-in and fan-out; the others count matrices.
    """

    shape: tuple[int, ...]
    axes: MuonDimensionNumbers


def matrix_axes(params: Any) -> Any:
    """The matrices among a Flax network's parameters, by the rules of the module.

    Args:
      params: a pytree of arrays, or of their shapes, keyed by the names of Flax's modules.

    Returns:
      The same pytree with a `Matrix` for every leaf that is one, and None for every other.

    Raises:
      ValueError: if none is.

    Example:
      >>> params = {"params": {"Block_0": {"Dense_0": {"kernel": np.zeros((4, 8))}}}}
      >>> matrix_axes(params)["params"]["Block_0"]["Dense_0"]["kernel"].shape
      (4, 8)
    """
    leaves, tree = jax.tree.flatten_with_path(params)
    names = [[_name(key) for key in path] for path, _ in leaves]
    outermost = _outermost(names)
    found = [
        _matrix(path, np.shape(leaf), outermost)
        for path, (_, leaf) in zip(names, leaves, strict=True)
    ]
    if not any(found):
        raise ValueError(
            "Muon needs parameters with hidden matrices, kernels of Flax's dense layers or "
            f"convolutions; got {['/'.join(path) for path in names[:3]]} and none such. Take "
            "training.adam."
        )
    return jax.tree.unflatten(tree, found)


def dimension_numbers(matrices: Any) -> Any:
    """What `optax.contrib.muon` wants to know of a `matrix_axes`: axes, or None for Adam."""
    return jax.tree.map(lambda matrix: matrix and matrix.axes, matrices, is_leaf=_is_matrix_or_none)


def apart(matrices: Any, params: Any) -> Any:
    """The parameters with every matrix in its `shape`."""
    return jax.tree.map(
        lambda matrix, leaf: leaf if matrix is None else leaf.reshape(matrix.shape),
        matrices,
        params,
        is_leaf=_is_matrix_or_none,
    )


def _matrix(path: list[str], shape: Sequence[int], outermost: set[str]) -> Matrix | None:
    modules = path[:-1]
    hidden = len(shape) > 1 and path[-1:] == ["kernel"]
    if not hidden or any(_EMBEDDING.match(name) or _OUTPUT.match(name) for name in modules):
        return None
    if len(_below_root(path)) == 1 and modules[-1] in outermost:
        return None
    attention = any(name.lower().startswith(("qkv", "attention")) for name in modules)
    if attention and len(shape) == 2 and shape[1] == 3 * shape[0]:
        return Matrix((shape[0], 3, shape[0]), MuonDimensionNumbers(0, 2))
    return Matrix(tuple(shape), MuonDimensionNumbers(tuple(range(len(shape) - 1)), len(shape) - 1))


def _outermost(names: list[list[str]]) -> set[str]:
    """The numbered layers directly below the root that are a network's first or last."""
    layers = {modules[0] for path in names if len(modules := _below_root(path)) == 1}
    numbers = {m[0]: int(m[2]) for name in layers if (m := _NUMBERED.match(name))}
    dense = [name for name in numbers if name.startswith("Dense")]
    last = {max(dense, key=numbers.__getitem__)} if dense else set()
    if any(_OUTPUT.match(name) for path in names for name in path[:-1]):
        last = set()
    return {"Dense_0", "Conv_0"} | last


def _below_root(path: list[str]) -> list[str]:
    """The modules on the way to a leaf, without Flax's collection."""
    return path[1:-1] if path[0] == "params" else path[:-1]


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _is_matrix_or_none(value: Any) -> bool:
    return value is None or isinstance(value, Matrix)
