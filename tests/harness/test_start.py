"""How a run starts: its folder, its first line, fine-tuning, and what a start that fails leaves."""

import dataclasses
import json
import os
import pathlib
import shlex
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from made_runs import final_state, params_at, rows

from fmjax import harness


def run(folder, make_task=tiny.make_task, **flags):
    return harness.train(tiny.Config(workdir=folder, **({"num_steps": 4} | flags)), make_task)


@dataclasses.dataclass(frozen=True)
class OfData(tiny.Config):
    dataset: str = "tiny"


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [
        ("tiny", "runs/tiny"),  # named after its data set
        ("moons", "runs/tiny-moons"),
        ("folder:my pictures/ü", "runs/tiny-folder-my-pictures"),
        ("folder:/a/b.c", "runs/tiny-folder-a-b.c"),
        ("../..", "runs/tiny"),
    ],
)
def test_without_a_flag_the_folder_is_named_after_experiment_and_data(
    tmp_path, monkeypatch, dataset, folder
):
    monkeypatch.chdir(tmp_path)
    harness.train(OfData(num_steps=1, dataset=dataset), tiny.make_task)
    assert [str(p.parent) for p in pathlib.Path().rglob("summary.json")] == [folder]
    record = json.loads(pathlib.Path(folder, "config.json").read_text())
    assert record["config"]["workdir"] == folder and record["experiment"] == "tiny"
    assert record["make_task"] == "tiny:make_task"
    assert record["config_class"] == "test_start:OfData"


@pytest.mark.slow
def test_the_first_line_names_device_parameters_data_batch_and_where_it_goes_on(tmp_path, capsys):
    folder = tmp_path / "run"
    run(folder)
    run(folder, num_steps=6, num_devices=1)
    first, second = [
        line for line in capsys.readouterr().out.splitlines() if " parameters, " in line
    ]
    assert first == f"8 x cpu, 14 parameters, 60 examples, batch 16, 4 steps, in {folder}"
    assert second == (
        f"cpu, 14 parameters, 60 examples, batch 16, going on from step 4 to 6, in {folder}"
    )


def test_the_summary_is_what_train_returns_and_the_tasks_own_figures_are_in_it(tmp_path):
    seen = []

    def make_task(config):
        def finish(trained, folder, key):
            seen.append((trained, folder, key))
            return {"figure": 3}

        return tiny.make_task(config)._replace(finish=finish)

    summary = run(tmp_path / "run", make_task, seed=2)
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["figure"] == 3 and summary["num_parameters"] == 14 and summary["step"] == 4
    assert summary["loss"] == rows(tmp_path / "run")[-1]["loss"]
    ((trained, folder, key),) = seen
    assert (folder, trained.step, trained.name) == (tmp_path / "run", 4, "test_start")
    want = params_at(folder, 4, "ema_params")
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(trained.params), want)
    assert (key == harness.keys.key(2, "finish")).all()


# Fine-tuning


@pytest.mark.slow
def test_a_run_begins_with_the_average_of_another(tmp_path):
    run(tmp_path / "first")
    # A rate that moves nothing: what is saved are the parameters of the beginning.
    run(tmp_path / "second", num_steps=1, init_from=tmp_path / "first", learning_rate=1e-30)
    want = params_at(tmp_path / "first", 4, "ema_params")
    for name in ("params", "ema_params"):
        got = params_at(tmp_path / "second", 1, name)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    last = params_at(tmp_path / "first", 4)
    assert not np.array_equal(last["w"], want["w"])


