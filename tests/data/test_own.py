"""Pictures of one's own: folders and .npz files, what is held out, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fmjax import data
from fmjax.data import own

RNG = np.random.default_rng(0)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def colour(k, height=6, width=6):
    """A picture of one colour, by which it is known again."""
    return np.full((height, width, 3), (10 * k, 255 - 10 * k, k), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """20 pictures in two classes, PNG and BMP; a note and a hidden file that are no pictures."""
    for k in range(20):
        name, suffix = ("cat", "dog")[k % 2], (".png", ".BMP")[k // 2 % 2]
        save(tmp_path / name / f"{k:02d}{suffix}", colour(k))
    (tmp_path / "README.txt").write_text("pictures")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"no picture")
    return tmp_path


def numbers(dataset):
    return [int(image[0, 0, 2]) for image in dataset.images]


def test_folders_are_classes_and_of_each_some_are_held_out(folder):
    train, test = (data.load_folder(folder, split) for split in ("train", "test"))
    assert train.num_classes == 2 and train.num_levels == 256
    assert train.images.shape[1:] == (6, 6, 3) and train.images.dtype == np.uint8
    assert sorted(numbers(train) + numbers(test)) == list(range(20))
    for part in (train, test):
        np.testing.assert_array_equal(part.labels, [k % 2 for k in numbers(part)])
        for k, image in zip(numbers(part), part.images, strict=True):
            np.testing.assert_array_equal(image, colour(k))
    assert {*test.labels} == {0, 1} and len(test.images) <= 5


def test_the_division_is_fixed_and_a_slice_has_all_classes(folder):
    first = data.load_folder(folder, "train")
    assert numbers(data.load_folder(folder, "train")) == numbers(first)
    assert numbers(data.load_folder(folder, "train[:8]")) == numbers(first)[:8]
    assert {*data.load_folder(folder, "train[:8]").labels} == {0, 1}
    assert len(data.load_folder(folder, "train+test").images) == 20
    others = {tuple(numbers(data.load_folder(folder, "test", seed=seed))) for seed in range(8)}
    assert len(others) > 2
    # Pictures that come later leave the others where they are.
    for k in range(20, 26):
        save(folder / "cat" / f"0{k}.png", colour(k))
    more = [numbers(data.load_folder(folder, split)) for split in ("train", "test")]
    assert {*numbers(first)} == {*more[0]} & {*range(20)} and len(more[0]) + len(more[1]) == 26


def test_about_a_tenth_is_held_out():
    rows = own._hold_out(np.arange(20_000), [f"cat/{k}.png" for k in range(20_000)], seed=0)
    assert abs(len(rows["test"]) / 20_000 - 0.1) < 5 * (0.09 / 20_000) ** 0.5
    assert sorted([*rows["train"], *rows["test"]]) == list(range(20_000))


@pytest.mark.parametrize(
    "names", [("train", "val"), ("train", "val", "test"), ("Train", "Test"), ("train",)]
)
def test_folders_called_like_splits_are_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name / "cat" / "a.png", colour(1))
    held = ", ".join(sorted(names))
    with pytest.raises(ValueError, match=f"just train and test; .* holds {held}"):
        data.load_folder(tmp_path, "train")


def test_folders_named_train_and_test_are_the_splits(tmp_path):
    for k in range(12):
        part, name = ("train", "test")[k % 3 == 2], ("cat", "dog")[k % 2]
        save(tmp_path / part / name / f"{k}.png", colour(k))
    train, test = (data.load_folder(tmp_path, split) for split in ("train", "test"))
    assert sorted(numbers(test)) == [2, 5, 8, 11] and len(train.images) == 8
    for part in (train, test):
        np.testing.assert_array_equal(part.labels, [k % 2 for k in numbers(part)])
    for picture in (tmp_path / "train" / "cat").iterdir():
        picture.unlink()
    with pytest.raises(ValueError, match="none of cat in train, and pictures of 1 of 2 classes"):
        data.load_folder(tmp_path, "train")


def test_pictures_without_folders_are_one_class(tmp_path):
    for k in range(10):
        save(tmp_path / f"{k}.png", colour(k))
    dataset = data.load_folder(tmp_path, "train")
    assert dataset.num_classes == 1 and not dataset.labels.any() and len(dataset.images) < 10
    (tmp_path / "more").mkdir()  # an empty folder is no class
    assert data.load_folder(tmp_path, "train").num_classes == 1
    save(tmp_path / "more" / "a.png", colour(11))
    with pytest.raises(ValueError, match="got 0.png beside the folder more"):
        data.load_folder(tmp_path, "train")


def test_sizes_are_refused_by_name_or_become_one(folder):
    save(folder / "dog" / "wide.png", colour(21, height=8, width=16))
    with pytest.raises(ValueError, match=r"of one size: .*\.(png|BMP) is .*wide.png is 16x8"):
        data.load_folder(folder, "train+test")
    dataset = data.load_folder(folder, "train+test", image_size=4)
    assert dataset.images.shape == (21, 4, 4, 3)
    for k, image in zip(numbers(dataset), dataset.images, strict=True):
        np.testing.assert_array_equal(image, colour(k, 4, 4))
    with pytest.raises(ValueError, match="image_size must be positive"):
        data.load_folder(folder, "train", image_size=0)


def test_the_middle_of_a_wide_picture_is_taken(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    save(tmp_path / "a.png", wide)
    np.testing.assert_array_equal(data.load_folder(tmp_path, "train", image_size=8).images, 200)


def test_grey_colour_transparency_and_rotation(tmp_path):
    grey = RNG.integers(256, size=(4, 4), dtype=np.uint8)
    save(tmp_path / "grey" / "a.png", grey)
    save(tmp_path / "grey" / "b.png", grey)
    only = data.load_folder(tmp_path / "grey", "train")
    np.testing.assert_array_equal(only.images, grey[None, ..., None])
    save(tmp_path / "grey" / "c.png", colour(3, 4, 4))  # one in colour: three channels for all
    mixed = data.load_folder(tmp_path / "grey", "train+test")
    assert mixed.images.shape == (3, 4, 4, 3)
    assert sum((image == grey[..., None]).all() for image in mixed.images) == 2

    rgba = np.dstack([colour(5, 4, 4), np.full((4, 4), 255, np.uint8)])
    rgba[:2, :, 3] = 0  # the upper half can't be seen
    save(tmp_path / "clear" / "a.png", rgba)
    image = data.load_folder(tmp_path / "clear", "train").images[0]
    np.testing.assert_array_equal(image[:2], 255)
    np.testing.assert_array_equal(image[2:], colour(5, 2, 4))

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter: its left column is shown on top
    turned = np.zeros((4, 8), np.uint8)
    turned[:, 0] = 255
    save(tmp_path / "turned" / "a.png", turned, exif=exif)
    shown = data.load_folder(tmp_path / "turned", "train").images[0, ..., 0]
    assert shown.shape == (8, 4) and (shown[0] == 255).all() and not shown[1:].any()


def test_one_unreadable_picture_of_many_is_named(folder):
    (folder / "dog" / ".ipynb_checkpoints").mkdir()
    (folder / "dog" / ".ipynb_checkpoints" / "a.png").write_bytes(b"passed over")
    (folder / "dog" / "broken.png").write_bytes(b"no picture")
    whole = io.BytesIO()
    Image.fromarray(colour(1, 64, 64)).save(whole, "JPEG")
    (folder / "cat" / "cut.jpg").write_bytes(whole.getvalue()[:300])
    save(folder / "cat" / "deep.png", np.zeros((6, 6), np.uint16))
    with pytest.raises(ValueError, match="3 of 23 are not: ") as error:
        data.load_folder(folder, "train+test")
    for said in (
        "broken.png (it can't be read)",
        "cut.jpg (it can't be read)",
        "deep.png (more",
    ):
        assert said in str(error.value)


def test_what_is_no_folder_of_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere of pictures"):
        data.load_folder(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="must hold pictures, .png, .*; got none"):
        data.load_folder(tmp_path, "train")
    save(tmp_path / "a.png", colour(1))
    with pytest.raises(ValueError, match="split must be one of train, test; got 'validation'"):
        data.load_folder(tmp_path, "validation")
    with pytest.raises(ValueError, match="a slice must hold examples"):
        data.load_folder(tmp_path, "test[:1]")  # one picture: nothing is held out


def test_arrays_of_an_npz_file(tmp_path):
    images = RNG.integers(256, size=(30, 5, 4), dtype=np.uint8)
    labels = np.arange(30) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    train, test = (data.load_npz(tmp_path / "a.npz", split) for split in ("train", "test"))
    assert train.images.shape[1:] == (5, 4, 1) and train.num_classes == 3
    assert len(train.images) + len(test.images) == 30 and {*test.labels} == {0, 1, 2}
    for part in (train, test):
        for image, label in zip(part.images[..., 0], part.labels, strict=True):
            (row,) = np.flatnonzero((images == image).all((1, 2)))
            assert label == labels[row]
    held_out = {"test_images": images[20:], "test_labels": labels[:10]}
    np.savez(tmp_path / "b.npz", images=images[:20], labels=labels[:20], **held_out)
    test = data.load_npz(tmp_path / "b.npz", "test")
    assert {x.tobytes() for x in test.images} == {x.tobytes() for x in images[20:]}
    assert {*test.labels} == {0, 1, 2} and test.num_classes == 3


ZEROS = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": ZEROS}, "must hold an array `images`; it holds pictures"),
        ({"images": np.zeros((2, 4, 4))}, r"must be uint8 .*got float64 \(2, 4, 4\)"),
        ({"images": ZEROS[0]}, r"got uint8 \(4, 4\)"),
        ({"images": ZEROS[:0]}, "not empty"),
        ({"images": ZEROS, "labels": np.zeros(3, int)}, "whole numbers"),
        ({"images": ZEROS, "labels": np.array([0, -1])}, "whole numbers"),
        ({"images": ZEROS, "labels": np.zeros(2)}, "whole numbers"),
        ({"images": ZEROS, "test_images": ZEROS[:, :3]}, "must have one shape"),
        ({"images": ZEROS, "labels": np.array([0, 2**31])}, "from 0 to 2147483648"),
        ({"images": ZEROS, "labels": np.array([1, 1])}, "has none of 0 in train"),
        ({"images": ZEROS, "test_images": ZEROS, "labels": np.zeros(2, int)}, "or none of them"),
        ({"images": ZEROS, "test_labels": np.zeros(2, int)}, "or none of them"),
    ],
)
def test_arrays_of_another_kind(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load_npz(tmp_path / "a.npz", "train")


def test_a_file_that_is_no_archive_or_holds_objects(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match="must be an .npz file of arrays"):
        data.load_npz(tmp_path / "a.npz", "train")
    np.savez(tmp_path / "a.npz", images=np.array([{}], object))
    with pytest.raises(ValueError, match="must be an .npz file of arrays"):
        data.load_npz(tmp_path / "a.npz", "train")
    np.save(tmp_path / "c.npy", ZEROS)
    with pytest.raises(ValueError, match="must be an .npz file of arrays"):
        data.load_npz(tmp_path / "c.npy", "train")
    with pytest.raises(FileNotFoundError, match="There is no file .*: it does not exist"):
        data.load_npz(tmp_path / "b.npz", "train")
    with pytest.raises(FileNotFoundError, match="There is no file .*: it is a folder"):
        data.load_npz(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="There is no folder .*: it is a file"):
        data.load_folder(tmp_path / "a.npz", "train")


def test_sixteen_bits_in_colour_are_refused(tmp_path):
    """Pillow opens such a PNG as one of 8 bits, and says so nowhere but in what it will read."""
    raw = b"".join(b"\0" + bytes(6 * 4) for _ in range(4))

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert Image.open(tmp_path / "a.png").mode == "RGB"
    with pytest.raises(ValueError, match="a.png .more than 8 bits a channel"):
        data.load_folder(tmp_path, "train")
