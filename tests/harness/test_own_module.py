"""An experiment outside this repository: trained, drawn from and exported by its own module."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fmjax.harness.read import read_config

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
MODULE = '''
"""Digits of my own."""
import dataclasses, functools, pathlib
import jax
import fmjax as fm
from fmjax import harness
from fmjax.data import pixels
from fmjax.tasks import images

@dataclasses.dataclass(frozen=True)
class Flags(images.ImageConfig):
    """My flags."""
    workdir: pathlib.Path = pathlib.Path("run")
    num_steps: int = 2
    batch_size: int = 8
    checkpoint_every: int = 1
    num_samples: int = 8
    eval_examples: int = 8
    sample_tolerance: float = 0.1
    eval_tolerance: float = 0.1
    model: images.UNetConfig = images.UNetConfig(channels=8, channel_multipliers=(1,))
    mine: float = 2.5
    """A flag that no other experiment has."""

def my_task(config: Flags) -> harness.Task:
    digits = images.open_images(config)
    model = images.make_network(config, digits.num_classes)

    def draw(key, batch):
        key_u, key_x0, key_t = jax.random.split(key, 3)
        x1 = pixels.dequantize(key_u, batch.images, digits.num_levels)
        x0 = config.mine * jax.random.normal(key_x0, x1.shape)
        return fm.sample_path(fm.cond_ot(), x0, x1, fm.uniform(key_t, x1.shape[:1]))

    def loss(params, key, path_sample):
        return fm.cfm_loss(images.training_velocity(config, model, params, key, None), path_sample)

    init_params = functools.partial(images.init_params, model, digits.event_shape)
    init, step = harness.from_loss(draw, loss, harness.optimizer(config), init_params)
    return images.make_task(config, digits, model, init, step)

if __name__ == "__main__":
    harness.main(Flags, my_task, __doc__)
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
        assert record["make_task"] == "my_shapes:my_task" and record["experiment"] == "my_shapes"
        small = "--num 4 --batch-size 4 --num-steps 2".split()
        for program in ("experiments.sample", "fmjax.cli"):  # the command of either
            words = ["sample"] * (program == "fmjax.cli")
            out = tmp_path / f"{name}_{program}.png"
            done = run(tmp_path, "-m", program, *words, name, *small, "--out", str(out))
            assert done.returncode == 0 and out.is_file(), done.stderr
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
    record = {
        "experiment": "mine",
        "config_class": address,
        "config": {},
        "make_task": "a:b",
    }
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)
