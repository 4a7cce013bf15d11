"""Learned solvers of several runs, read and shown."""

import json

import pytest

from experiments.benchmarks import learned_solvers


def fitted(folder, learnt):
    folder.mkdir()
    rms = {"learnt, 4": learnt, "Euler, 4": 0.3, "Midpoint, 4": 0.1, "Tsit5, 7": 0.5}
    found = {"unseen_rms": rms, "fit_seconds": 1.0, "flags": {"num_pairs": 32}, "environment": {}}
    (folder / "learned_solver_4.json").write_text(json.dumps(found | {"solver": {}}))


def test_the_factor_is_against_the_best_usual_solver(tmp_path):
    runs = tmp_path / "one", tmp_path / "two"
    for run, learnt in zip(runs, (0.02, 0.05), strict=True):
        fitted(run, learnt)
    config = learned_solvers.Config(runs, evaluations=4, record=tmp_path / "record.json")
    record = learned_solvers.main(config)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    head, _, *rows = learned_solvers.table(record).splitlines()
    assert head.startswith("| run | learnt, 4 | Euler, 4 | Midpoint, 4 | Tsit5, 7 | factor")
    assert rows == [
        "| one | 0.0200 | 0.3000 | 0.1000 | 0.5000 | 5.00 | 25.00 | 32 |",
        "| two | 0.0500 | 0.3000 | 0.1000 | 0.5000 | 2.00 | 10.00 | 32 |",
    ]


def test_a_run_without_a_solver_is_named(tmp_path):
    with pytest.raises(ValueError, match="learned_solver_8.json. Fit it: .*--evaluations 8"):
        learned_solvers.main(learned_solvers.Config((tmp_path,)))
