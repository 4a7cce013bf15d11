"""The wheel, installed in a fresh environment outside the clone, trains a task of a user's own."""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import venv
import zipfile

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def task_of_the_readme():
    """The module that experiments/README.md calls complete."""
    text = (ROOT / "experiments" / "README.md").read_text()
    found = re.search(r"<!-- a task -->\n```python\n(.*?)```", text, re.S)
    assert found
    return found.group(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the user's module, and an environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)],
        check=True, capture_output=True, cwd=folder,
    )  # fmt: skip
    (wheel,) = folder.glob("fmjax-*.whl")
    venv.create(folder / "venv", with_pip=True)
    fresh = [str(folder / "venv/bin/python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*fresh, "install", f"{wheel}[train]"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "rings.py").write_text(task_of_the_readme())
    return folder


def environment(place):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES")}
    return kept | {"PATH": f"{place}/venv/bin:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}


def run(place, *words):
    return subprocess.run(
        words, cwd=place, env=environment(place), capture_output=True, text=True, timeout=600
    )


def test_the_wheel_holds_the_package_alone(place):
    (wheel,) = place.glob("fmjax-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fmjax", next(top for top in tops if top.endswith(".dist-info"))}
    for room in ("harness/task.py", "evaluation/evaluate.py", "tasks/images.py", "cli.py"):
        assert f"fmjax/{room}" in names
    assert not [name for name in names if "experiments" in name or "test" in name]


def test_a_users_own_task_is_trained_killed_resumed_evaluated_and_sampled(place):
    flags = "--num-steps 600 --checkpoint-every 50 --log-every 10".split()
    command = [f"{place}/venv/bin/python", "-m", "rings", "--workdir", "runs/killed", *flags]
    with subprocess.Popen(
        command, cwd=place, env=environment(place), stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not list((place / "runs/killed").glob("checkpoints/[0-9]*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (place / "runs/killed/summary.json").exists()
    for name in ("killed", "untouched"):
        done = run(place, "python", "-m", "rings", "--workdir", f"runs/{name}", *flags)
        assert done.returncode == 0, done.stderr
    assert "going on from step" in run(
        place, "python", "-m", "rings", "--workdir", "runs/killed", *flags
    ).stdout  # fmt: skip
    record = json.loads((place / "runs/killed/config.json").read_text())
    assert record["make_task"] == "rings:make_task" and record["config_class"] == "rings:Config"

    digests = []
    for name in ("killed", "untouched"):
        done = run(place, "fmjax", "export", f"runs/{name}", f"{name}.safetensors")
        assert done.returncode == 0, done.stderr
        # The header holds the date of the run: what follows it are the tensors.
        content = (place / f"{name}.safetensors").read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        digests.append(hashlib.sha256(content[head:]).hexdigest())
    assert digests[0] == digests[1]  # resumed is never stopped, to the bit

    done = run(place, "fmjax", "evaluate", "runs/killed")
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    found = json.loads((place / "runs/killed/evaluation/evaluation.json").read_text())
    # The loss of the best field is the mean variance of x1 - x0 given x_t: about 1.7 here.
    assert 1 < found["held_out_loss"] < 2.2

    out = ("--format", "npz", "--out", "samples.npz")
    done = run(place, "fmjax", "sample", "runs/killed", "--num", "500", *out)
    assert done.returncode == 0, done.stderr
    radius = np.linalg.norm(np.load(place / "samples.npz")["x"], axis=1)
    assert len(radius) == 500 and 0.8 < np.mean((radius > 0.4) & (radius < 2.6))
    done = run(place, "fmjax", "sample", "runs/killed", "--num", "500", *out)
    assert done.returncode == 2 and "is there and stays as it is" in done.stderr


def test_the_core_alone_says_what_a_command_needs(place):
    """Where the extra is missing, one line names what to install."""
    code = (
        "import sys; sys.modules['tyro'] = None; sys.argv = ['fmjax', 'sample', 'x']; "
        "from fmjax import cli; cli.main()"
    )
    done = run(place, "python", "-c", code)
    assert done.returncode == 2 and "pip install 'fmjax[train]'" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
