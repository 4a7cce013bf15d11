"""Snapshots of populations: files, whitening, real cells, and what is refused."""

import os
import pathlib

import numpy as np
import pytest
from scipy import optimize, spatial

from experiments import single_cell
from fmjax.tasks import intervals, snapshots

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
    assert rows.shape == (8, 1, 2, 1)
    assert sorted(rows[:, 0, 1, 0]) == [*range(5, 13)]
    assert set(np.bincount(rows[:, 0, 0, 0].astype(int))) == {2, 3}


@pytest.mark.skipif(not CELLS.exists(), reason="needs the cells in FMJAX_DATA_DIR")
def test_real_cells_and_what_a_rectangular_assignment_would_say():
    """577 against 885 whitened cells: SciPy's assignment drops 308 of them."""
    data = snapshots.open_snapshots(config(CELLS / "emt.csv"))
    assert data.facts["num_cells"] == [577, 885, 788, 883]
    found = intervals.left_out_figures(data, {"flow": data.cells[0]})
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