@pytest.mark.slow
def test_a_run_that_resumes_does_not_ask_for_what_it_began_with(tmp_path):
    run(tmp_path / "first")
    flags = {"init_from": tmp_path / "first", "num_steps": 2}
    run(tmp_path / "second", **flags)
    run(tmp_path / "whole", **flags | {"num_steps": 4})
    (tmp_path / "first").rename(tmp_path / "away")
    run(tmp_path / "second", **flags | {"num_steps": 4})
    a, b = (final_state(tmp_path / name)[1] for name in ("second", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    with pytest.raises(ValueError, match="must hold a checkpoint; got .*first, which does not"):
        run(tmp_path / "third", **flags)
    assert not (tmp_path / "third").exists()


@pytest.mark.slow
def test_a_first_save_that_was_cut_short_is_no_beginning(tmp_path):
    """Killed while the first checkpoint was written, a run begins with the other's again."""
    run(tmp_path / "first")
    (tmp_path / "second" / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    run(tmp_path / "second", num_steps=1, init_from=tmp_path / "first", learning_rate=1e-30)
    want = params_at(tmp_path / "first", 4, "ema_params")
    jax.tree.map(np.testing.assert_array_equal, params_at(tmp_path / "second", 1), want)


@pytest.mark.slow
def test_parameters_of_another_network_are_refused_with_the_leaves_that_differ(tmp_path):
    run(tmp_path / "first")

    def renamed(config):
        def init_params(key):
            params = tiny.init_params(config.dim, key)
            return {"other": params["w"]} | {name: params[name] for name in "bc"}

        task = tiny.make_task(config)
        init, _ = harness.from_loss(tiny.draw, tiny.loss, harness.optimizer(config), init_params)
        return task._replace(init=init)

    for make_task, flags, names in (
        (tiny.make_task, {"dim": 3}, ("w", "b", "c")),
        (renamed, {}, ("other", "w")),
    ):
        with pytest.raises(ValueError) as error:
            run(tmp_path / "second", make_task, init_from=tmp_path / "first", **flags)
        said = str(error.value)
        assert "first" in said, said
        for name in names:
            assert f"ema_params.{name}" in said or f"ema_params['{name}']" in said, said
        assert not (tmp_path / "second").exists()


# Starts that fail


def failing(what):
    """A task that fails when it is made, traced, read or checked; and what it says."""

    def make_task(config):
        task = tiny.make_task(config)

        def raises(*args):
            raise ValueError(f"no {what}")

        if what == "task":
            raises()
        if what == "shape":
            return task._replace(init=raises)
        if what == "optimiser":  # found when the first step is traced
            return task._replace(step=raises)
        return task._replace(batch=raises)

    return make_task


@pytest.mark.parametrize("what", ["task", "shape", "optimiser", "data"])
def test_a_start_that_fails_leaves_nothing_where_nothing_was(tmp_path, what):
    folder = tmp_path / "runs" / "deep" / "run"
    with pytest.raises(ValueError, match=f"no {what}"):
        run(folder, failing(what))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["shape", "optimiser", "data"])
def test_a_start_that_fails_leaves_an_existing_folder_as_it_was(tmp_path, what):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"no {what}"):
        run(folder, failing(what))
    assert (folder / "notes.txt").read_text() == "mine"
    run(tmp_path / "old")
    before = final_state(tmp_path / "old")
    with pytest.raises(ValueError, match=f"no {what}"):
        run(tmp_path / "old", failing(what), num_steps=8)
    after = final_state(tmp_path / "old")
    assert after[0] == before[0] == 4
    jax.tree.map(np.testing.assert_array_equal, after[1], before[1])
    assert len(rows(tmp_path / "old")) == 1


def test_what_another_run_has_put_beside_it_stays(tmp_path):
    """Folders that were made on the way go only where they are empty."""

    def beside(rows):
        (tmp_path / "runs" / "neighbour").mkdir()
        raise ValueError("no data")

    with pytest.raises(ValueError, match="no data"):
        run(tmp_path / "runs" / "run", lambda c: tiny.make_task(c)._replace(batch=beside))
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["neighbour"]


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def no_data():
    raise ValueError("no data any more")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "error", "step"),
    [(sigterm, SystemExit, 4), (no_data, ValueError, 2)],
    ids=["a signal", "an error"],
)
def test_a_run_that_has_taken_steps_keeps_its_new_folder(tmp_path, act, error, step):
    """Else a new run that is preempted would be gone, checkpoints and all."""
    tiny.BEFORE.append(lambda done: act() if done == 3 else None)
    try:
        with pytest.raises(error):
            run(tmp_path / "run", num_steps=9, checkpoint_every=2, log_every=1)
    finally:
        tiny.BEFORE.clear()
    assert final_state(tmp_path / "run")[0] == step
    run(tmp_path / "run", num_steps=9, checkpoint_every=2, log_every=1)
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 10))


def test_a_first_step_that_is_not_finite_keeps_its_batch(tmp_path):
    def make_task(config):
        task = tiny.make_task(config)

        def step(state, key, batch):
            state, metrics = task.step(state, key, batch)
            return state, metrics._replace(loss=jnp.nan * metrics.loss)

        return task._replace(step=step)

    with pytest.raises(FloatingPointError, match="The loss of step 1 is nan"):
        run(tmp_path / "run", make_task)
    assert (tmp_path / "run" / "not_finite_step_00000001.npz").is_file()


