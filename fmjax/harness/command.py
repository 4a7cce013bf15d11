"""How a command begins and ends: its flags, its errors, its exit code.

    0         done
    1         an error in the code, with its traceback
    2         an error that can be expected (flags, data, a folder, a full disk, a loss that is not
              finite, a pod that can't be joined), as one message on stderr
    130, 143  Ctrl-C and SIGTERM
    134       another process of the pod is gone

What a process of a pod says begins with its number and host, unless it is process 0.

Every command has the flag `--traceback`, which shows where an expected error was raised. The flag
is no field of a Config: no run folder records it. A `main(config)` called from Python raises.
"""

import _thread
import contextlib
import dataclasses
import functools
import gc
import inspect
import io
import logging
import pathlib
import re
import shlex
import sys
import threading
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import tyro

from fmjax.harness.bounds import check_local
from fmjax.harness.pods import peers
from fmjax.harness.pods.cluster import PeerError

_CURRENT: list[tuple[str, tuple[str, ...]]] = []  # name and words of the command that runs
_OURS = {"fmjax", "experiments", "__main__"}
_TALKERS = ("absl", "asyncio", "jax._src.callback")  # they log the errors that they raise


def run(
    main: Callable[[Any], Any],
    config: type[Any],
    *,
    name: str,
    doc: str | None,
    args: Sequence[str] | None = None,
) -> None:
    """Reads the flags and calls `main(config)`.

    Args:
      main: what the command does.
      config: the dataclass of its flags.
      name: the command's module, "my_project.moons" for instance.
      doc: what `--help` says first.
      args: the words of the command line; None for this process's.

    Raises:
      SystemExit: with the exit code, unless all went well.
    """
    args = sys.argv[1:] if args is None else list(args)
    show = "--traceback" in args
    if not show:
        _quieten()
    _CURRENT.append((name, tuple(args)))
    try:
        code = _exit_code(lambda: main(parse(config, name, doc, args)), show)
    finally:
        _CURRENT.pop()
    gc.collect()  # what the error held complains while hooks are heard, not at the very end
    if code:
        sys.exit(code)


def ours(module: str) -> None:
    """Counts a user's module as one of those whose errors are for users."""
    _OURS.add(module.split(".")[0])


def again(flag: str, value: str) -> str:
    """The command that runs now, with another value of one flag; outside of one the flag alone."""
    if not _CURRENT:
        return shlex.join([flag, value])
    name, args = _CURRENT[-1]
    kept, skip = [], False
    for word in args:
        if not skip and word.partition("=")[0].replace("_", "-") != flag:
            kept.append(word)
        skip = word.replace("_", "-") == flag and not skip
    return shlex.join([*_program(name), *kept, flag, value])


def _program(name: str) -> list[str]:
    """How a command is started: `python -m NAME`, or as the console command `fmjax`."""
    return name.split() if name.startswith("fmjax ") else ["python", "-m", name]


def _exit_code(act: Callable[[], Any], show: bool) -> int:
    """Acts; an expected error or Ctrl-C becomes a message and an exit code."""
    try:
        act()
    except KeyboardInterrupt:
        if show:
            traceback.print_exc()
        print(
            "\nInterrupted. What is written is complete: start the command again.", file=sys.stderr
        )
        return 130
    except Exception as error:
        peers.end_if_one_is_gone(error)
        message = in_words(error)
        if message is None:
            if name := peers.name():
                error.add_note(f"{name}see above.")
            raise
        if show:
            traceback.print_exception(error)
        else:
            print(f"{peers.name()}error: {message}", file=sys.stderr)
        return 2
    return 0


