"""The record of few steps: seeds that are added, and its table."""

import copy
import json
import pathlib
import types
from typing import Any, cast

import numpy as np
import pytest
from etils import epath

from experiments import few_steps, few_steps_report, few_steps_runs, in_turn
from experiments.benchmarks import flow_map_step
from fmjax import data
from fmjax.evaluation import judging
from fmjax.harness.store import keep_settings

CONFIG = {"dataset": "digits", "minutes": 2.0, "num_samples": 500, "num_pairs": 64}


def row(training, way, seeds, fd):
    figures = {"fd": fd, "fd_standard_error": [0.1] * len(fd), "accuracy": [0.9] * len(fd)}
    figures |= {"evaluations": [2.0] * len(fd), "num_steps": [100 + seed for seed in seeds]}
    return {"training": training, "way": way, "seeds": seeds} | figures


def record(seeds, *rows):
    real = row("", "", seeds, [0.05] * len(seeds))
    times = {"flow": 0.1, "mean_flow": 0.125}
    config = CONFIG | {"seeds": seeds, "methods": [r["training"] for r in rows], "steps": [2]}
    fits = [fit(seed, 0.1 * (1 + seed)) for seed in seeds]
    found = {"config": config, "samples": list(rows), "real": real, "learned": fits}
    return found | {"step_seconds": times, "judge": {"encoder": "e"}}


def fit(seed, euler):
    rms = {"learnt, 2": 0.04, "Euler, 2": euler, "Midpoint, 2": 0.06, "Heun, 2": 0.07}
    rms["Tsit5, 7"] = 0.05
    return {"seed": seed, "evaluations": 2, "fit_seconds": 9.6, "start": "Euler", "rms": rms}


def test_a_record_gains_seeds_and_newer_figures_count():
    old = record(
        [0, 1], row("flow", "Euler, 2", [0, 1], [1.0, 2.0]), row("longer", "2", [0], [7.0])
    )
    added = row("mean_flow", "1", [1, 2], [4.0, 4.0])
    new = record([1, 2], row("flow", "Euler, 2", [1, 2], [3.0, 5.0]), added)
    new["config"]["steps"] = [1]
    kept = copy.deepcopy(old)
    both = few_steps_report.merged(old, new)
    flow, longer, mean_flow = both["samples"]
    assert mean_flow == added and both["config"]["seeds"] == [0, 1, 2]
    assert both["config"]["methods"] == ["flow", "longer", "mean_flow"]
    assert both["config"]["steps"] == [1, 2]
    assert both["learned"] == [fit(seed, 0.1 * (1 + seed)) for seed in range(3)]
    assert flow["seeds"] == [0, 1, 2] and flow["fd"] == [1.0, 3.0, 5.0]
    assert flow["num_steps"] == [100, 101, 102]
    assert longer == kept["samples"][1] and both["real"]["seeds"] == [0, 1, 2] and old == kept
    with pytest.raises(ValueError, match="under one encoder, e; got f.*--record"):
        few_steps_report.merged(old, new | {"judge": {"encoder": "f"}})


def test_a_record_of_another_kind_is_refused_before_anything_is_trained(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record([0], row("flow", "Euler, 2", [0], [1.0]))))
    config = few_steps.Config(workdir=tmp_path / "runs", minutes=3.0, record=path)
    with pytest.raises(ValueError, match="of its own kind.*2.0.*got.*3.0.*--record"):
        few_steps.main(config)
    assert not (tmp_path / "runs").exists()


