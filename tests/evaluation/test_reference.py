"""References: computed once, reused to the bit, refused when damaged or another encoder's."""

import hashlib
import json

import numpy as np
import pytest

from fmjax.evaluation import reference
from fmjax.evaluation.reference import encode, load, load_or_compute
from fmjax.harness.records import write_whole
from fmjax.metrics.encoders import Encoder

IMAGES = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 1), np.uint8)
SETTINGS = dict(dataset_name="set", split="train", images=IMAGES, batch_size=5)
WEIGHTS = np.random.default_rng(1).standard_normal((16, 3), np.float32)


def project(images):
    """Row by row, so that no batch-mate can change a bit."""
    return np.stack([image.reshape(-1).astype(np.float32) @ WEIGHTS for image in images])


class Counter:
    """An encoder that remembers the shapes it was called with."""

    def __init__(self):
        self.shapes = []

    def __call__(self, images):
        self.shapes.append(images.shape)
        return project(images)


def make(function=project, name="projection, protocol A", digest="0" * 64):
    return Encoder(name, digest, function, None, 3)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def only(folder, ending):
    (path,) = folder.glob(f"*{ending}")
    return path


def test_computed_once_in_batches_of_one_shape_then_reused_to_the_bit(tmp_path):
    counter = Counter()
    first = load_or_compute(tmp_path, make(counter), **SETTINGS)
    assert counter.shapes == [(5, 4, 4, 1)] * 5  # 23 images: the last batch is filled up
    again = load_or_compute(tmp_path, make(counter), **SETTINGS | {"batch_size": 7})
    assert len(counter.shapes) == 5 and len(files(tmp_path)) == 2
    assert again.record == first.record
    np.testing.assert_array_equal(again.features, first.features)
    for a, b in zip(again.moments, first.moments, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_figures_are_those_of_the_images_in_their_order(tmp_path):
    result = load_or_compute(tmp_path, make(), **SETTINGS)
    assert result.features.dtype == np.float32
    np.testing.assert_array_equal(result.features, project(IMAGES))
    exact = project(IMAGES).astype(np.float64)
    assert result.moments.num == 23
    np.testing.assert_allclose(result.moments.mean, exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.moments.covariance, np.cov(exact.T), rtol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 1000])
def test_every_batch_size_gives_every_image_once(batch_size):
    counter = Counter()
    features = encode(make(counter), IMAGES, batch_size=batch_size)
    np.testing.assert_array_equal(features, project(IMAGES))
    assert len(set(counter.shapes)) == 1


def test_the_record_says_what_the_figures_rest_on(tmp_path):
    record = load_or_compute(tmp_path, make(), **SETTINGS).record
    arrays = only(tmp_path, ".npz").read_bytes()
    assert json.loads(only(tmp_path, ".json").read_text()) == record
    assert record == {
        "dataset": "set",
        "split": "train",
        "num_images": 23,
        "image_shape": [4, 4, 1],
        "images_sha256": hashlib.sha256(IMAGES.tobytes()).hexdigest(),
        "encoder": "projection, protocol A",
        "encoder_digest": "0" * 64,
        "num_features": 3,
        "arrays_sha256": hashlib.sha256(arrays).hexdigest(),
    }


def test_images_are_hashed_whole_whatever_their_layout():
    strided = np.asfortranarray(IMAGES)
    identity = reference.identify(make(), "set", "train", strided)
    assert identity["images_sha256"] == hashlib.sha256(IMAGES.tobytes()).hexdigest()


OTHER_IMAGES = IMAGES.copy()
OTHER_IMAGES[-1, -1, -1, -1] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": make(digest="1" * 64)},
        {"encoder": make(name="projection, protocol B")},
        {"dataset_name": "other"},
        {"split": "test"},
        {"images": OTHER_IMAGES},
        {"images": IMAGES[::-1]},
        {"images": IMAGES.reshape(23, 2, 8, 1)},
    ],
)
def test_whatever_differs_gives_another_file(tmp_path, change):
    first = load_or_compute(tmp_path, make(), **SETTINGS)
    load_or_compute(tmp_path, **{"encoder": make()} | SETTINGS | change)
    assert len(files(tmp_path)) == 4
    np.testing.assert_array_equal(
        load_or_compute(tmp_path, make(), **SETTINGS).features, first.features
    )


