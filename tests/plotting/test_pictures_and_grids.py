"""Pictures and grids of images: known pixels at known places, files whole or absent."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fmjax import plotting

WHITE, BLACK = 255, 0


def flat(*levels, size=8, channel=1):
    """Images of one level each, `[num, size, size, channel]`."""
    return np.broadcast_to(
        np.array(levels, np.uint8)[:, None, None, None], (len(levels), size, size, channel)
    )


def cell(sheet, row, column, size=64):
    """The pixels of one image of a grid, without the white around it."""
    y, x = 4 + row * (size + 4), 4 + column * (size + 4)
    return sheet[y : y + size, x : x + size]


def border(sheet, row, column, size=64):
    y, x = row * (size + 4), column * (size + 4)
    return np.concatenate([sheet[y : y + 4, x : x + size].ravel(), sheet[y : y + size, x].ravel()])


def test_a_grid_puts_every_image_at_its_place_enlarged():
    sheet = plotting.grid(flat(0, 4, 8, 12, 16), columns=3, num_levels=17)
    assert sheet.shape == (2 * 68 + 4, 3 * 68 + 4, 3) and sheet.dtype == np.uint8
    expected = [[0, 64, 128], [191, 255, WHITE]]  # round(255 l / 16), and the empty place
    for row, column in np.ndindex(2, 3):
        assert np.unique(cell(sheet, row, column)).tolist() == [expected[row][column]]
        assert np.unique(border(sheet, row, column)).tolist() == [WHITE]


def test_a_pixel_of_an_enlarged_image_is_a_block():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 5, 7] = [10, 20, 30]
    sheet = plotting.grid(jnp.asarray(image))  # twice as large
    assert sheet.shape == (72, 72, 3)
    found = np.argwhere((sheet == [10, 20, 30]).all(axis=-1))
    assert found.tolist() == [[14, 18], [14, 19], [15, 18], [15, 19]]


@pytest.mark.parametrize(
    ("size", "shape"), [(8, (64, 64)), (28, (56, 56)), (64, (64, 64)), (200, (200, 200))]
)
def test_images_come_to_about_64_pixels_by_a_whole_factor(size, shape):
    sheet = plotting.grid(flat(0, size=size))
    assert sheet.shape[:2] == (shape[0] + 8, shape[1] + 8)


def test_without_columns_a_grid_is_about_square():
    assert plotting.grid(flat(*range(10))).shape[:2] == (3 * 68 + 4, 4 * 68 + 4)


def test_other_channels_are_side_by_side():
    image = np.zeros((1, 64, 64, 2), np.uint8)
    image[..., 1] = 200
    sheet = plotting.grid(image)
    assert sheet.shape == (72, 136, 3)
    assert (sheet[4:68, 4:68] == 0).all() and (sheet[4:68, 68:132] == 200).all()


def test_a_grid_by_class_has_a_row_for_each():
    """In the order in which they come, filled up with white."""
    labels = np.array([7, 3, 7, 7, 0])
    sheet = plotting.by_class(flat(1, 2, 3, 4, 5), labels, 17)
    rows = [[cell(sheet, row, column)[0, 0, 0] for column in range(3)] for row in range(3)]
    bytes_of = np.round(np.arange(17) * 255 / 16).astype(int)
    assert rows == [
        [bytes_of[1], bytes_of[3], bytes_of[4]],
        [bytes_of[2], WHITE, WHITE],
        [bytes_of[5], WHITE, WHITE],
    ]


def test_rows_come_in_the_order_that_is_asked_for_and_a_class_without_images_is_white():
    sheet = plotting.by_class(flat(10, 20, 30), [2, 0, 2], classes=[0, 1, 2])
    rows = [[cell(sheet, row, column)[0, 0, 0] for column in range(2)] for row in range(3)]
    assert rows == [[20, WHITE], [WHITE, WHITE], [10, 30]]
    with pytest.raises(ValueError, match=r"without \[2\]"):
        plotting.by_class(flat(10, 20, 30), [2, 0, 2], classes=[0, 1])


def test_two_pictures_beside_each_other_keep_their_pixels_and_a_gap():
    left, right = np.full((40, 50, 3), 10, np.uint8), np.full((30, 20, 3), 20, np.uint8)
    sheet = plotting.beside(left, right, gap=16)
    assert sheet.shape == (40, 86, 3)
    assert (sheet[:, :50] == 10).all() and (sheet[:30, 66:] == 20).all()
    assert (sheet[30:, 66:] == WHITE).all()
    gap = sheet[:, 50:66]
    assert (gap[:, 8] == 170).all() and (np.delete(gap, 8, axis=1) == WHITE).all()


def test_real_and_drawn_rows_of_a_class_are_level():
    real = plotting.by_class(flat(10, 11), [0, 1], classes=[0, 1])
    drawn = plotting.by_class(flat(20, 21, 22), [1, 0, 1], classes=[0, 1])
    sheet = plotting.beside(real, drawn, gap=32)
    right = sheet[:, real.shape[1] + 32 :]
    assert [cell(sheet, row, 0)[0, 0, 0] for row in range(2)] == [10, 11]
    assert [cell(right, row, 0)[0, 0, 0] for row in range(2)] == [21, 20]


@pytest.mark.parametrize("channel", [1, 3])
def test_one_image_is_a_picture_pixel_by_pixel_and_comes_back_from_its_file(tmp_path, channel):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channel), dtype=np.uint8)
    picture = plotting.picture(image)
    np.testing.assert_array_equal(picture, np.broadcast_to(image, (5, 7, 3)))
    plotting.save(tmp_path / "a.png", picture)
    read = Image.open(tmp_path / "a.png")
    assert read.mode == {1: "L", 3: "RGB"}[channel]
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), picture)


def test_nothing_is_left_of_a_picture_that_can_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    plotting.save(str(path), np.zeros((4, 4, 3), np.uint8))
    before = path.read_bytes()

    def fail(self, file, **kwargs):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        plotting.save(path, np.ones((4, 4, 3), np.uint8))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.grid(np.zeros((8, 8, 1), np.uint8)), r"images\[None\]"),
        (lambda: plotting.grid(np.zeros((0, 8, 8, 1), np.uint8)), "at least one"),
        (lambda: plotting.grid(np.zeros((1, 8, 8, 1))), "must be integers.*float64"),
        (lambda: plotting.grid(flat(17), num_levels=17), r"0..16; got 17 to 17"),
        (lambda: plotting.grid(flat(1).astype(int) - 2), "got -1 to -1"),
        (lambda: plotting.grid(flat(1), num_levels=1), "num_levels must be 2 or more; got 1"),
        (lambda: plotting.grid(flat(1), columns=0), "columns must be 1 or more; got 0"),
        (lambda: plotting.by_class(flat(1, 2), [0]), r"one for each of 2.*\(1,\)"),
        (lambda: plotting.by_class(flat(1, 2), [0.0, 1.0]), "integers.*float64"),
        (lambda: plotting.picture(np.zeros((4, 4, 2), np.uint8)), r"1 or 3 channels.*\(4, 4, 2\)"),
        (lambda: plotting.save("no.png", np.zeros((4, 4, 3))), "uint8.*float64"),
        (lambda: plotting.save("no.png", np.zeros((4, 4), np.uint8)), r"\(4, 4\)"),
        (lambda: plotting.beside(*np.zeros((2, 4, 4, 3), np.uint8), gap=0), "gap must be 1"),
        (lambda: plotting.beside(np.zeros((4, 4, 3)), np.zeros((4, 4, 3), np.uint8)), "float64"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