def test_the_table_has_the_mean_and_spread_of_seeds_or_the_error_of_one():
    found = record(
        [0, 1],
        row("flow", "Euler, 2", [0, 1], [1.0, 2.0]),
        row("flow", "Tsit5, 7", [0, 1], [3.0, 3.0]),
        row("flow", "adaptive", [0, 1], [4.0, 4.0]),
        row("mean_flow", "1", [0], [7.0]),
    )
    found["samples"][2]["evaluations"] = [31.0, 32.0]
    lines = few_steps_report.table(found).splitlines()
    assert lines[0] == "| FD | a step | 1 | 2 | 4 | 8 | more |"
    assert (
        lines[2] == "| flow, Euler | 1.00 |  | 1.500 ± 0.707 |  |  | 31.5: 4.000 ± 0.000 |"
    )  # the adaptive solve's evaluations
    assert lines[3] == "| flow, Tsit5 | 1.00 |  |  |  | 7: 3.000 ± 0.000 |  |"
    assert lines[4] == "| mean_flow | 1.25 | 7.000 ± 0.100 |  |  |  |  |"
    assert lines[5] == "| real |  |  |  |  |  | 0.050 ± 0.000 |"
    assert lines[9] == "| flow, Euler | 1.00 |  | 0.900 ± 0.000 |  |  | 31.5: 0.900 ± 0.000 |"
    assert lines[11] == "| mean_flow | 1.25 | 0.900 |  |  |  |  |"
    assert lines[-2].startswith("|---") and lines[-3].startswith("| evaluations | learned |")
    assert lines[-1] == "| 2 | 0.0400 | 0.1500 | 0.0600 | 0.0700 | 7: 0.0500 | 1.50 | 1.25 | 10 s |"


def test_the_picture_has_a_row_for_each_training_and_solver():
    black = np.zeros((2, 8, 8, 1), np.int32)
    ways = ("Euler, 1", "Euler, 16", "Tsit5, 7", "adaptive")
    shown = [("flow", way, black) for way in ways] + [("mean_flow", way, black) for way in "12"]
    picture = few_steps_report.picture(shown, 17)
    dark = np.mean(picture, axis=2) < 64  # a strip's columns: more than half a row is black
    cells = [np.mean(row, axis=0) > 0.5 for row in np.array_split(dark, 4)]
    firsts = [np.flatnonzero(cell)[0] / picture.shape[1] for cell in cells]
    lasts = [np.flatnonzero(cell)[-1] / picture.shape[1] for cell in cells]
    left, middle, right = 0.1, 0.6, 0.85
    assert [first < left for first in firsts] == [True, False, False, True]  # one evaluation
    assert middle < firsts[1] and lasts[1] < right  # seven: as eight
    assert [last > right for last in lasts] == [True, False, True, False]  # more, adaptive


def test_solvers_run_at_the_counts_that_they_know():
    names = list(few_steps.ways(few_steps.Config(), "flow"))
    assert [n for n in names if n.startswith("Midpoint")] == [f"Midpoint, {n}" for n in (2, 4, 8)]
    assert [n for n in names if n.startswith("Tsit5")] == ["Tsit5, 7", "Tsit5, 13"]
    assert list(few_steps.ways(few_steps.Config(), "shortcut")) == ["1", "2", "4", "8", "adaptive"]


def test_a_folder_holds_trainings_of_one_kind(tmp_path):
    for _ in range(2):
        keep_settings(tmp_path / "runs", {"minutes": 2.0, "seeds": (0, 1)})
    with pytest.raises(ValueError, match="2.0.*got.*'minutes': 3.0.*--workdir"):
        keep_settings(tmp_path / "runs", {"minutes": 3.0, "seeds": (0, 1)})


def test_what_goes_on_from_mean_flow_begins_with_its_run():
    config = few_steps.Config(workdir=pathlib.Path("runs"))
    named = {name: few_steps_runs.run_config(config, name, 3, 40) for name in few_steps_runs.ALL}
    assert named["mean_flow_longer"].method == named["adversary_longer"].method == "mean_flow"
    assert named["mean_flow_longer"].init_from == epath.Path("runs/mean_flow_s3")
    assert named["adversary_longer"].generator == epath.Path("runs/mean_flow_s3")
    assert named["adversary"].generator == named["shortcut"].init_from == epath.Path("runs/flow_s3")
    folders = {str(run.workdir) for run in named.values()}
    assert folders == {f"runs/{name}_s3" for name in few_steps_runs.ALL}


