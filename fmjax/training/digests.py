"""Digests: of arrays on their devices, and SHA-256 of JSON, files, NumPy arrays and trees.

The digest of an array with words w_i (its bits as unsigned 32-bit words, in row-major order) is

    D_k = sum_i f(w_i xor f(i + s_k))  mod 2^32,   k = 1, 2

with the finaliser f of MurmurHash3 (A. Appleby, 2011), a bijection of the 32-bit words, and two
seeds s_k. One changed word, hence one flipped bit, always changes both D_k: all other terms stay,
and f takes no two words to one. Any other change (two values swapped, say) goes unseen once in
2^64, if f is taken for random. It guards against failing disks, not against forgers.

Sums of integers are exact in any order: the digest is the same however the array is sharded over
devices and processes, and is computed on them, without gathering the array.

The arrays of a tree are told apart by `named`: two of them never have one name.
"""

import functools
import json
import math
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ..files import hash_bytes

_SEEDS = (np.uint32(0x243F6A88), np.uint32(0xB7E15162))  # the digits of pi and of e


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


def digest_each(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """`digest` of every array by name, in hexadecimal; in a pod every process has all of them.

    Example:
      >>> digest_each({"w": jnp.zeros(2)})
      {'w': 'a232a6eb8d87bb1a'}
    """
    words = [_digest_on(getattr(x, "sharding", None))(x) for x in arrays.values()]
    pairs = zip(arrays, jax.device_get(words), strict=True)
    return {name: "".join(f"{int(word):08x}" for word in pair) for name, pair in pairs}


@functools.cache
def _digest_on(sharding: Sharding | None) -> Callable[[jax.Array], jax.Array]:
    """The compiled digest; its result is replicated on every device, for each process to read."""
    if isinstance(sharding, NamedSharding):
        return jax.jit(digest, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(digest)


def named(
    tree: Any, separator: str = ".", is_leaf: Callable[[Any], bool] | None = None
) -> dict[str, Any]:
    """The leaves of a tree, each under a name of its own: the keys on the way to it, joined.

    Whatever is no ASCII letter, digit, "_", "-" or "~" stands in a key as in a URL: "a.b" as
    "a%2Eb".

    Args:
      tree: any pytree.
      separator: what joins the keys, "." or "/".
      is_leaf: as of `jax.tree.leaves`.

    Raises:
      ValueError: if two leaves have one name all the same: keys 1 and "1" of an `OrderedDict`, or
        a custom node that gives two children one key.

    Example:
      >>> named({"a.b": 1, "a": {"b": 2, "c": [3, None]}})
      {'a.b': 2, 'a.c.0': 3, 'a%2Eb': 1}
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        keys = [urllib.parse.quote(key, safe="", errors="surrogatepass") for key in keys]
        name = separator.join(key.replace(".", "%2E") for key in keys)
        if name in found:
            raise ValueError(
                f"Every leaf of a tree must have a name of its own; got two named {name!r}. Rename "
                "one key, or let the custom node give each child a key of its own."
            )
        found[name] = leaf
    return found


def describe(tree: Any) -> dict[str, str]:
    """The dtype and shape of every array of a tree, by name; "empty" for an empty node.

    Args:
      tree: of arrays, `jax.ShapeDtypeStruct`s or anything with `shape` and `dtype`.

    Example:
      >>> describe({"w": jnp.zeros((2, 3)), "none": None})
      {'none': 'empty', 'w': 'float32[2,3]'}
    """

    def is_empty(node: Any) -> bool:
        return not jax.tree.leaves(node)

    return {
        name: "empty" if is_empty(x) else f"{x.dtype}[{','.join(map(str, x.shape))}]"
        for name, x in named(tree, is_leaf=is_empty).items()
    }


def hash_json(value: Any) -> str:
    """SHA-256 of a value as JSON with sorted keys, in hexadecimal.

    Example:
      >>> hash_json({"b": 1, "a": 2}) == hash_json({"a": 2, "b": 1})
      True
    """
    return hash_bytes(json.dumps(value, sort_keys=True).encode())


def hash_array(x: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row-major order, in hexadecimal; not of shape and dtype."""
    return hash_bytes(np.ascontiguousarray(x).reshape(-1).view(np.uint8))


def hash_tree(tree: Any) -> str:
    """SHA-256 of a tree of arrays on the host: of their names, dtypes, shapes and bytes.

    Example:
      >>> hash_tree({"w": np.zeros(2)}) == hash_tree({"w": np.zeros((1, 2))})
      False
    """
    return hash_json([describe(tree), {n: hash_array(x) for n, x in named(tree).items()}])
