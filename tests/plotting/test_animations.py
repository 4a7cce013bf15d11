"""GIFs read back by Pillow: their frames, times and colours; and the frames' makers."""

import numpy as np
import pytest
from PIL import Image, ImageSequence

from fmjax import plotting
from fmjax.data import pixels
from fmjax.plotting import animations

EXTENT = (-3.0, 3.0, -3.0, 3.0)


def squares(num, size=32):
    """White frames in which an orange square moves to the right."""
    frames = np.full((num, size, size, 3), 255, np.uint8)
    for k in range(num):
        frames[k, 4:8, 2 + 2 * k : 6 + 2 * k] = [217, 118, 43]
    return frames


def read(path):
    with Image.open(path) as gif:
        frames = [
            (frame.info["duration"], np.asarray(frame.convert("RGB")))
            for frame in ImageSequence.Iterator(gif)
        ]
        return gif.info.get("loop"), frames


def test_a_gif_has_its_frames_their_times_and_colours(tmp_path):
    frames = squares(8)
    plotting.animation(frames, tmp_path / "a.gif", seconds=1.0, hold=1.5)
    loop, found = read(tmp_path / "a.gif")
    assert loop == 0  # for ever
    durations = [duration for duration, _ in found]
    assert len(found) == 8 and sum(durations[:-1]) == 1000 and durations[-1] == 1500
    assert max(durations[:-1]) - min(durations[:-1]) <= 10  # hundredths of a second
    np.testing.assert_array_equal(np.stack([frame for _, frame in found]), frames)


def test_frames_of_many_colours_keep_their_background_and_are_close(tmp_path):
    frames = np.full((3, 40, 60, 3), 255, np.uint8)
    ramp = np.linspace(0, 254, 30 * 20).reshape(30, 20)
    frames[:, 5:35, 20:40] = np.stack([ramp, ramp[::-1], 254 - ramp], axis=-1)
    frames[1, 5:35, 20:40] //= 2
    frames[2, 5:35, 20:40] //= 4
    plotting.animation(list(frames), tmp_path / "a.gif")
    _, found = read(tmp_path / "a.gif")
    for frame, (_, back) in zip(frames, found, strict=True):
        white = (frame == 255).all(axis=-1)
        assert (back[white] == 255).all()
        # 1,200 colours in 256: a few levels off, eight at the worst on a smooth ramp.
        assert np.abs(back.astype(int) - frame).max() <= 8


def test_the_background_is_no_mean_with_colours_near_it(tmp_path):
    frames = np.full((2, 60, 60, 3), 255, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 60, 3))
    noise[:, :10] = 240 + noise[:, :10] // 17  # almost white
    frames[:, :30] = noise
    plotting.animation(frames, tmp_path / "a.gif")
    for _, back in read(tmp_path / "a.gif")[1]:
        assert (back[30:] == 255).all()


def test_a_single_frame_and_frames_that_stand_still(tmp_path):
    plotting.animation(squares(1), tmp_path / "a.gif", hold=3.0)
    assert Image.open(tmp_path / "a.gif").size == (32, 32)
    plotting.animation(squares(2)[[0, 0, 1]], tmp_path / "b.gif", seconds=1.0, hold=0.5)
    assert [duration for duration, _ in read(tmp_path / "b.gif")[1]] == [1000, 500]


def test_nothing_is_left_of_a_gif_that_can_not_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    plotting.animation(squares(2), path)
    before = path.read_bytes()

    def fail(self, file, **kwargs):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="No space"):
        plotting.animation(squares(3), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def flow(num_times=3):
    x0 = np.random.default_rng(0).standard_normal((200, 2))
    x0[0] = [8.0, 5.0]  # outside the density's extent
    return np.linspace(1.0, 0.2, num_times)[:, None, None] * x0


def test_frames_of_a_flow_hold_every_point_on_one_scale_of_colours(monkeypatch):
    figures = []

    class Canvas(animations.FigureCanvasAgg):
        def __init__(self, figure):
            figures.append(figure)
            super().__init__(figure)

    monkeypatch.setattr(animations, "FigureCanvasAgg", Canvas)
    x, side = flow(), 100
    square = np.square(plotting.grid_points(EXTENT, side)).sum(axis=1).reshape(side, side)
    densities = np.stack([np.exp(-square / 2 / s**2) / s**2 for s in (1.0, 0.6, 0.2)])
    frames = plotting.plane_frames(x, densities, EXTENT, t=[0.0, 0.5, 1.0])
    assert frames.shape == (3, 330, 640, 3) and frames.dtype == np.uint8
    left, right = figures[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    low, high = np.array([left.get_xlim(), left.get_ylim()]).T
    assert (x >= low).all() and (x <= high).all()
    assert left.get_title() == "samples, t = 1.00"
    np.testing.assert_allclose(left.collections[0].get_offsets(), x[-1])
    assert right.images[0].get_clim() == (0.0, densities.max())
    edges = [np.flatnonzero((frame != 255).any(axis=-1).sum(axis=0) > 200) for frame in frames]
    assert len(edges[0]) >= 4 and all(np.array_equal(edge, edges[0]) for edge in edges)
    # The density's middle grows darker, and the points come together.
    column, row = right.transData.transform([0.0, 0.0]).round().astype(int)
    middle = frames[:, 330 - row, column].astype(int).sum(axis=-1)
    assert middle[0] > middle[1] > middle[2] and middle[2] < 200
    inked = [(frame[40:320, 10:310] != 255).any(axis=-1) for frame in frames]
    assert np.ptp(np.argwhere(inked[0])[:, 0]) >= np.ptp(np.argwhere(inked[2])[:, 0])


def test_frames_of_images_are_the_grids_of_their_quantised_values():
    x = np.random.default_rng(0).normal(0.0, 0.7, (2, 5, 8, 8, 1)).astype(np.float32)
    frames = plotting.image_frames(x, 17, 3)
    for frame, images in zip(frames, x, strict=True):
        levels = np.asarray(pixels.quantize(images, 17))
        np.testing.assert_array_equal(frame, plotting.grid(levels, columns=3, num_levels=17))
    assert (np.abs(x) > 1).any()  # clipped


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.animation([], "no.gif"), "got 0"),
        (lambda: plotting.animation([squares(1)[0], squares(1, 16)[0]], "no.gif"), "one size"),
        (lambda: plotting.animation(squares(2) / 255, "no.gif"), "uint8.*float64"),
        (lambda: plotting.animation(squares(6), "no.gif", seconds=0.05), "at least 0.02 seconds"),
        (lambda: plotting.animation(squares(6), "no.gif", hold=0.0), "hold=0.0"),
        (lambda: plotting.plane_frames(flow(), np.ones((2, 4, 4)), EXTENT), r"each of 3.*\(2, 4"),
        (lambda: plotting.plane_frames(flow(), -np.ones((3, 4, 4)), EXTENT), "not negative"),
        (lambda: plotting.plane_frames(flow(), np.ones((3, 4, 4)), EXTENT, t=[0.0]), r"\[3\]"),
        (lambda: plotting.plane_frames(flow()[0], np.ones((3, 4, 4)), EXTENT), "num_times, num, 2"),
        (lambda: plotting.image_frames(np.zeros((5, 8, 8, 1))), r"x\[None\]"),
        (lambda: plotting.image_frames(np.zeros((1, 5, 8, 8, 1), np.uint8)), "uint8"),
        (lambda: plotting.image_frames(np.full((1, 5, 8, 8, 1), np.nan)), "must be finite"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