def test_steps_without_a_column_are_refused():
    with pytest.raises(ValueError, match="--steps must be of 1, 2, 4, 8, .* got 3"):
        few_steps.main(few_steps.Config(steps=(2, 3)))


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="--methods must be of .*reflow.*; got mean"):
        few_steps.main(few_steps.Config(methods=("mean",)))
    with pytest.raises(ValueError, match="must begin with flow_matching"):
        flow_map_step.main(flow_map_step.Config(methods=("mean_flow",)))


def test_every_seed_has_real_images_of_its_own():
    real = data.load_digits("train")
    labels = np.arange(100) % 10
    together = judging.real_sets(real, labels, (0, 1))
    (alone,) = judging.real_sets(real, labels, (1,))
    np.testing.assert_array_equal(together[1][0], alone[0])
    assert (together[0][0] != together[1][0]).any()
    by_bytes = {x.tobytes(): y for x, y in zip(real.images, real.labels, strict=True)}
    assert [by_bytes[x.tobytes()] for x in alone[0]] == labels.tolist() == alone[1].tolist()


@pytest.mark.parametrize(
    "flags, got", [({"methods": ("longer", "longer")}, "longer longer"), ({"steps": (2, 2)}, "2 2")]
)
def test_what_is_named_twice_is_refused(flags, got, tmp_path):
    with pytest.raises(ValueError, match=f"must name each once; got {got}"):
        few_steps.main(few_steps.Config(workdir=tmp_path / "runs", **flags))
    assert not (tmp_path / "runs").exists()


def test_only_the_flow_and_what_is_asked_for_are_trained(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(few_steps, "trained", lambda config, name, seed: found.append((name, seed)))
    monkeypatch.setattr(few_steps, "step_seconds", lambda config, name: 0.1)
    monkeypatch.setattr(few_steps, "judge_of", lambda config: (None, None))
    monkeypatch.setattr(few_steps, "measure", lambda config, models, *judge: {"models": models})
    monkeypatch.setattr(few_steps, "learned_figures", lambda *given: {})
    monkeypatch.setattr(few_steps_report, "table", lambda record: "")
    config = few_steps.Config(workdir=tmp_path, seeds=(0, 2), methods=("mean_flow",))
    assert list(few_steps.main(config)["models"]) == ["flow", "mean_flow"]
    assert found == [("flow", 0), ("mean_flow", 0), ("flow", 2), ("mean_flow", 2)]


def test_too_few_samples_are_refused_before_anything_is_trained(tmp_path, monkeypatch):
    encoder: Any = types.SimpleNamespace(num_features=64)
    judge = judging.Judge(encoder, cast(Any, None), 10, 10, False, {})
    monkeypatch.setattr(judging, "make_judge", lambda *given: judge)
    monkeypatch.setattr(few_steps, "trained", None)  # which can't be called
    with pytest.raises(ValueError, match="got --num-samples 64. Draw at least 73"):
        few_steps.main(few_steps.Config(workdir=tmp_path / "runs", num_samples=64))


def test_steps_are_timed_beside_flow_matching_and_once(tmp_path, monkeypatch):
    """What a method begins with too, though it isn't asked for; a slower day changes no ratio."""
    known = {"flow_matching": 100.0, "mean_flow": 125.0, "adversary": 300.0, "reflow": 110.0}
    turns, slower = [], 1.0

    def medians(steps, repetitions):
        turns.append(list(steps))
        return {name: known[name] * slower for name in steps}

    monkeypatch.setattr(in_turn, "medians", medians)
    monkeypatch.setattr(few_steps_runs, "_step", lambda config, name: None)
    config = few_steps.Config(workdir=tmp_path, methods=("adversary_longer", "reflow"))
    for name in ("flow", "longer", "flow"):
        assert few_steps_runs.step_seconds(config, name) == pytest.approx(0.1)
    assert few_steps_runs.step_seconds(config, "adversary_longer") == pytest.approx(0.3)
    slower = 2.0
    assert few_steps_runs.step_seconds(config, "mean_flow") == pytest.approx(0.125)
    assert few_steps_runs.step_seconds(config, "reflow") == pytest.approx(0.11)
    both = [["flow_matching", "adversary"], ["flow_matching", "mean_flow"]]
    assert turns == [*both, ["flow_matching", "reflow"]]
