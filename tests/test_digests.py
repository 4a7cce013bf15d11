"""Digests against plain integers, against flipped bits, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fmjax import digests, sharding

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


def compute(x):
    return [int(word) for word in jax.jit(digests.digest)(jnp.asarray(x))]


def test_the_finaliser_is_murmur_hashes_own():
    # The value of fmix32(1) that the reference implementation prints.
    assert mix(1) == 0x514E28B7
    assert int(digests._mix(jnp.uint32(1))) == 0x514E28B7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 1, 5)])
def test_digest_of_random_bits_is_that_of_plain_integers(dtype, shape):
    x = random_bits(dtype, shape)
    size = jnp.dtype(dtype).itemsize
    if jnp.issubdtype(jnp.dtype(dtype), jnp.signedinteger):
        words = x.astype(np.int64).ravel() & MASK
    else:
        words = x.view(f"uint{8 * size}").ravel()
    assert compute(jnp.asarray(x)) == expected(words)


@pytest.mark.parametrize("dtype", WIDE)
def test_a_number_of_64_bits_is_two_words(dtype):
    with jax.enable_x64(True):
        x = random_bits(dtype, (3, 4))
        assert jnp.asarray(x).dtype == dtype
        assert compute(jnp.asarray(x)) == expected(x.view(np.uint32).ravel())


def test_digest_of_keys_complex_numbers_and_booleans():
    key = jax.random.split(jax.random.key(3), 5)
    assert compute(key) == expected(np.asarray(jax.random.key_data(key)).ravel())
    z = random_bits("float32", (6, 2))
    assert compute(jax.lax.complex(*jnp.asarray(z).T)) == expected(z.view(np.uint32).ravel())
    assert compute(jnp.array([True, False, True])) == expected([1, 0, 1])


@pytest.mark.parametrize("dtype", (*DTYPES, *WIDE))
def test_every_flipped_bit_changes_both_words(dtype):
    with jax.enable_x64(True):
        size = jnp.dtype(dtype).itemsize
        x = random_bits(dtype, (3, 4), seed=1)
        flipped = np.stack([x] * (x.size * size * 8))
        for bit, copy in enumerate(flipped):
            raw = copy.reshape(-1).view(np.uint8)
            raw[bit // 8] ^= 1 << bit % 8
        all_digests = jax.jit(jax.vmap(digests.digest))(jnp.asarray(flipped))
        assert (np.asarray(all_digests) != np.asarray(compute(x))).all()


def test_order_counts():
    x = jnp.arange(12.0).reshape(3, 4)
    seen = {tuple(compute(y)) for y in (x, x[::-1], x[:, ::-1], x.at[0, 0].set(1).at[0, 1].set(0))}
    assert len(seen) == 4
    assert compute(jnp.zeros(3)) != compute(jnp.zeros(4)) != compute(-jnp.zeros(4))


@pytest.mark.parametrize("spec", [(), ("data",), (None, "data"), (None, None, "data")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_split_over_devices_it_is_the_same_and_nothing_is_gathered(spec, dtype):
    x = jnp.asarray(random_bits(dtype, (8, 16, 24)))
    place = NamedSharding(sharding.make_mesh(), PartitionSpec(*spec))
    spread = jax.device_put(x, place)
    assert len(spread.sharding.device_set) == 8
    assert compute(spread) == compute(x)
    program = jax.jit(digests.digest).lower(spread).compile().as_text()
    assert program and "all-gather" not in program
    assert ("all-reduce" in program) == bool(spec)


def test_a_record_names_what_changed_and_notices_its_own_changes():
    tree = {"w": jnp.ones((2, 3)), "b": (jnp.zeros(2, jnp.bfloat16), None, {})}
    assert digests.describe(tree) == [
        ("b.0", "bfloat16[2]"),
        ("b.1", "empty"),
        ("b.2", "empty"),
        ("w", "float32[2,3]"),
    ]
    record = digests.make_record(tree, ["aa", "bb"], {"seed": 0})
    digests.check_seal(record)
    assert digests.changed(record, tree, ["aa", "bb"]) == []
    assert digests.changed(record, tree, ["ab", "bb"]) == ["b.0"]
    assert digests.changed(record, tree, ["aa", "ba"]) == ["w"]
    assert record["config"] == digests.hash_json({"seed": 0}) != digests.hash_json({"seed": 1})
    for other in (record | {"config": "0"}, record | {"arrays": []}, record | {"more": 1}, {}):
        with pytest.raises(ValueError, match="must be as it was saved"):
            digests.check_seal(other)