def command(*args):
    """The exit code of `python -m tiny ARGS`."""
    try:
        harness.main(tiny.Config, tiny.make_task, "Tiny.", args=[*map(str, args)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--workdir {}", "--workdir={}", None])
def test_a_refused_folder_comes_with_a_command_that_works(tmp_path, monkeypatch, capsys, form):
    """Its words quoted, the new folder the first that is free."""
    monkeypatch.chdir(tmp_path)
    folder = pathlib.Path("runs/it's a run" if form else "runs/tiny")
    named = [] if form is None else form.format("@").replace(" ", "\n").split("\n")
    named = [word.replace("@", str(folder)) for word in named]
    assert command("--num-steps", 2, *named) == 0
    folder.with_name(f"{folder.name}-2").mkdir()
    capsys.readouterr()
    args = [*named, "--num-steps", 2, "--learning-rate", 0.5, "--seed=7"]
    assert command(*args) == 2
    said = capsys.readouterr().err
    assert "learning_rate: folder has 0.01, got 0.5" in said
    _, mark, line = said.strip().rpartition("A run of its own: ")
    words = shlex.split(line)
    assert mark and words[:3] == ["python", "-m", "tiny"]
    assert command(*words[3:]) == 0
    record = json.loads(folder.with_name(f"{folder.name}-3").joinpath("config.json").read_text())
    assert record["config"]["learning_rate"] == 0.5 and record["config"]["seed"] == 7


@pytest.mark.slow
def test_fewer_steps_and_other_data_come_with_a_command_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("--num-steps", 4) == 0
    assert command("--num-steps", 2) == 2
    said = capsys.readouterr().err
    assert "--num-steps must be at least the 4 steps that runs/tiny has done; got 2" in said
    assert "python -m tiny --num-steps 2 --workdir runs/tiny-2" in said
    path = tmp_path / "runs/tiny/config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": {"num_examples": 59}}))
    assert command("--num-steps", 6) == 2
    said = capsys.readouterr().err
    assert (
        "resume on its own data; that of runs/tiny differs in num_examples: was 59, is 60" in said
    )
    assert "python -m tiny --num-steps 6 --workdir runs/tiny-2" in said


@pytest.mark.slow
def test_steps_can_not_be_skipped_by_an_optimiser_that_would_take_them(tmp_path):
    adam = optax.adam(1e-3)

    def make_task(config, tx=adam):
        init, step = harness.from_loss(
            tiny.draw, tiny.loss, tx, lambda key: tiny.init_params(2, key)
        )
        return tiny.make_task(config)._replace(init=init, step=step)

    with pytest.raises(ValueError, match="--max-skipped-steps needs an optimiser that leaves such"):
        run(tmp_path / "run", make_task, max_skipped_steps=2)
    assert not (tmp_path / "run").exists()
    tx = harness.skip_not_finite(optax.adam(1e-3), 2)
    run(tmp_path / "run", lambda config: make_task(config, tx), max_skipped_steps=2)


def test_batches_of_the_wrong_number_are_refused_before_the_first_step(tmp_path):
    def make_task(config):
        return tiny.make_task(config)._replace(batch=lambda rows: np.zeros((len(rows) + 1, 2)))

    with pytest.raises(ValueError, match=r"batch must return arrays \[num, ...\] of the 16 rows"):
        run(tmp_path / "run", make_task)
    with pytest.raises(ValueError, match="--batch-size must be at most the 60 examples"):
        run(tmp_path / "run", batch_size=64)
    assert not (tmp_path / "run").exists()


def test_a_start_that_fails_leaves_the_files_of_others(tmp_path):
    """What a task has written into the run folder is not the harness's to remove."""

    def make_task(config):
        def batch(rows):
            (config.folder / "precious.txt").write_text("mine")
            raise ValueError("no more rows")

        return tiny.make_task(config)._replace(batch=batch)

    with pytest.raises(ValueError, match="no more rows"):
        run(tmp_path / "new" / "run", make_task)
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["precious.txt"]


def test_a_task_that_can_not_be_imported_again_is_told_of(tmp_path, capsys):
    run(tmp_path / "a", num_steps=1)
    assert "can't be imported" not in capsys.readouterr().err
    run(tmp_path / "b", lambda config: tiny.make_task(config), num_steps=1)
    assert "<lambda> as what made the run, which can't be imported" in capsys.readouterr().err
