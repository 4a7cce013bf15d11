"""Digests against plain integers, against flipped bits, and over devices; names that differ."""

import collections
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from oracles import jit

from fmjax import files
from fmjax.training import digests, sharding

DTYPES = ("float32", "float16", "bfloat16", "int32", "uint32", "int16", "int8", "uint8")
WIDE = ("float64", "int64", "uint64")
MASK = 2**32 - 1


def mix(x):
    """MurmurHash3's finaliser on Python's integers, which never wrap by themselves."""
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
    return x ^ x >> 16


def expected(words):
    seeds = (0x243F6A88, 0xB7E15162)
    return [
        sum(mix(int(word) ^ mix(i + seed & MASK)) for i, word in enumerate(words)) & MASK
        for seed in seeds
    ]


def random_bits(dtype, shape, seed=0):
    """An array of random bits: NaNs of all kinds, infinities and subnormal numbers among them."""
    dtype = jnp.dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw.view(dtype)[..., 0]


@jit
def compute(tree):
    return jax.tree.map(digests.digest, tree)


def ints(words):
    return [int(word) for word in words]


def test_the_finaliser_is_murmur_hashes_own():
    # The value of fmix32(1) that the reference implementation prints.
    assert mix(1) == 0x514E28B7
    assert int(digests._mix(jnp.uint32(1))) == 0x514E28B7


def test_digests_are_those_of_plain_integers():
    with jax.enable_x64(True):
        arrays = [random_bits(dtype, (3, 1, 5)) for dtype in (*DTYPES, *WIDE)]
        arrays += [random_bits("float32", shape) for shape in [(), (0,), (7,)]]
        arrays += [np.array([True, False, True])]
        assert all(jnp.asarray(x).dtype == x.dtype for x in arrays)
        found = compute(arrays)
    for x, words in zip(arrays, found, strict=True):
        size = x.dtype.itemsize
        if jnp.issubdtype(x.dtype, jnp.signedinteger) and size < 8:
            wanted = x.astype(np.int64).ravel() & MASK
        else:
            wanted = np.atleast_1d(x).view(f"uint{8 * min(size, 4)}").ravel()
        assert ints(words) == expected(wanted), (x.dtype, x.shape)


def test_digests_of_keys_and_complex_numbers():
    key = jax.random.split(jax.random.key(3), 5)
    z = random_bits("float32", (6, 2))
    found = compute([key, z.view(np.complex64)])
    assert ints(found[0]) == expected(np.asarray(jax.random.key_data(key)).ravel())
    assert ints(found[1]) == expected(z.view(np.uint32).ravel())


def test_every_flipped_bit_changes_both_words():
    def flips(x):
        flipped = np.stack([x] * (x.size * x.dtype.itemsize * 8))
        for bit, copy in enumerate(flipped):
            copy.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        return flipped

    with jax.enable_x64(True):
        arrays = [random_bits(dtype, (3, 2), seed=1) for dtype in (*DTYPES, *WIDE)]
        all_digests = jit(lambda xs: [jax.vmap(digests.digest)(x) for x in xs])
        for many, one in zip(all_digests([*map(flips, arrays)]), compute(arrays), strict=True):
            assert (np.asarray(many) != np.asarray(one)).all()


def test_order_counts():
    x = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    swapped = np.array([1, 0, *range(2, 12)], np.float32).reshape(3, 4)
    found = compute([x, x[::-1], x[:, ::-1], swapped, np.zeros(3), np.zeros(4), -np.zeros(4)])
    assert len({tuple(ints(words)) for words in found}) == 7


@pytest.mark.parametrize(
    ("dtype", "spec"),
    [("float32", ()), ("float32", ("data",)), ("bfloat16", (None, "data"))]
    + [("float32", (None, None, "data"))],
)
def test_sharded_it_is_the_same_and_nothing_is_gathered(dtype, spec):
    x = random_bits(dtype, (8, 16, 24))
    spread = jax.device_put(x, NamedSharding(sharding.make_mesh(), PartitionSpec(*spec)))
    assert len(spread.sharding.device_set) == 8
    compiled = jit(digests.digest).lower(spread).compile()
    assert ints(compiled(spread)) == ints(compute(x))
    program = compiled.as_text()
    assert "all-gather" not in program and ("all-reduce" in program) == bool(spec)


def test_names_and_kinds():
    tree = {"w": jnp.ones((2, 3)), "b": (jnp.zeros(2, jnp.bfloat16), None, {}), "a.b": ()}
    assert list(digests.named(tree)) == ["b.0", "w"]
    assert digests.describe(tree) == {
        "a%2Eb": "empty",
        "b.0": "bfloat16[2]",
        "b.1": "empty",
        "b.2": "empty",
        "w": "float32[2,3]",
    }
    odd = {"": 0, "a/b": 1, "a": {"b": 2, "%2e": 3, "é 月": {"": 4}}, "a.b": 5, "\ud800": 6}
    for separator in "./":
        names = digests.named(odd, separator)
        assert sorted(names.values()) == [0, 1, 2, 3, 4, 5, 6]
        assert all(name.isascii() and " " not in name for name in names)
    assert digests.named({-1: {2: 0}}) == {"-1.2": 0}


@jax.tree_util.register_pytree_with_keys_class
class Twins(tuple):
    """A custom node that gives both of its children one key."""

    def tree_flatten_with_keys(self):
        return tuple((jax.tree_util.GetAttrKey("same"), x) for x in self), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children)


@pytest.mark.parametrize("tree", [Twins((1, 2)), collections.OrderedDict({1: 2, "1": 3})])
def test_one_name_for_two_leaves_is_refused(tree):
    with pytest.raises(ValueError, match="a name of its own; got two named 'x.(same|1)'"):
        digests.named({"x": tree})


keys = st.text(max_size=3) | st.text("./%2e", max_size=4)
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(keys, inner, max_size=4))


@settings(max_examples=50, deadline=None)
@given(trees)
def test_every_leaf_is_found_under_its_name(tree):
    assert list(digests.named(tree).values()) == jax.tree.leaves(tree)


def test_hashes(tmp_path):
    content = bytes(range(256))
    (tmp_path / "file").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    assert files.hash_bytes(content) == files.hash_file(tmp_path / "file") == sha256
    x = np.frombuffer(content, np.uint16).reshape(16, 8)
    assert digests.hash_array(x) == digests.hash_array(np.asfortranarray(x)) == sha256
    assert digests.hash_array(x[0, 0]) == hashlib.sha256(content[:2]).hexdigest()
    assert digests.hash_json({"b": 1, "a": [2]}) == digests.hash_json({"a": (2,), "b": 1})
    assert digests.hash_json({"seed": 0}) != digests.hash_json({"seed": 1})
    one, zero = np.ones(2, np.float32), np.zeros(2, np.float32)
    different = [
        {"a.b": one, "a": {"b": zero}},
        {"a.b": zero, "a": {"b": one}},
        {"a": one, "b": zero},
        {"a": one, "b": zero.reshape(2, 1)},
        {"a": one, "b": zero.view(np.int32)},
        {"a": np.concatenate([one, zero]), "b": zero[:0]},
        {"a": one},
        {"a": one, "b": ()},
    ]
    assert len({digests.hash_tree(tree) for tree in different}) == len(different)
    assert digests.hash_tree({"w": jnp.ones(2)}) == digests.hash_tree({"w": one})
