"""Commands on a small disk that fills up at a given moment: for `test_full_disk`.

    python tests/on_a_full_disk.py DISK

prints a JSON line for each moment: the exit code and what was said, with the disk full, and the
exit code of the same command once there is room again.
"""

import contextlib
import io
import json
import pathlib
import shutil
import sys
from unittest import mock

import jax.numpy as jnp

import fmjax as fm
from experiments import two_moons
from fmjax import harness, metrics, plotting
from fmjax.evaluation import evaluate, points, report
from fmjax.harness import command, failures, run, store
from fmjax.harness.events import Events

MOONS = "--num-steps 40 --checkpoint-every 20 --log-every 3 --batch-size 64 --model.features 16 "
MOONS += "--num-samples 50 --eval-examples 64 --preview-every 30 --frames 2 --side 9 "
MOONS += "--steps-per-dispatch 1"
EVALUATION = "--seeds 0 --curve-examples 0"
MOMENTS = {  # what is about to be written when the disk is full
    "config.json": (run, "write_json", 1),
    "tensorboard": (Events, "__init__", 1),
    "metrics.jsonl": (run.Run, "log", 5),
    "the first checkpoint": (run.Run, "save", 1),
    "the last checkpoint": (run.Run, "save", 2),
    "loss.png": (plotting, "loss_curve", 1),
    "samples": (plotting, "plane", 1),
    "animation": (plotting, "animation", 1),
    "window.json": (run.Run, "keep_window", 1),
    "preview": (run.Run, "preview", 1),
    "summary.json": (run.Run, "finish", 1),
}
EVALUATED = {
    "a batch": (store, "write_whole", 3),
    "density.png": (plotting, "samples_and_density", 1),
    "evaluation.json": (report, "write_json", 1),
}


MAINS = {
    two_moons: lambda config: harness.train(config, two_moons.make_task),
    evaluate: evaluate.main,
}


def fill(disk):
    """Takes all the room there is."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def full_at(disk, place, name, count):
    """The count-th call of a function finds the disk full."""
    calls, function = [], getattr(place, name)

    def filled(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            fill(disk)
        return function(*args, **kwargs)

    return mock.patch.object(place, name, filled)


def act(module, *args):
    """The exit code of a command and what it said on stderr."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            command.run(MAINS[module], module.Config, name="x", doc=None, args=args)
        except SystemExit as end:
            code = end.code
    return code, said.getvalue()


def at(disk, what, moment, module, *args):
    with full_at(disk, *moment):
        code, said = act(module, *args)
    (disk / "ballast").unlink(missing_ok=True)
    again, _ = act(module, *args)
    print(json.dumps({"what": what, "code": code, "said": said, "again": again}), flush=True)


def integrate(velocity, x0, *, ts=(1.0,), **options):
    """No solve: what is tested is what is written."""
    x = jnp.broadcast_to(x0, (len(ts), *x0.shape))
    return fm.Trajectory(jnp.asarray(ts), x, jnp.asarray(7))


def integrate_log_prob(velocity, x, **options):
    return fm.LogProb(-jnp.sum(x**2, axis=1), x, jnp.asarray(7))


def log_prob(velocity, x, **options):
    return integrate_log_prob(velocity, x).log_prob


def wasserstein2(x, y):
    """No assignment either."""
    return 1.0


def main(disk):
    fm.integrate, fm.integrate_log_prob, fm.log_prob = integrate, integrate_log_prob, log_prob
    folder, trained = disk / "run", disk / "trained"
    for what, moment in MOMENTS.items():
        at(disk, what, moment, two_moons, "--workdir", str(folder), *MOONS.split())
        if what == "summary.json":
            shutil.copytree(folder, trained)
        shutil.rmtree(folder)
    with (
        mock.patch.object(metrics, "wasserstein2", wasserstein2),
        mock.patch.object(points, "SIDE", 40),
    ):
        for what, moment in EVALUATED.items():
            at(disk, what, moment, evaluate, str(trained), *EVALUATION.split())
            shutil.rmtree(trained / "evaluation")
    nan = (failures.NotFinite, "_dump", 1)
    at(disk, "not_finite", nan, two_moons, "--workdir", str(folder), *MOONS.split(),
       "--learning-rate", "1e30")  # fmt: skip


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
