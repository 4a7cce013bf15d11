"""Sides that need no framework: for the tests of the protocol."""

import os

from experiments.benchmarks.compare.workers import Case, Options


def counting(options: Options) -> dict[str, Case]:
    count = 0

    def repeat() -> float:
        nonlocal count
        count += 1
        return float(count)

    facts = {"threads": options.threads, "cores": len(os.sched_getaffinity(0))}
    return {"count": Case(repeat, 2.0, lambda: facts)}


def raising(options: Options) -> dict[str, Case]:
    raise IndexError("no")


def missing(options: Options) -> dict[str, Case]:
    raise ModuleNotFoundError("no", name="nowhere")


def dying(options: Options) -> dict[str, Case]:
    calls = []

    def repeat() -> float:
        calls.append(None)
        if len(calls) > 1:
            os._exit(3)
        return 1.0

    return {"die": Case(repeat, 1.0)}
