"""A run that says how long its saves block, and its steps take: for `test_bucket_faults`.

    python tests/steps_during_saves.py FLAGS

trains two moons and prints, as JSON, the seconds that each save blocked, how long it was in
progress, and the median seconds of a step while one is in progress and while none is.
"""

import json
import statistics
import sys
import threading
import time

from experiments import two_moons
from fmjax import harness
from fmjax.harness import command
from fmjax.harness.run import Run

BLOCKED: list[float] = []
SAVES: list[tuple[float, float]] = []  # between a save's return and its end
STEPS: list[float] = []


def timed(self, *args, **kwargs):
    began = time.perf_counter()
    SAVE(self, *args, **kwargs)
    returned = time.perf_counter()
    BLOCKED.append(returned - began)

    def ended():
        while self._manager.is_saving_in_progress():
            time.sleep(0.01)
        SAVES.append((returned, time.perf_counter()))

    threading.Thread(target=ended, daemon=True).start()


def stepped(step, row):
    STEPS.append(time.perf_counter())


def train(config):
    return harness.train(config, two_moons.make_task, on_metrics=stepped)


SAVE, Run.save = Run.save, timed
command.run(train, two_moons.Config, name="two_moons", doc="", args=sys.argv[1:])
times = list(zip(STEPS, STEPS[1:], strict=False))[20:]


def within(began, ended):
    return any(a <= began and ended <= b for a, b in SAVES)


def touches(began, ended):
    return any(a < ended and began < b for a, b in SAVES)


during = [b - a for a, b in times if within(a, b)]
other = [b - a for a, b in times if not touches(a, b)]
print(
    json.dumps(
        {
            "blocked": BLOCKED,
            "saves": [b - a for a, b in SAVES],
            "during": statistics.median(during),
            "other": statistics.median(other),
            "num": [len(during), len(other)],
        }
    )
)
