"""One warm process per side of a row, asked over a pipe for one timed repetition at a time.

JAX and torch never share a process: each keeps a pool of threads, and one would disturb the other.
A process's threads are bounded by the cores that it may run on, which both frameworks respect; it
sets them before it imports either. Its allocator keeps what is freed, on either side: else
gigabytes go back to the system in every step of a U-Net, and come back page by page.
"""

import ctypes
import importlib
import multiprocessing
import os
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple


class Options(NamedTuple):
    """What a side is told.

    Attributes:
      threads: how many threads the process may use.
      folder: where the sides of a row leave weights and results for one another.
      side: its name in the row.
    """

    threads: int
    folder: pathlib.Path
    side: str = ""


class Case(NamedTuple):
    """One thing to time.

    Attributes:
      repeat: does a repetition, and returns the seconds that count.
      work: images, steps or solves in a repetition.
      facts: figures that are not times, asked for once at the end.
    """

    repeat: Callable[[], float]
    work: float
    facts: Callable[[], dict[str, Any]] = dict


def timed(run: Callable[[], Any], work: float, **kwargs: Any) -> Case:
    """A case whose whole repetition counts."""

    def repeat() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    return Case(repeat, work, **kwargs)


class Failed(RuntimeError):
    """A side could not be made or could not continue; the message says why."""


class Side:
    """A process that holds the cases of `module:function`, made and run once.

    Raises:
      Failed: if the process can't make them.
    """

    def __init__(self, target: str, options: Options, environment: dict[str, str] | None = None):
        self.target = target
        context = multiprocessing.get_context("spawn")  # a fork would share what is imported
        self._pipe, other = context.Pipe()
        threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        arguments = (other, target, options, threads | (environment or {}))
        self._process = context.Process(target=serve, args=arguments, daemon=False)
        self._process.start()
        other.close()
        try:
            self.work: dict[str, float] = self._receive()
        except BaseException:  # an interrupt too: Python would wait for the process at its exit
            self.close()
            raise

    def repeat(self, case: str) -> float:
        """Seconds of one repetition."""
        return self._ask(case)

    def facts(self, case: str) -> dict[str, Any]:
        return self._ask(("facts", case))

    def close(self) -> None:
        """Ends the process: by itself, when it next listens, or by force."""
        self._pipe.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, message: Any) -> Any:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise Failed(f"the process ended ({self._process.exitcode})") from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            raise Failed(f"the process ended ({self._process.exitcode})") from error
        if kind == "error":
            raise Failed(value)
        return value


def serve(pipe: Any, target: str, options: Options, environment: dict[str, str]) -> None:
    """The process's own loop: make the cases, warm them, answer until the pipe closes."""
    os.environ.update(environment)
    _keep_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    try:
        module, function = target.split(":")
        cases = getattr(importlib.import_module(f"{__package__}.{module}"), function)(options)
        for case in cases.values():
            case.repeat()
        pipe.send(("ready", {name: case.work for name, case in cases.items()}))
        while True:
            message = pipe.recv()
            if isinstance(message, tuple):
                pipe.send(("facts", cases[message[1]].facts()))
            else:
                pipe.send(("seconds", cases[message].repeat()))
    except (EOFError, BrokenPipeError):
        return
    except ModuleNotFoundError as error:
        pipe.send(("error", f"not installed: {error.name}"))
    except Exception as error:
        traceback.print_exc()
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _keep_memory() -> None:
    """Has glibc neither map large blocks one by one nor give back what is freed."""
    trim_threshold, mmap_max = -1, -4
    _mallopt(trim_threshold, -1)  # never
    _mallopt(mmap_max, 0)


def share_arena() -> None:
    """Has all threads allocate from one arena: for large arrays, before any thread is started.

    What doesn't fit into a thread's own arena is mapped and given back, whatever `_keep_memory`
    said. Small arrays are slower so: the threads wait for one another.
    """
    arena_max = -8
    _mallopt(arena_max, 1)


def _mallopt(name: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # elsewhere than on Linux with glibc there is none
        mallopt(name, value)
