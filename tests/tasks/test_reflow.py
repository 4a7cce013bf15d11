"""Pairs of a teacher, retraining on them, and a solver fitted to a run: on the smallest task."""

import dataclasses
import json
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from made_runs import losses, untrained

import fmjax as fm
from experiments import flow_map, learned_solver, reflow
from fmjax import flow_maps, harness
from fmjax.harness.read import read
from fmjax.harness.store import num_computed
from fmjax.tasks import pairs
from fmjax.tasks.images import UNetConfig

NOWHERE = epath.Path("nowhere")
FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folder of a linear velocity with three classes."""
    path = tmp_path_factory.mktemp("teacher") / "run"
    harness.train(tiny.Config(workdir=path, num_steps=5), tiny.make_task)
    return path


def config(folder, workdir="unused", **flags):
    small: dict[str, Any] = dict(
        num_pairs=40, pair_batch_size=16, pair_tolerance=1e-5, num_steps=4, batch_size=16
    )
    small |= dict(checkpoint_every=2, log_every=1, warmup_steps=0)
    return reflow.Config(**({"workdir": workdir, "teacher": folder} | small | flags))


def test_without_a_teacher():
    with pytest.raises(ValueError, match="--teacher must name the run folder"):
        reflow.make_task(config(None))


@pytest.mark.slow
def test_pairs_are_the_teachers_and_are_made_once(folder):
    flags = config(folder)
    teacher = pairs.TeacherPairs(flags)
    batch = teacher.batch(np.arange(40))
    np.testing.assert_array_equal(batch.condition, np.arange(40) % 3)
    velocity = harness.load(folder, jnp.asarray(batch.condition)).velocity
    exact = fm.sample(velocity, jnp.asarray(batch.x0), stepsize_controller=FINE)
    np.testing.assert_allclose(batch.x1, exact, atol=1e-4)
    assert len(np.unique(batch.x0)) == 80 and np.abs(batch.x0.mean()) < 0.4
    (store,) = (folder / "pairs").glob("pairs-*")
    settings = json.loads((store / "settings.json").read_text())["settings"]
    assert settings["parameters"] == read(folder).digest and settings["tolerance"] == 1e-5
    computed = num_computed(folder / "pairs")
    assert computed == 3
    (store / "batch_000001.npz").unlink()  # a kill
    again = pairs.TeacherPairs(flags).batch(np.arange(40))
    assert num_computed(folder / "pairs") == 4
    for a, b in zip(again, batch, strict=True):
        np.testing.assert_array_equal(a, b)
    other = pairs.TeacherPairs(dataclasses.replace(flags, seed=1)).batch(np.arange(40))
    assert np.abs(other.x0 - batch.x0).max() > 0.5


@pytest.mark.slow
def test_reflow_trains_draws_and_is_read_again(folder, tmp_path):
    flags = config(folder, tmp_path, num_steps=300, checkpoint_every=100, learning_rate=1e-2)
    summary = harness.train(flags, reflow.make_task)
    assert summary["straightness_after"] < 0.7 * summary["straightness_before"]
    assert summary["one_step_rms_after"] < summary["one_step_rms_before"]
    assert flags.init_from == folder
    assert np.mean(losses(tmp_path)[-50:]) < 0.95 * np.mean(losses(tmp_path)[:50])
    for path in (folder / "pairs").rglob("*.npz"):
        path.unlink()  # a finished run needs none
    found = harness.load(tmp_path, jnp.zeros(4, jnp.int32))
    x0 = jax.random.normal(jax.random.key(0), (4, 2))
    cost = flow_maps.straightness(found.velocity, x0, stepsize_controller=FINE)
    assert cost.mean() < summary["straightness_before"]
    with pytest.raises(ValueError, match="read without its teacher's pairs"):
        found.task.batch(np.arange(2))


@pytest.mark.slow
def test_a_solver_fitted_to_a_run(folder):
    flags = learned_solver.Config(
        run=folder, evaluations=2, num_pairs=16, num_held_out=8, num_first=8, num_unseen=24
    )
    record = learned_solver.main(flags)
    rms = record["unseen_rms"]
    assert list(rms) == ["learnt, 2", "Euler, 2", "Midpoint, 2", "Heun, 2", "Tsit5, 7"]
    assert rms["learnt, 2"] < 0.5 * min(rms[name] for name in list(rms)[1:4])
    made = num_computed(folder / "pairs")
    one = learned_solver.main(dataclasses.replace(flags, evaluations=1))["unseen_rms"]
    assert made and num_computed(folder / "pairs") == made  # the pairs are the same
    assert list(one) == ["learnt, 1", "Euler, 1", "Tsit5, 7"] and one["learnt, 1"] < one["Euler, 1"]
    trained = read(folder)
    solver = learned_solver.read_solver(folder, trained, 2)
    x0, labels = jax.random.normal(jax.random.key(9), (24, 2)), jnp.arange(24) % 3
    velocity = trained.velocity(trained.params, labels)
    exact = fm.sample(velocity, x0, stepsize_controller=FINE)
    apart = flow_maps.apply_solver(velocity, solver, x0) - exact
    assert float(jnp.sqrt(jnp.mean(apart**2))) < 2 * rms["learnt, 2"]  # on another noise
    with pytest.raises(ValueError, match="fit it with --evaluations 4"):
        learned_solver.read_solver(folder, trained, 4)
    other = dataclasses.replace(trained, params=jax.tree.map(lambda x: x + 1, trained.params))
    with pytest.raises(ValueError, match="Fit it again"):
        learned_solver.read_solver(folder, other, 2)


def test_too_few_pairs_for_the_first_fit():
    with pytest.raises(ValueError, match="--num-first must be at most half"):
        learned_solver.main(learned_solver.Config(run=NOWHERE, num_pairs=30, num_held_out=2))
    with pytest.raises(ValueError, match="10 evaluations wants --num-pairs of 37 or more"):
        learned_solver.main(learned_solver.Config(run=NOWHERE, evaluations=10, num_pairs=36))


@pytest.mark.slow
def test_a_student_of_a_network_with_a_horizon_draws_by_eulers_steps(tmp_path):
    """The pairs train its velocity, at no horizon: jumps over one are nobody's."""
    net = UNetConfig(8, (1,), num_res_blocks=1, horizon=True, time_scale=16.0)
    teacher = flow_map.Config(workdir=tmp_path / "flow", model=net, num_samples=10, eval_examples=0)
    untrained(teacher, flow_map.make_task)
    flags: dict[str, Any] = {"num_pairs": 16, "num_steps": 2, "pair_tolerance": 1e-2}
    student = config(teacher.folder, tmp_path / "student", **flags)
    summary = harness.train(student, reflow.make_task)
    assert (tmp_path / "student" / summary["few_steps"]).exists()
    trained = read(student.folder)
    samples, labels = trained.task.samples, np.arange(3, dtype=np.int32)
    assert samples is not None and samples.jump is not None
    x0, key = trained.source.sample(jax.random.key(0), 3), jax.random.key(1)
    velocity: Any = jax.jit(trained.velocity(trained.params, labels))
    got = jax.jit(samples.jump, static_argnums=4)(trained.params, key, x0, labels, 2)
    half = x0 + velocity(jnp.zeros(()), x0) / 2
    np.testing.assert_allclose(got, half + velocity(jnp.array(0.5), half) / 2, atol=1e-5)
    over = x0 + velocity(jnp.zeros(()), x0, horizon=jnp.array(0.5)) / 2
    assert np.abs(over - half).max() > 1e-4
