"""Digests of arrays, and the record by which a stored state is known again.

The digest of an array with words w_i (its bits as unsigned 32-bit words, in row-major order) is

    D_k = sum_i f(w_i xor f(i + s_k))  mod 2^32,   k = 1, 2

with the finaliser f of MurmurHash3 (A. Appleby, 2011), a bijection of the 32-bit words, and two
seeds s_k. One changed word, hence one flipped bit, always changes both D_k: all other terms stay,
and f takes no two words to one. Any other change (two values swapped, say) goes unseen once in
2^64, if f is taken for random. It guards against failing disks, not against forgers.

Sums of integers are exact in any order: the digest is the same however the array is split over
devices and processes, and is taken where the array lies, without gathering it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SEEDS = (np.uint32(0x243F6A88), np.uint32(0xB7E15162))  # the digits of pi and of e
Row = tuple[str, str]


def digest(x: jax.Array) -> jax.Array:
    """The digest of one array: two words that change with any of its bits.

    Args:
      x: an array of any shape and dtype (complex numbers and typed keys too), of fewer than 2^32
        words: beyond that, the positions i start again.

    Returns:
      `[2]`, uint32. It knows neither the shape nor the dtype: compare these as well.

    Example:
      >>> bool((digest(jnp.array([1.0, 2.0])) == digest(jnp.array([2.0, 1.0]))).any())
      False
    """
    words = _words(x)
    # Written by axes: a reshape of an array that is split over devices would gather it.
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    sums = [jnp.sum(_mix(words ^ _mix(position + seed)), dtype=jnp.uint32) for seed in _SEEDS]
    return jnp.stack(sums)


def _words(x: jax.Array) -> jax.Array:
    """The bits of an array, as 32-bit words; a 64-bit number gives two, along a new last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)
    if x.dtype.itemsize == 8:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return x.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's 32-bit finaliser: xor-shifts and odd factors, each of which can be undone."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def describe(tree: Any) -> list[Row]:
    """Every array of a tree as (name, dtype and shape), and every empty node as (name, "empty").

    Args:
      tree: of arrays, `jax.ShapeDtypeStruct`s or anything with `shape` and `dtype`.

    Example:
      >>> describe({"w": jnp.zeros((2, 3)), "none": None})
      [('none', 'empty'), ('w', 'float32[2,3]')]
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_empty)
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="."),
            "empty" if _is_empty(x) else f"{x.dtype}[{','.join(map(str, x.shape))}]",
        )
        for path, x in leaves
    ]


def _is_empty(node: Any) -> bool:
    return not jax.tree.leaves(node)


def differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Where two descriptions by name disagree, a line for each name.

    Example:
      >>> differences({"w": "float32[2,3]", "b": "int8[]"}, {"w": "float32[2,4]", "b": "int8[]"})
      ['  w: folder has float32[2,3], got float32[2,4]']
    """
    return [
        f"  {name}: folder has {old.get(name, 'nothing')}, got {new.get(name, 'nothing')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def make_record(tree: Any, digests: list[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """What is stored beside a state, in JSON: its arrays, their digests, its config's hash.

    Args:
      tree: the state, or its shapes.
      digests: of `jax.tree.leaves(tree)`, in that order, in hexadecimal.
      config: the config beside it, as JSON reads it back.

    Returns:
      A mapping that `check_seal` accepts for as long as nothing in it is changed.
    """
    left = iter(digests)
    rows = [[name, kind, "" if kind == "empty" else next(left)] for name, kind in describe(tree)]
    record = {"arrays": rows, "config": hash_json(config)}
    return record | {"seal": hash_json(record)}


def check_seal(record: Mapping[str, Any]) -> None:
    """Refuses a record that is not the one that was made.

    Raises:
      ValueError: if the record does not have the hash that stands in it.
    """
    rest = {name: value for name, value in record.items() if name != "seal"}
    if hash_json(rest) != record.get("seal"):
        raise ValueError("The record of digests must be as it was saved; its hash is another.")


def changed(record: Mapping[str, Any], tree: Any, digests: list[str]) -> list[str]:
    """The names of the arrays whose digest is not the recorded one.

    Args:
      record: from `make_record`.
      tree: the state that was read back; `digests`: its own, as for `make_record`.
    """
    now = make_record(tree, digests, {})["arrays"]
    old = {tuple(row) for row in record["arrays"]}
    return [name for name, kind, value in now if (name, kind, value) not in old]


def hash_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
