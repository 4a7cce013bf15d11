"""Times in turn: what is counted, in what order, in which unit."""

import itertools

import jax.numpy as jnp
import numpy as np

from experiments import in_turn
from fmjax.harness.task import Task


def test_every_way_in_turn_and_the_first_of_each_uncounted(monkeypatch):
    """A clock of which every reading is 1, 2, 3, ... times what the one before took."""
    clock = itertools.accumulate(itertools.count(1))
    monkeypatch.setattr(in_turn.time, "perf_counter", lambda: float(next(clock)))
    called = []
    ways = {name: (lambda name=name: called.append(name)) for name in "ab"}
    found = in_turn.milliseconds(ways, 3)
    assert called == list("abababab")  # four turns
    # Readings 2k and 2k + 1 of the k-th call are 2k + 1 apart; calls 2, 4, 6 are a's.
    assert found == {"a": [6e3, 10e3, 14e3], "b": [8e3, 12e3, 16e3]}


def test_the_median_is_not_moved_by_one_slow_turn(monkeypatch):
    times = {"a": [1.0, 2.0, 90.0]}
    monkeypatch.setattr(in_turn, "milliseconds", lambda ways, repetitions: times)
    assert in_turn.medians({}, 3) == {"a": 2.0}


def test_a_training_step_has_the_first_examples_and_one_state():
    task = Task(
        num_examples=9,
        batch=lambda rows: {"x": np.asarray(rows)},
        init=lambda key: jnp.zeros(()),
        step=lambda state, key, batch: (state + 1, batch["x"].sum()),
        velocity=lambda params, condition: lambda t, x: x,
    )
    step, args = in_turn.training_step(task, 4)
    for _ in range(2):
        state, total = step(*args)
        assert int(state) == 1 and int(total) == 0 + 1 + 2 + 3
