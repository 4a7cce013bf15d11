"""Two processes train from one source of rows: each asks it for its own, and no other."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny

from fmjax import data

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SECONDS = 6, 240

TRAIN = """
import json, pathlib, sys
import numpy as np
import tiny
from fmjax import data, harness
from fmjax.harness.pods.cluster import ClusterConfig

class Source:
    def __init__(self, points):
        self.points, self.asked = points, []
    def __len__(self):
        return len(self.points)
    def __getitem__(self, row):
        self.asked.append(int(row))
        return self.points[row]

folder, address, number = sys.argv[1:]
source = Source(tiny.points())
tiny.read = lambda config: data.from_source(source)
pod = ClusterConfig(coordinator=address, num_processes=2, process_id=int(number))
config = tiny.Config(workdir=pathlib.Path(folder) / "run", num_steps=6, cluster=pod)
harness.train(config, tiny.make_task)
(pathlib.Path(folder) / f"asked_{number}.json").write_text(json.dumps(source.asked))
"""


@pytest.mark.slow
def test_each_process_reads_its_own_rows(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environ |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    pod = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, tmp_path, address, str(k)],
            env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for k in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=SECONDS)[0] for process in pod]
    assert [process.returncode for process in pod] == [0, 0], said
    asked = [json.loads((tmp_path / f"asked_{k}.json").read_text()) for k in range(2)]
    size = tiny.Config().batch_size
    assert [len(rows) for rows in asked] == [STEPS * size // 2] * 2
    batches = data.batches(tiny.NUM, size, seed=0)
    for step in range(STEPS):
        here = slice(step * size // 2, (step + 1) * size // 2)
        read = [set(rows[here]) for rows in asked]
        assert not read[0] & read[1]
        np.testing.assert_array_equal(sorted(read[0] | read[1]), np.sort(next(batches)))