def in_words(error: Exception) -> str | None:
    """The message of an error that can be expected, or None for an error in the code.

    A ValueError can be expected where a `raise` in this repository made it. One that comes out of a
    library was not foreseen.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _of_the_device(str(error))
    if isinstance(error, MemoryError):
        return f"The memory is full: {str(error) or 'an allocation failed'}. Take a smaller batch."
    always = isinstance(error, OSError | FloatingPointError | PeerError)
    always |= isinstance(error, RuntimeError) and str(error).startswith("The solve ")
    if always or (isinstance(error, ValueError) and _raised_here(error)):
        return str(error)
    return None


def _of_the_device(text: str) -> str | None:
    """A solve that failed, or a device whose memory is full."""
    if failed := re.search(r"RuntimeError: (The solve .+)", text):
        return failed[1]
    if full := re.search(r"RESOURCE_EXHAUSTED: .+", text):
        return f"The device's memory is full: {full[0]} Take a smaller batch."
    return None


def _raised_here(error: Exception) -> bool:
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    statement = traceback.extract_tb(error.__traceback__, limit=-1)[0].line or ""
    root = frame.f_globals.get("__name__", "").split(".")[0]
    return root in _OURS and statement.startswith("raise ")


def parse(config: type[Any], name: str, doc: str | None, args: Sequence[str]) -> Any:
    """The flags as a `config`.

    Raises:
      ValueError: for a flag that is given twice, a positional value that is given as a flag, and
        one that is missing or given twice.
      SystemExit: with the code 2 for all else that tyro refuses, 0 after `--help`.
    """
    prog, positional = shlex.join(_program(name)), _positional(config)
    if len(positional) == 1:
        _refuse_flag_of_positional(*positional[0], prog, args)
    _refuse_repetitions(args)
    if odd := [word for word in args if re.match("(--[a-z.-]+=)?(GS|Gs|gS)://", word)]:
        raise ValueError(f"A bucket's address begins with gs://, in small letters; got {odd[0]}.")
    shown = tyro.conf.arg(help="Show where an error was raised.")
    fields = [
        ("config", Annotated[config, tyro.conf.arg(name="")]),
        ("traceback", Annotated[bool, tyro.conf.FlagCreatePairsOff, shown], False),
    ]
    command: Any = dataclasses.make_dataclass("Command", fields)
    read = functools.partial(tyro.cli, command, prog=prog, description=doc, args=args)
    found = _counted([what for _, what in positional], read, prog, args).config
    check_local(found)
    return found


def _counted(wanted: list[str], read: Callable[[], Any], prog: str, args: Sequence[str]) -> Any:
    """What `read` returns, where tyro finds the positional values, no fewer and no more."""
    if not wanted:
        return read()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return read()
    except SystemExit:
        if re.search("Missing from|Unrecognized options: (?!-)", said.getvalue()):
            got = shlex.join(args) or "none"
            words = " and ".join(f"one {what}" for what in wanted)
            usage = f"{prog} {' '.join(what.upper() for what in wanted)}"
            raise ValueError(f"The command takes {words}: {usage}; got {got}.") from None
        sys.stderr.write(said.getvalue())
        raise


def _refuse_repetitions(args: Sequence[str]) -> None:
    """argparse would take the last one in silence."""
    flags = [word.split("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    counts = Counter(re.sub(r"(^--|\.)no-", r"\1", flag) for flag in flags)
    if twice := [flag for flag, count in counts.items() if count > 1]:
        raise ValueError(f"A flag is given once; got {', '.join(twice)} twice in: {' '.join(args)}")


def _positional(config: type[Any]) -> list[tuple[str, str]]:
    """The fields of a config's positional values, each with what is said of it."""
    found = []
    for field, hint in typing.get_type_hints(config, include_extras=True).items():
        kind, *marks = typing.get_args(hint) or (hint,)
        if tyro.conf.Positional in marks:
            found.append((field, "folder" if _is_path(kind) and field != "file" else field))
    return found


def _refuse_flag_of_positional(field: str, what: str, prog: str, args: Sequence[str]) -> None:
    for index, word in enumerate(args):
        flag, _, value = word.partition("=")
        if flag == f"--{field}":
            value, *after = [*([value] if value else []), *args[index + 1 :]] or [what.upper()]
            rest = shlex.join([value, *args[:index], *after])  # in front: --seeds takes the rest
            raise ValueError(f"The {what} is positional, without {flag}: {prog} {rest}")


def _quieten() -> None:
    """Silences, until the process ends, what libraries print besides the error that they raise.

    Where a save fails, Orbax's threads log tracebacks, TensorStore prints one for every write that
    comes back to a closed event loop, and so does every coroutine that is left unfinished. An
    object whose making Ctrl-C or an error cut off complains, as it is deleted, of the attribute
    that it never got. Ctrl-C itself, where it comes in a callback, is told to the main thread anew.
    """
    for talker in _TALKERS:
        logging.getLogger(talker).addFilter(_is_heard)
    sys.unraisablehook = _on_unraisable


def _is_heard(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _on_unraisable(unraisable: Any) -> None:
    if unraisable.exc_type is KeyboardInterrupt:  # Ctrl-C came in a callback, where it is dropped
        threading.Timer(0.01, _thread.interrupt_main).start()
        return
    late = "Event loop is closed" in str(unraisable.exc_value)
    deleted = getattr(unraisable.object, "__name__", "") == "__del__"
    half_made = deleted and isinstance(unraisable.exc_value, AttributeError)
    if not (late or half_made or inspect.iscoroutine(unraisable.object)):
        sys.__unraisablehook__(unraisable)


def _is_path(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pathlib.PurePath)
