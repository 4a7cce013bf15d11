"""Snapshots of populations: files, whitening, intervals, and a left-out time that is known."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, spatial, stats

import fmjax as fm
from experiments import single_cell
from fmjax.harness import train
from fmjax.tasks import snapshots

ROOT = pathlib.Path(__file__).parents[2]
CELLS = pathlib.Path(os.environ.get("FMJAX_DATA_DIR", ROOT.parent / "shared/data"))
CELLS = CELLS / "singlecell_time"


def write(path, times=(0, 1, 2), num=40, moved=lambda k: 3.0 * k):
    """Normal cells in two dimensions, of which the first moves and the second is wide."""
    rng = np.random.default_rng(0)
    labels = np.repeat(times, num)
    x = rng.standard_normal((len(labels), 2)) * [1.0, 10.0]
    x[:, 0] += np.vectorize(moved)(labels)
    order = rng.permutation(len(labels))
    if path.suffix == ".npz":
        np.savez(path, pcs=x[order], sample_labels=labels[order])
    else:
        rows = np.column_stack([x[:, :1], labels, x[:, 1:]])[order]
        np.savetxt(path, rows, delimiter=",", header='x1,"samples",x2', comments="")
    return path


def config(path, **flags):
    return single_cell.Config(data=path, **flags)


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_both_kinds_of_files_are_read_and_whitened(tmp_path, suffix):
    path = write(tmp_path / f"cells{suffix}")
    found = snapshots.open_snapshots(config(path))
    assert [len(x) for x in found.cells] == [40, 40, 40] and found.trained_on == [0, 2]
    np.testing.assert_allclose(found.ts, [0, 0.5, 1])
    everything = np.concatenate(found.cells)
    np.testing.assert_allclose(everything.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(everything.std(0), 1, atol=1e-6)
    some = snapshots.open_snapshots(config(path, whiten="train"))
    trained = np.concatenate([some.cells[0], some.cells[2]])
    np.testing.assert_allclose(trained.std(0), 1, atol=1e-6)
    raw = snapshots.open_snapshots(config(path, whiten="none", num_dims=1))
    assert raw.cells[1].shape == (40, 1) and abs(raw.cells[1].mean() - 3) < 0.6
    said = [x.facts["whitened by"] for x in (found, some, raw)]
    assert said == ["all cells", "the cells trained on", "nothing"]


def test_a_step_sees_every_cell_about_as_often(tmp_path):
    path = tmp_path / "cells.npz"
    x = np.arange(13.0)[:, None]
    np.savez(path, pcs=x, sample_labels=np.repeat([0, 1, 5], [3, 2, 8]))
    found = snapshots.open_snapshots(config(path, whiten="none"))
    rows = snapshots.in_step(found, 0)
    assert rows.shape == (8, 2, 1)
    assert sorted(rows[:, 1, 0]) == [*range(5, 13)]
    assert set(np.bincount(rows[:, 0, 0].astype(int))) == {2, 3}


def test_the_intervals_points_lie_on_their_lines():
    """Snapshots of one point each at 0, 1/4 and 1: x is the broken line, u its slope."""
    knots, ts = jnp.array([[0.0, 0.0], [1.0, 2.0], [4.0, 2.0]]), jnp.array([0.0, 0.25, 1.0])
    x = jnp.broadcast_to(knots[None], (50, 3, 2))
    key = jax.random.key(0)
    t, x_t, u_t = snapshots.sample_intervals(key, x, ts, fm.independent, 0.0)
    assert t.shape == (100,) and (t[:50] <= 0.25).all() and (t[50:] >= 0.25).all()
    want = np.stack([np.interp(t, ts, knots[:, d]) for d in range(2)], axis=1)
    np.testing.assert_allclose(x_t, want, atol=1e-5)
    np.testing.assert_allclose(u_t[:50], np.broadcast_to([4.0, 8.0], (50, 2)), rtol=1e-6)
    np.testing.assert_allclose(u_t[50:], np.broadcast_to([4.0, 0.0], (50, 2)), rtol=1e-6)
    noisy = snapshots.sample_intervals(key, x, ts, fm.independent, 0.5)
    np.testing.assert_array_equal(noisy.u_t, u_t)
    assert 0.4 < (noisy.x_t - x_t).std() < 0.6


@pytest.mark.slow
def test_pairs_are_fresh_and_those_of_the_coupling():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 2, 1)), jnp.float32)
    ts = jnp.array([0.0, 1.0])

    def moves(key, coupling):
        return np.asarray(snapshots.sample_intervals(key, x, ts, coupling, 0.0).u_t)

    a, b = jax.random.split(jax.random.key(0))
    assert (moves(a, fm.independent) != moves(b, fm.independent)).mean() > 0.9
    best = np.sort(x[:, 1], axis=0) - np.sort(x[:, 0], axis=0)
    np.testing.assert_allclose(
        np.sort(moves(a, fm.minibatch_ot), axis=0), np.sort(best, axis=0), atol=1e-6
    )


def test_the_left_out_marginal_of_an_ou_process(tmp_path):
    """dx = -x dt + sqrt(2) s dB from N(6, 0.5^2): normal at every time, known. Between the outer
    times optimal transport moves mean and deviation in straight lines, so that what it misses at
    the middle one is a distance of two normals."""
    rate, noise, num = np.array([0.0, 1.0, 2.0]), 1.5, 500
    means = 6 * np.exp(-rate)
    stds = np.sqrt(0.25 * np.exp(-2 * rate) + noise**2 * (1 - np.exp(-2 * rate)))
    z = stats.norm.ppf((np.arange(num) + 0.5) / num)  # quantiles: no noise of drawing
    path = tmp_path / "ou.npz"
    cells = (means[:, None] + stds[:, None] * z).reshape(-1, 1)
    np.savez(path, pcs=cells, sample_labels=np.repeat([0, 1, 2], num))
    data = snapshots.open_snapshots(config(path, whiten="none"))

    def velocity(t, x):
        mean, std = (v[0] + t * (v[2] - v[0]) for v in (means, stds))
        return means[2] - means[0] + (stds[2] - stds[0]) / std * (x - mean)

    found = snapshots.left_out_figures(data, velocity)
    between = (means[0] + means[2]) / 2, (stds[0] + stds[2]) / 2
    want = np.abs(between[0] - means[1] + (between[1] - stds[1]) * z).mean()
    still = np.abs(means[0] - means[1] + (stds[0] - stds[1]) * z).mean()
    assert want > 1  # the straight line misses the curve
    # Exact cells, linear in time: Euler has no error but rounding.
    np.testing.assert_allclose(found["w1"], want, rtol=1e-4)
    np.testing.assert_allclose(found["w1_still"], still, rtol=1e-4)


@pytest.mark.slow
def test_a_run_predicts_the_time_that_was_left_out(tmp_path):
    path = write(tmp_path / "cells.npz", num=300)
    flags = config(path, workdir=tmp_path / "run", num_steps=600, checkpoint_every=600)
    summary = train(flags, single_cell.make_task)
    assert summary["w1"] < 0.35 * summary["w1_still"]
    assert "time 1 left out; 300 true cells" in summary["w1_method"]


@pytest.mark.skipif(not CELLS.exists(), reason="needs the cells in FMJAX_DATA_DIR")
def test_real_cells_and_what_a_rectangular_assignment_would_say():
    """577 against 885 whitened cells: SciPy's assignment drops 308 of them."""
    data = snapshots.open_snapshots(config(CELLS / "emt.csv"))
    assert data.facts["num_cells"] == [577, 885, 788, 883]
    found = snapshots.left_out_figures(data, lambda t, x: jnp.zeros_like(x))
    cost = spatial.distance.cdist(*data.cells[:2])
    dropped = cost[optimize.linear_sum_assignment(cost)].mean()
    assert found["w1"] == found["w1_still"]
    np.testing.assert_allclose([found["w1"], dropped], [2.448, 2.194], atol=2e-3)


