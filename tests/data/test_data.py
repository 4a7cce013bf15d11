"""Batches, the digits, and TFDS's own reading as the reference."""

import itertools
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fmjax import data
from fmjax.data import archives


@pytest.fixture
def shared_data_dir():
    """A TFDS folder with real images: TFDS_DATA_DIR, or the one beside the repository."""
    beside = pathlib.Path(__file__).parents[3] / "shared" / "tensorflow_datasets"
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or beside)
    for name in ("cifar10/3.0.2", "mnist/3.0.1"):
        if not (folder / name / "dataset_info.json").is_file():
            pytest.skip(f"no prepared {name} in {folder}")
    return folder


def take(iterator, n):
    return list(itertools.islice(iterator, n))


@pytest.mark.parametrize("num_examples,batch_size", [(12, 4), (13, 4), (7, 7), (7, 5), (5, 1)])
def test_every_epoch_holds_every_index_once(num_examples, batch_size):
    drawn = take(data.batches(num_examples, batch_size, seed=3), 6 * num_examples)
    assert {batch.shape for batch in drawn} == {(batch_size,)}
    stream = np.concatenate(drawn)
    epochs = stream[: len(stream) // num_examples * num_examples].reshape(-1, num_examples)
    np.testing.assert_array_equal(
        np.sort(epochs, 1), np.tile(np.arange(num_examples), (len(epochs), 1))
    )
    assert len(np.unique(epochs[:4], axis=0)) > 1  # epochs differ


@pytest.mark.parametrize("num_examples,batch_size", [(12, 4), (13, 4), (7, 7), (7, 5)])
def test_resumed_is_uninterrupted(num_examples, batch_size):
    whole = take(data.batches(num_examples, batch_size, seed=5), 40)
    for start_step in (0, 1, 2, 3, 7, 13, 26):
        resumed = data.batches(num_examples, batch_size, seed=5, start_step=start_step)
        np.testing.assert_array_equal(take(resumed, 40 - start_step), whole[start_step:])


def test_resuming_far_on_takes_no_replay():
    (batch,) = take(data.batches(1000, 999, seed=0, start_step=10**12), 1)
    assert len(set(batch.tolist())) > 500 and batch.shape == (999,)


def test_batches_depend_on_the_seed_and_belong_to_the_caller():
    a, b, c = (np.stack(take(data.batches(50, 10, seed=s), 5)) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    iterator = data.batches(50, 10, seed=0)
    scribbled = []
    for _ in range(5):
        scribbled.append((batch := next(iterator)).copy())
        batch[:] = -1
        if batch.base is not None:
            batch.base[:] = -1
    np.testing.assert_array_equal(scribbled, a)


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_batch_size_is_checked_at_the_call(batch_size):
    with pytest.raises(ValueError, match=f"from 1 to the number of examples, 10; got {batch_size}"):
        data.batches(10, batch_size, seed=0)


def test_negative_seed_or_step():
    with pytest.raises(ValueError, match="got -1 and 0"):
        data.batches(10, 2, seed=-1)
    with pytest.raises(ValueError, match="got 0 and -3"):
        data.batches(10, 2, seed=0, start_step=-3)


def rows(dataset):
    return [
        (*image.ravel().tolist(), int(label)) for image, label in zip(*dataset[:2], strict=True)
    ]


def test_digits_are_divided_without_overlap_or_loss():
    from sklearn.datasets import load_digits

    train, test = data.load_digits("train"), data.load_digits("test")
    assert (len(train.labels), len(test.labels)) == (1500, 297)
    pixels, labels = load_digits(return_X_y=True)
    original = [(*p.astype(int).tolist(), int(y)) for p, y in zip(pixels, labels, strict=True)]
    assert sorted(rows(train) + rows(test)) == sorted(original)
    assert not set(rows(train)) & set(rows(test))
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.num_levels == 17 and train.images.max() == 16 and train.num_classes == 10
    share = np.bincount(train.labels) / np.bincount(labels) * 1797 - 1500
    assert abs(share / 10).max() <= 1.5  # stratified: off by one example or so in each class
    assert rows(data.load_digits("train[:100]")) == rows(train)[:100]
    assert rows(data.load_digits("test[50%:]+train[-2:]")) == rows(test)[148:] + rows(train)[-2:]


@pytest.mark.parametrize(
    "split,message",
    [
        ("validation", "one of train, test; got 'validation'"),
        ("train[5:5]", "must hold examples.*1500.*'train'.*5 to 5"),
        ("train[10:5]", "10 to 5"),
        ("test[297:]", "297 to 297"),
        ("test[:298]", "0 to 298"),
        ("test[-298:]", "-1 to 297"),
        ("train[", "must read like"),
        ("train[::2]", "must read like"),
        ("", "must read like"),
    ],
)
def test_wrong_splits(split, message):
    with pytest.raises(ValueError, match=message):
        data.load_digits(split)


@pytest.mark.slow
def test_importing_data_loads_neither_tfds_nor_tensorflow():
    program = (
        "import sys, fmjax.data\n"
        "print({'tensorflow_datasets', 'tensorflow', 'flax'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert out.stdout.strip() == "set()", out.stderr


def test_unknown_name_suggests_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="got 'cifer10'. Did you mean 'cifar10'?"):
        data.load("cifer10", "train", tmp_path)


def test_an_unprepared_data_set_of_tfds_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ValueError, match=f"kmnist must be prepared in {tmp_path}.*tfds build"):
        data.load("kmnist", "train", tmp_path)


SPLITS = ["test[:64]", "test[9950:]", "test[33%:34%]", "test[-7:]", "test[:5]+train[-5:]"]


@pytest.mark.parametrize("split", SPLITS)
def test_cifar10_is_read_as_tfds_reads_it(shared_data_dir, split):
    import tensorflow_datasets as tfds

    loaded = data.load("cifar10", split, shared_data_dir)
    source = tfds.data_source("cifar10", split=split, data_dir=shared_data_dir)
    np.testing.assert_array_equal(loaded.images, [example["image"] for example in source])
    np.testing.assert_array_equal(loaded.labels, [example["label"] for example in source])


def test_mnist_is_read_as_tfds_reads_it(shared_data_dir, monkeypatch, capfd):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("TFDS_DATA_DIR", str(shared_data_dir))
    loaded = data.load("mnist", "test[100:150]")
    assert capfd.readouterr() == ("", "")  # reading is silent
    assert loaded.images.shape == (50, 28, 28, 1) and loaded.images.flags.c_contiguous
    source = tfds.data_source("mnist", split="test[100:150]", data_dir=shared_data_dir)
    np.testing.assert_array_equal(loaded.images, [example["image"] for example in source])
    np.testing.assert_array_equal(loaded.labels, [example["label"] for example in source])


def test_cifar10_class_names_are_the_stock_ones(shared_data_dir):
    names = (shared_data_dir / "cifar10" / "3.0.2" / "label.labels.txt").read_text().split()
    assert list(archives.SOURCES["cifar10"].label_names) == names


def test_wrong_splits_of_a_prepared_data_set(shared_data_dir):
    with pytest.raises(ValueError, match="one of train, test; got 'validation'"):
        data.load("cifar10", "validation", shared_data_dir)
    with pytest.raises(ValueError, match="0 to at most the 10000 of 'test'.*10000 to 10000"):
        data.load("cifar10", "test[10000:]", shared_data_dir)


def fake_builder(features, examples):
    """A stand-in for TFDS's builder: what a prepared data set of another kind would give."""
    info = SimpleNamespace(splits={"train": SimpleNamespace(num_examples=len(examples))})
    info.features = features

    def as_data_source(split, decoders):
        return SimpleNamespace(__getitems__=lambda rows: [examples[i] for i in rows])

    return SimpleNamespace(info=info, as_data_source=as_data_source)


def load_fake(monkeypatch, shape, sizes, labels, **other):
    import io

    import tensorflow_datasets as tfds
    from PIL import Image

    examples = []
    for size, label in zip(sizes, labels, strict=True):
        Image.new("RGB", size).save(buffer := io.BytesIO(), "PNG")
        examples.append({"image": buffer.getvalue(), "label": label})
    features = {
        "image": tfds.features.Image(shape=shape),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    builder = fake_builder(features | other, examples)
    monkeypatch.setattr("fmjax.data.tfds._builder", lambda *args: builder)
    return data.load("fake", "train")


def test_load_refuses_what_is_no_classification_set(monkeypatch):
    import tensorflow_datasets as tfds

    shape = (None, None, 3)
    assert load_fake(monkeypatch, shape, [(4, 6)] * 2, [0, 2]).images.shape == (2, 6, 4, 3)
    with pytest.raises(ValueError, match=r"labels must be in 0..2; got -1..1 in fake, train"):
        load_fake(monkeypatch, shape, [(4, 4)] * 2, [-1, 1])
    with pytest.raises(ValueError, match=r"labels must be in 0..2; got 0..3"):
        load_fake(monkeypatch, shape, [(4, 4)] * 2, [0, 3])
    with pytest.raises(ValueError, match="images of one size"):
        load_fake(monkeypatch, shape, [(4, 4), (4, 5)], [0, 1])
    with pytest.raises(ValueError, match="classes under 'label'"):
        load_fake(monkeypatch, shape, [(4, 4)], [0], label=tfds.features.Text())
    with pytest.raises(ValueError, match="8-bit images under 'image'"):
        deep = tfds.features.Image(shape=(4, 4, 1), dtype=np.uint16)
        load_fake(monkeypatch, shape, [(4, 4)], [0], image=deep)
    with pytest.raises(ValueError, match="8-bit images under 'image'"):
        load_fake(monkeypatch, shape, [(4, 4)], [0], image=tfds.features.Text())