def test_a_name_cannot_leave_the_folder(tmp_path):
    folder = tmp_path / "statistics, ü"
    load_or_compute(folder, make(), **SETTINGS | {"dataset_name": "../../set/3.0"})
    assert files(tmp_path) == ["statistics, ü"] and len(files(folder)) == 2


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def another_split(path):
    path.write_text(path.read_text().replace('"train"', '"test"'))


def no_hash(path):
    record = json.loads(path.read_text())
    del record["arrays_sha256"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("ending", "damage"),
    [
        (".npz", flip_a_bit),
        (".npz", truncate),
        (".npz", empty),
        (".json", truncate),
        (".json", empty),
        (".json", another_split),
        (".json", no_hash),
    ],
)
def test_a_damaged_file_is_named_and_made_anew_once_deleted(tmp_path, ending, damage):
    counter = Counter()
    first = load_or_compute(tmp_path, make(counter), **SETTINGS)
    path = only(tmp_path, ending)
    damage(path)
    with pytest.raises(ValueError, match="is damaged: .* Delete") as error:
        load_or_compute(tmp_path, make(counter), **SETTINGS)
    assert str(path) in str(error.value) and len(counter.shapes) == 5
    for name in files(tmp_path):
        (tmp_path / name).unlink()
    again = load_or_compute(tmp_path, make(counter), **SETTINGS)
    np.testing.assert_array_equal(again.features, first.features)


def test_arrays_that_would_need_pickle_are_refused(tmp_path):
    load_or_compute(tmp_path, make(), **SETTINGS)
    path, record = only(tmp_path, ".npz"), only(tmp_path, ".json")
    np.savez(path, features=np.array([print], object), mean=np.zeros(3), covariance=np.eye(3))
    changed = json.loads(record.read_text())
    changed["arrays_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_or_compute(tmp_path, make(), **SETTINGS)


def test_arrays_without_a_record_are_not_whole_and_a_record_without_arrays_is_an_error(tmp_path):
    counter = Counter()
    load_or_compute(tmp_path, make(counter), **SETTINGS)
    only(tmp_path, ".json").unlink()
    load_or_compute(tmp_path, make(counter), **SETTINGS)
    assert len(counter.shapes) == 10 and len(files(tmp_path)) == 2
    only(tmp_path, ".npz").unlink()
    with pytest.raises(FileNotFoundError, match="npz is not there"):
        load_or_compute(tmp_path, make(counter), **SETTINGS)


def test_a_file_named_outright_must_be_of_the_same_encoder_and_protocol(tmp_path):
    first = load_or_compute(tmp_path, make(), **SETTINGS)
    path = only(tmp_path, ".npz")
    np.testing.assert_array_equal(load(path, make()).features, first.features)
    with pytest.raises(ValueError, match="two encoders or protocols .* protocol A .* protocol B"):
        load(path, make(name="projection, protocol B"))
    with pytest.raises(ValueError, match="two encoders or protocols .* 000000000000.*111111111111"):
        load(path, make(digest="1" * 64))
    with pytest.raises(FileNotFoundError, match="no such.npz is not there"):
        load(tmp_path / "no such.npz", make())


def test_an_encoder_that_fails_leaves_nothing(tmp_path):
    calls = []

    def fails(images):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return project(images)

    with pytest.raises(RuntimeError):
        load_or_compute(tmp_path, make(fails), **SETTINGS)
    assert files(tmp_path) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, write)
    assert files(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize(
    "images", [IMAGES[0], IMAGES.astype(np.float32), IMAGES[:0], IMAGES.astype(np.int32)]
)
def test_images_of_another_kind_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, height, width, channel\]"):
        load_or_compute(tmp_path, make(), **SETTINGS | {"images": images})
    with pytest.raises(ValueError, match="images must be uint8"):
        encode(make(), images, batch_size=5)


def test_batch_size_is_positive(tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        load_or_compute(tmp_path, make(), **SETTINGS | {"batch_size": 0})


def nan(images):
    return np.full((len(images), 3), np.nan, np.float32)


@pytest.mark.parametrize("function", [nan, lambda x: project(x)[:, :2], lambda x: project(x)[:-1]])
def test_features_of_another_shape_or_not_finite_are_refused(tmp_path, function):
    with pytest.raises(ValueError, match=r"finite features of shape \(5, 3\)"):
        load_or_compute(tmp_path, make(function), **SETTINGS)
    assert files(tmp_path) == []
