"""Batches from a memory map, ArrayRecord and the like: the same bytes, and only the rows asked."""

import os
import pathlib
import tracemalloc

import numpy as np
import pytest

from fmjax import data

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 4, 3)).astype(np.float32)
ROWS = [np.array([5, 0, 22, 5, 5, 1]), np.arange(23), np.arange(23)[::-1], np.array([7], np.int32)]


class Counted:
    """A source that notes which rows are read."""

    def __init__(self, source):
        self.source, self.read = source, []

    def __len__(self):
        return len(self.source)

    def __getitem__(self, row):
        self.read.append(row)
        return self.source[row]


class CountedMany(Counted):
    def __getitems__(self, rows):
        return [self[row] for row in rows]


def of_bytes(record):
    return np.frombuffer(record, np.float32).reshape(4, 3)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same rows in memory, in a memory map, in two ArrayRecord files and by single rows."""
    module = pytest.importorskip("array_record.python.array_record_module")
    data_source = pytest.importorskip("array_record.python.array_record_data_source")
    folder = tmp_path_factory.mktemp("sources")
    np.save(folder / "x.npy", X)
    files = [str(folder / f"x-{k}.array_record") for k in range(2)]
    for file, part in zip(files, (X[:9], X[9:]), strict=True):
        writer = module.ArrayRecordWriter(file, "group_size:1")
        for x in part:
            writer.write(x.tobytes())
        writer.close()
    return {
        "memory": (X, None),
        "list": ([*X], None),
        "map": (np.load(folder / "x.npy", mmap_mode="r"), None),
        "array_record": (data_source.ArrayRecordDataSource(files), of_bytes),
        "counted": (Counted(X), None),
    }


@pytest.mark.parametrize("name", ["memory", "list", "map", "array_record", "counted"])
@pytest.mark.parametrize("rows", ROWS, ids=len)
def test_all_sources_give_the_same_bytes(sources, name, rows):
    source, decode = sources[name]
    got = data.from_source(source, decode)(rows)
    assert type(got) is np.ndarray and got.dtype == np.float32 and got.flags.writeable
    assert got.tobytes() == X[rows].tobytes()
    got[:] = 0  # the batch is the caller's own
    assert data.read_rows(source, rows, decode).tobytes() == X[rows].tobytes()


def test_an_epoch_of_batches_is_the_same_from_all_sources(sources):
    """Eight batches of six from 23 rows: two epochs and a piece of the third."""
    for source, decode in sources.values():
        batch, order = data.from_source(source, decode), data.batches(len(source), 6, seed=3)
        seen = np.concatenate([batch(next(order)) for _ in range(8)])
        permutations = [np.random.default_rng([3, epoch]).permutation(23) for epoch in range(3)]
        assert seen.tobytes() == X[np.concatenate(permutations)[:48]].tobytes()


@pytest.mark.parametrize("kind", [Counted, CountedMany])
def test_only_the_rows_asked_for_are_read_each_once_and_in_order(kind):
    source = kind(X)
    batch = data.from_source(source, lambda x: {"mean": x.mean(), "x": x})
    assert source.read == []
    got = batch(np.array([9, 2, 9, 4]))
    assert source.read == [2, 4, 9] and {*map(type, source.read)} == {int}
    np.testing.assert_array_equal(got["x"], X[[9, 2, 9, 4]])
    np.testing.assert_array_equal(got["mean"], X[[9, 2, 9, 4]].mean((1, 2)))


def test_a_memory_map_far_larger_than_a_batch_is_not_read_whole(tmp_path):
    """A sparse file of 8 GiB, of which three rows of 4 KiB are written and read again."""
    shape = (2**21, 1024)
    large = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)
    rows = np.array([2**21 - 1, 0, 2**20])
    large[rows] = np.arange(3, dtype=np.float32)[:, None]
    large.flush()
    batch = data.from_source(np.load(tmp_path / "x.npy", mmap_mode="r"))
    tracemalloc.start()
    got = batch(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 3 * 4096 < peak < 100_000
    np.testing.assert_array_equal(got, np.broadcast_to(np.arange(3.0)[:, None], (3, 1024)))


def test_a_dict_of_sources_is_a_source_of_dicts(sources):
    labels = np.arange(23)
    source = {"image": sources["map"][0], "label": labels}
    rows = np.array([8, 3, 8])
    got = data.from_source(source)(rows)
    np.testing.assert_array_equal(got["image"], X[rows])
    np.testing.assert_array_equal(got["label"], rows)
    doubled = data.from_source(source, lambda r: r["image"] * np.float32(r["label"]))(rows)
    np.testing.assert_array_equal(doubled, X[rows] * rows[:, None, None].astype(np.float32))


def test_rows_out_of_range_and_of_another_kind():
    batch = data.from_source(Counted(X))
    for rows, message in (
        ([0, 23], "from 0 to 22, for the source has 23; got 23"),
        ([0, -1], "from 0 to 22, for the source has 23; got -1"),
        ([0.0, 1.0], r"whole numbers .*got float64 \(2,\)"),
        ([[0, 1]], r"whole numbers .*got int64 \(1, 2\)"),
        ([True, False], "whole numbers .*got bool"),
        ([], "one or more"),
    ):
        with pytest.raises(ValueError, match=message):
            batch(np.array(rows))


def test_what_is_no_source(tmp_path):
    np.savez(tmp_path / "x.npz", x=X)
    for source, message in (
        (iter(X), "must have len.source. and source.row.; got"),
        (np.zeros(()), "got ndarray"),
        (None, "got NoneType"),
        (np.load(tmp_path / "x.npz"), "Save each as .npy"),
        ({"x": X, "y": X[:5]}, "must have one length; got {'x': 23, 'y': 5}"),
        ({}, "must have one length"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_source(source)


def test_records_that_cannot_be_stacked_are_named():
    def rows(records, decode=None, rows=(2, 0, 1)):
        return lambda: data.read_rows(records, np.array(rows), decode)

    small, wide = np.zeros(2, np.float32), np.zeros(3, np.float32)
    for call, message in (
        (rows([small, small, wide]), r"row 2 has \(\(3,\), 'float32'\) and row 0"),
        (rows([small, small.astype(np.float64), small]), "row 1 has .*float64"),
        (rows([{"a": small}, {"b": small}, {"a": small}]), "row 1 has {'b': "),
        (rows([small, None, small]), "Records must hold arrays; that of row 1 is None"),
        (rows([b"a", b"b", b"c"]), "must be of numbers; that of row 0 holds .S1"),
        (rows(np.array(["a", "b", "c"])), "must be of numbers; an array holds <U1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_decode_that_raises_names_its_row_and_keeps_the_cause():
    def decode(record):
        return 1 / record

    with pytest.raises(ValueError, match="it raised ZeroDivisionError at row 2: ") as error:
        data.from_source([4, 2, 0, 1], decode)(np.array([3, 2, 1]))
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_a_source_that_returns_too_few_records():
    class Short(CountedMany):
        def __getitems__(self, rows):
            return super().__getitems__(rows)[1:]

    with pytest.raises(ValueError, match="a record for each row; got 1 for 2 rows"):
        data.read_rows(Short(X), np.array([3, 1]))


def test_a_grain_data_set():
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source([*X]).map(lambda x: x + 1)
    rows = np.array([20, 3, 3])
    np.testing.assert_array_equal(data.from_source(dataset)(rows), X[rows] + 1)
    with pytest.raises(ValueError, match="got 23"):  # Grain itself would begin again at 0
        data.from_source(dataset)(np.array([23]))


def test_a_tfds_data_source_gives_what_load_gives():
    tfds = pytest.importorskip("tensorflow_datasets")
    root = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "/nowhere"))
    if not (root / "mnist").is_dir():
        pytest.skip(f"no mnist in {root}; TFDS_DATA_DIR names another folder")
    source = tfds.data_source("mnist", split="test", data_dir=root)
    rows = np.array([9_999, 17, 0, 17])
    got, expected = data.from_source(source)(rows), data.load("mnist", "test", root)
    assert got["image"].tobytes() == expected.images[rows].tobytes()
    np.testing.assert_array_equal(got["label"], expected.labels[rows])