def test_bad_input_is_refused(tmp_path):
    path = write(tmp_path / "cells.npz")
    for times, got in (((0,), 1), ((0, 1), 2)):
        few = write(tmp_path / f"{got}.npz", times)
        with pytest.raises(ValueError, match=f"three times or more.*got {got}"):
            snapshots.open_snapshots(config(few))
    for k in (0, 2, -1):
        with pytest.raises(ValueError, match=f"--leave-out must be from 1 to 1.*got {k}"):
            snapshots.open_snapshots(config(path, leave_out=k))
    with pytest.raises(ValueError, match="--sigma must be zero or more"):
        snapshots.open_snapshots(config(path, sigma=-0.1))
    np.savez(tmp_path / "other.npz", x=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="it lacks pcs, sample_labels"):
        snapshots.load(tmp_path / "other.npz")
    (tmp_path / "other.csv").write_text("time,x\n0,1\n")
    with pytest.raises(ValueError, match="must have a column `samples`; got time, x"):
        snapshots.load(tmp_path / "other.csv")
    with pytest.raises(ValueError, match=r"must be an \.npz or a \.csv"):
        snapshots.load(tmp_path / "cells.h5")
    np.savez(tmp_path / "nan.npz", pcs=np.full((3, 2), np.nan), sample_labels=np.arange(3))
    with pytest.raises(ValueError, match="must be finite"):
        snapshots.load(tmp_path / "nan.npz")
    np.savez(tmp_path / "flat.npz", pcs=np.ones((3, 2)), sample_labels=np.arange(3))
    with pytest.raises(ValueError, match="no coordinate may be constant"):
        snapshots.open_snapshots(config(tmp_path / "flat.npz"))
