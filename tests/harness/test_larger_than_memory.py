"""A task trained on a memory map and on ArrayRecord: the numbers of the arrays in memory."""

import os
import signal

import jax
import numpy as np
import pytest
import tiny
from made_runs import final_state, losses

from fmjax import harness


def run(folder, source, **flags):
    config = tiny.Config(workdir=folder, source=source, log_every=1, num_steps=12, **flags)
    harness.train(config, tiny.make_task)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The points as a file that can be mapped, and as two files of records."""
    module = pytest.importorskip("array_record.python.array_record_module")
    folder = tmp_path_factory.mktemp("stored")
    np.save(folder / "x.npy", tiny.points())
    (folder / "records").mkdir()
    for name, part in (("a", tiny.points()[:23]), ("b", tiny.points()[23:])):
        writer = module.ArrayRecordWriter(
            str(folder / "records" / f"{name}.array_record"), "group_size:1"
        )
        for x in part:
            writer.write(x.tobytes())
        writer.close()
    return {"map": folder / "x.npy", "array_record": folder / "records"}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    run(folder, None)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["map", "array_record"])
def test_losses_and_parameters_are_those_of_the_data_in_memory(tmp_path, stored, in_memory, name):
    run(tmp_path / "whole", stored[name])
    assert losses(tmp_path / "whole") == losses(in_memory)
    tiny.BEFORE.append(lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 4 else None)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "parts", stored[name])
    finally:
        tiny.BEFORE.clear()
    assert final_state(tmp_path / "parts")[0] == 5
    run(tmp_path / "parts", stored[name])
    assert losses(tmp_path / "parts") == losses(in_memory)
    for folder in ("whole", "parts"):
        state, want = final_state(tmp_path / folder)[1], final_state(in_memory)[1]
        jax.tree.map(np.testing.assert_array_equal, state, want)


@pytest.mark.slow
def test_several_steps_are_read_at_once(tmp_path, stored, in_memory):
    """And give the losses of single steps, to the scan's rounding."""
    run(tmp_path / "run", stored["map"], steps_per_dispatch=5)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(in_memory), rtol=1e-5)
