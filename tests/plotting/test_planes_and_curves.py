"""Curves and flows in the plane: what the axes hold, and the colours at known places."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fmjax import plotting
from fmjax.plotting import curves, planes
from fmjax.plotting.pictures import BLUE, GREY, ORANGE

EXTENT = (-3.0, 3.0, -3.0, 3.0)
CORNERS = [[-3.0, -3.0], [3.0, 3.0]]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are rendered, beside the pictures of them."""
    found = []

    def keep(figure):
        found.append(figure)
        return render(figure)

    render = planes.render
    for module in (planes, curves):
        monkeypatch.setattr(module, "render", keep)
    return found


def gaussian(points, scale=1.0):
    square = np.square(points / scale).sum(axis=-1)
    return np.exp(-square / 2) / (2 * math.pi * scale**2)


def flow(num_times=5, num=60):
    """Noise that shrinks to a tenth, one point from far outside."""
    x0 = np.random.default_rng(0).standard_normal((num, 2))
    x0[3] = [9.0, -7.0]
    return np.linspace(1.0, 0.1, num_times)[:, None, None] * x0


def shown(axes):
    return *axes.get_xlim(), *axes.get_ylim()


def inside(points, extent):
    left, right, bottom, top = extent
    x, y = np.reshape(points, (-1, 2)).T
    return ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).all()


def colours(picture, colour):
    """How many pixels of a picture have a colour, to within rounding."""
    target = 255 * np.array(to_rgb(colour))
    return int((np.abs(picture - target).max(axis=-1) <= 1).sum())


def test_limits_are_a_square_around_all_points():
    assert plotting.limits([[0.0, 0.0], [4.0, 2.0]], jnp.ones((2, 3, 2)), margin=0.0) == (
        0,
        4,
        -1,
        3,
    )
    assert plotting.limits([[1.0, 2.0]]) == (0.0, 2.0, 1.0, 3.0)  # a single point


@pytest.mark.parametrize("side", [50, 300])
def test_grid_points_are_centres_of_cells_row_by_row_from_the_bottom(side):
    extent = (-6.0, 7.0, -5.0, 8.0)
    points = plotting.grid_points(extent, side)
    width = 13.0 / side
    np.testing.assert_allclose(points[0], [-6.0 + width / 2, -5.0 + width / 2], rtol=1e-6)
    np.testing.assert_allclose(points[1] - points[0], [width, 0.0], atol=1e-6)
    # Their sum is an integral: a Gaussian's mass, to the last digits of float32.
    assert abs(gaussian(points).sum() * width**2 - 1.0) < 1e-5


def test_no_trajectory_is_cropped(figures):
    x = flow()
    picture = plotting.trajectories(jnp.asarray(x), num_lines=10)
    (axes,) = figures[0].axes
    assert inside(x, shown(axes)) and not inside(x, EXTENT)
    assert len(axes.lines) == 10
    np.testing.assert_allclose(axes.lines[3].get_xydata(), x[:, 3], rtol=1e-6)
    starts, ends = (np.asarray(points.get_offsets()) for points in axes.collections)
    np.testing.assert_allclose(starts, x[0, :10], rtol=1e-6)
    np.testing.assert_allclose(ends, x[-1], rtol=1e-6)
    assert picture.shape == (600, 600, 3)
    assert colours(picture, ORANGE) > 10 and colours(picture, BLUE) > 10


def test_a_density_is_dark_where_it_is_high_and_the_right_way_up(figures):
    centre = np.array([1.5, -2.0])  # right and below
    p = gaussian(plotting.grid_points(EXTENT, 300) - centre, 0.3).reshape(300, 300)
    picture = plotting.density(p, EXTENT)
    axes = figures[0].axes[0]
    x, y = axes.transData.transform(centre)
    darkness = 255 - picture[len(picture) - round(y)][round(x)].astype(int)
    assert darkness.sum() > 500  # #182c5c has 592
    x, y = axes.transData.transform([1.5, 2.0])
    assert (picture[len(picture) - round(y), round(x)] == 255).all()
    paler = plotting.density(p, EXTENT, highest=3 * p.max())
    assert paler.astype(int).sum() > picture.astype(int).sum()


def test_the_three_panels_hold_all_of_their_points(figures):
    x, data = flow(), np.random.default_rng(1).uniform(-2, 4, (300, 2))
    p = gaussian(plotting.grid_points(EXTENT, 300)).reshape(300, 300)
    picture = plotting.plane(data, x, p, EXTENT)
    left, middle, right = figures[0].axes
    assert shown(left) == shown(right)  # one scale for data and density
    assert inside(data, shown(left)) and inside(CORNERS, shown(right))
    assert inside(x, shown(middle))
    assert picture.shape == (492, 1440, 3)
    thirds = np.split(picture, 3, axis=1)
    assert [colours(third, GREY) > 50 for third in thirds] == [True, False, False]
    assert [colours(third, ORANGE) > 10 for third in thirds] == [False, True, False]


