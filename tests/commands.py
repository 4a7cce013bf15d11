"""A command in this process, and how it ended."""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from fmjax.harness import command


@dataclasses.dataclass(frozen=True)
class Config:
    """Flags of a command."""

    folder: Annotated[pathlib.Path, tyro.conf.Positional] = pathlib.Path("a")
    """A folder."""
    num_steps: int = 3
    """Steps."""
    flip: bool = False
    """Whether to flip."""


def end(capsys, main, *args, config=Config, name="experiments.some"):
    """The exit code of a command, and what it said on stderr."""
    code = 0
    try:
        command.run(main, config, name=name, doc="What it does.", args=args)
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().err


def one_line(said):
    assert said.startswith("error: ") and "Traceback" not in said, said
    assert said.count("\n") == 1, said
    return said
