"""DiT beside the U-Net: how long every row trains, what it keeps, and the table."""

import dataclasses
import json

import pytest
from etils import epath

from experiments import in_turn
from experiments.benchmarks import networks
from fmjax.evaluation import judging

SECONDS = {"unet_adam": 0.5, "unet_muon": 0.6, "dit_adam": 0.75, "dit_muon": 1.0}


def row(network, optimizer, seed, fd):
    found = {"network": network, "optimizer": optimizer, "seed": seed, "evaluations": 61}
    found |= {"num_parameters": 12345, "step": 100 + seed, "loss": 0.3, "bits_per_dim": 3.5}
    return found | {"fd": fd, "fd_standard_error": 0.1, "accuracy": 0.75}


def test_the_table_is_that_of_the_record():
    rows = [row("unet", "adam", 0, 1.0), row("unet", "adam", 2, 3.0), row("dit", "muon", 0, 0.5)]
    text = networks.table({"rows": rows, "step_seconds": SECONDS})
    head, _, unet, dit = text.splitlines()
    assert head.count("|") == unet.count("|") == dit.count("|")
    assert unet == (
        "| unet | adam | 12,345 | 500 ms | 101 | 3.500 (3.500 to 3.500) | 2.00 (1.00 to 3.00) "
        "| 0.750 (0.750 to 0.750) | 61 (61 to 61) |"
    )
    assert dit == "| dit | muon | 12,345 | 1000 ms | 100 | 3.500 | 0.50 | 0.750 | 61 |"


@pytest.fixture
def timed(monkeypatch):
    """Steps that take what SECONDS says, in milliseconds, and one that a hiccup made slow."""

    def milliseconds(steps, repetitions):
        assert list(steps) == list(SECONDS) and repetitions == 15
        return {name: [1e3 * SECONDS[name]] * 2 + [1e6] for name in steps}

    monkeypatch.setattr(in_turn, "milliseconds", milliseconds)
    monkeypatch.setattr(networks, "_step", lambda *given: None)


def test_every_row_trains_for_its_minutes_and_is_else_the_same(timed, tmp_path, monkeypatch):
    trained = []

    def train(run, make_task):
        trained.append(run)
        folder = tmp_path / run.workdir.name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({"step": run.num_steps}))

    monkeypatch.setattr(networks, "train", train)
    monkeypatch.setattr(networks, "read", lambda folder: folder)
    config = networks.Config(workdir=tmp_path, minutes=5, adam_rate=1e-3, muon_rate=7e-3)
    for kind in networks.KINDS:
        folder, summary = networks.trained(config, *kind, 3)
        assert networks.trained(config, *kind, 3) == (folder, summary)  # not trained again
        assert folder == epath.Path(tmp_path / trained[-1].workdir.name)
    assert [run.num_steps for run in trained] == [600, 500, 400, 300]
    assert all(run.decay_steps == run.num_steps and run.seed == 3 for run in trained)
    assert [run.learning_rate for run in trained] == [1e-3, 7e-3, 1e-3, 7e-3]
    assert [(run.network, run.optimizer) for run in trained] == list(networks.KINDS)
    shared = ("dataset", "batch_size", "kernels", "conditional", "ema_decay", "path", "times")
    assert len({tuple(str(getattr(run, name)) for name in shared) for run in trained}) == 1


def test_minutes_that_the_slowest_row_can_not_warm_up_in_are_refused(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "train", lambda *given: pytest.fail("trained"))
    config = networks.Config(workdir=tmp_path, minutes=100 / 60)  # 200 steps of the fastest
    with pytest.raises(ValueError, match="--minutes .* more steps than the 100 .* hold 100"):
        networks.trained(config, "unet", "adam", 0)


def test_a_row_that_is_kept_is_read(timed, tmp_path):
    kept = row("unet", "adam", 0, 1.0)
    (tmp_path / "digits_unet_adam_4min_s0.json").write_text(json.dumps(kept))
    assert networks.row(networks.Config(workdir=tmp_path), "unet", "adam", 0) == kept


def test_the_record_holds_rows_and_times_and_no_folder(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "row", lambda config, *kind: row(*kind, 1.0))
    path = tmp_path / "record.json"
    config = networks.Config(workdir=tmp_path / "runs", seeds=(0, 1), record=path)
    record = networks.main(config)
    assert json.loads(path.read_text()) == record and str(tmp_path) not in path.read_text()
    assert record["step_seconds"] == SECONDS
    assert [(r["network"], r["optimizer"], r["seed"]) for r in record["rows"]] == [
        (*kind, seed) for seed in (0, 1) for kind in networks.KINDS
    ]


def test_a_folder_has_rows_under_one_judge(timed, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "row", lambda config, *kind: row(*kind, 1.0))
    config = networks.Config(workdir=tmp_path)
    networks.main(config)
    other = dataclasses.replace(config, judge=judging.JudgeConfig(num_splits=5))
    with pytest.raises(ValueError, match="num_splits.*--workdir"):
        networks.main(other)