def test_samples_far_from_the_density_are_drawn_too(figures):
    data, samples = np.zeros((5, 2)), np.array([[0.0, 0.0], [20.0, 1.0]])
    p = gaussian(plotting.grid_points(EXTENT, 300)).reshape(300, 300)
    plotting.samples_and_density(data, samples, p, EXTENT)
    for axes in figures[0].axes[:3]:  # the fourth is the bar
        assert inside(samples, shown(axes)) and inside(CORNERS, shown(axes))


def test_the_loss_curve_holds_training_and_held_out_losses(figures):
    rows = [{"step": n, "loss": 1.0 + 1.0 / n} for n in range(1, 41)]
    rows += [{"step": 41, "loss": None}, {"step": 42, "loss": math.nan}]
    rows[9]["held_out_loss"], rows[19]["held_out_loss"] = 1.9, math.inf
    rows.append({"step": 40, "held_out_loss": 2.5})
    picture = plotting.loss_curve(rows)
    (axes,) = figures[0].axes
    batch, mean, held_out = axes.lines
    np.testing.assert_allclose(batch.get_xdata(), np.arange(1, 41))
    np.testing.assert_allclose(batch.get_ydata(), 1.0 + 1.0 / np.arange(1, 41))
    np.testing.assert_allclose(mean.get_ydata()[0], np.mean(1.0 + 1.0 / np.arange(1, 11)))
    assert mean.get_xdata()[0] == 10
    assert held_out.get_xydata().tolist() == [[10, 1.9], [40, 2.5]]
    low, high = axes.get_ylim()
    assert low < 1.025 and high > 2.5
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training", "training, mean of 10 rows", "held out"]
    assert colours(picture, ORANGE) > 10


def test_a_run_of_which_no_loss_is_finite_has_empty_axes(figures):
    picture = plotting.loss_curve([{"step": 1, "loss": None}])
    assert not figures[0].axes[0].lines and picture.shape == (432, 768, 3)
    plotting.loss_curve([{"step": 1, "loss": 0.0}])  # a single one, and no range at all


def test_the_cost_curve_has_a_line_for_each_solver(figures):
    def row(solver, num_steps, cost, error):
        return {
            "solver": solver,
            "num_steps": num_steps,
            "num_evaluations": cost,
            "quality": 0.1 + error,
            "standard_error": 0.02,
            "error_rms": error,
        }

    rows = [row("Euler", 16, 16, 0.2), row("Euler", 8, 8, 0.4), row("Tsit5", None, 40, 0.01)]
    rows += [row("Ralston", 9, 18, 0.1), row("jumps", 2, 2, 0.3)]
    rows += [row("Tsit5", None, 90, 0.0)]
    plotting.cost_curve(rows, label="distance")
    left, right = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert lines == {
        "Euler, equal steps": [[8, 0.4], [16, 0.2]],
        "Tsit5, adaptive": [[40, 0.01]],
        "Ralston, equal steps": [[18, 0.1]],
        "jumps": [[2, 0.3]],
    }
    np.testing.assert_allclose(left.lines[0].get_ydata(), [0.5, 0.3])
    assert left.lines[-1].get_ydata()[0] == 0.1  # the exact flow
    with pytest.raises(ValueError, match=r"some lack \['quality'\]"):
        plotting.cost_curve(
            [{k: v for k, v in r.items() if k != "quality"} for r in rows], label=""
        )
    with pytest.raises(ValueError, match="got 1"):
        plotting.cost_curve(rows[:1], label="distance")


P = np.ones((4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.limits(), "got none"),
        (lambda: plotting.limits(np.zeros((4, 3))), r"x\[..., :2\]"),
        (lambda: plotting.limits([[0.0, math.nan], [1.0, 1.0]]), "1 of 2 hold a NaN"),
        (lambda: plotting.limits([[0.0, 0.0]], margin=-1), "margin must be 0 or more; got -1"),
        (lambda: plotting.grid_points(EXTENT, 0), "side must be 1 or more; got 0"),
        (lambda: plotting.grid_points((3.0, -3.0, 0.0, 1.0)), "left < right"),
        (lambda: plotting.grid_points((0.0, math.nan, 0.0, 1.0)), "left < right"),
        (lambda: plotting.trajectories(np.zeros((4, 2))), r"\[num_times, num, 2\].*\(4, 2\)"),
        (lambda: plotting.trajectories(np.zeros((2, 4, 2)), num_lines=0), "num_lines"),
        (lambda: plotting.density(np.ones(16), EXTENT), r"reshape\(side, side\)"),
        (lambda: plotting.density(-P, EXTENT), "log-density needs numpy.exp"),
        (lambda: plotting.density(P * math.nan, EXTENT), "finite"),
        (lambda: plotting.density(P, EXTENT, highest=0.0), "highest must be positive"),
        (lambda: plotting.density(P, (0.0, 1.0)), "left, right, bottom, top"),
        (lambda: plotting.plane(np.zeros((4, 3)), np.zeros((2, 4, 2)), P, EXTENT), "data must be"),
        (
            lambda: plotting.plane(np.zeros((4, 2)), np.zeros((4, 2)), P, EXTENT),
            "trajectories must",
        ),
        (lambda: plotting.loss_curve([{"loss": 1.0}]), "must have a step"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
