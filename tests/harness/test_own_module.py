"""An experiment outside this repository: trained, drawn from and exported by its own module."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments import trained

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
MODULE = '''
"""Digits of my own."""
import dataclasses, pathlib
from experiments.images import ImageConfig, UNetConfig, run_experiment
from fmjax.harness import command

@dataclasses.dataclass(frozen=True)
class Flags(ImageConfig):
    """My flags."""
    workdir: pathlib.Path = pathlib.Path("run")
    num_steps: int = 2
    batch_size: int = 8
    checkpoint_every: int = 1
    num_samples: int = 8
    eval_examples: int = 8
    sample_tolerance: float = 0.1
    eval_tolerance: float = 0.1
    model: UNetConfig = UNetConfig(channels=8, channel_multipliers=(1,))
    mine: float = 2.5
    """A flag that no other experiment has."""

def main(config: Flags) -> None:
    run_experiment("shapes", config)

if __name__ == "__main__":
    command.run(main, Flags, name="my_shapes", doc=__doc__)
'''


def run(folder, *words):
    """A command in a folder, by a process of its own; this repository is installed, so to speak."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_a_users_own_experiment(tmp_path):
    (tmp_path / "my_shapes.py").write_text(MODULE)
    for command in (["-m", "my_shapes"], ["my_shapes.py", "--workdir", "other"]):
        done = run(tmp_path, *command)
        assert done.returncode == 0, done.stderr
    for name in ("run", "other"):
        record = json.loads((tmp_path / name / "config.json").read_text())
        assert record["config_class"] == "my_shapes:Flags" and record["config"]["mine"] == 2.5
        sampled = [
            "experiments.sample",
            name,
            "--num",
            "4",
            "--batch-size",
            "4",
            "--num-steps",
            "2",
        ]
        done = run(tmp_path, "-m", *sampled)
        assert done.returncode == 0, done.stderr
        done = run(tmp_path, "-m", "experiments.export", name, f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
    done = run(ROOT, "-m", "experiments.sample", str(tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "names my_shapes:Flags as what made the run, which can't be imported" in done.stderr


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("json:loads", "must name a class of flags; got json:loads"),
        ("experiments.digits:Nothing", "can't be imported: .*has no attribute 'Nothing'"),
        ("nowhere", "can't be imported"),
        ("", "can't be imported"),
    ],
)
def test_addresses_that_are_none(tmp_path, address, message):
    record = {"experiment": "mine", "config_class": address, "config": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        trained.read_config(tmp_path)
