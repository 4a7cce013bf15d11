"""Where a run's small files are written: what the harness asks of a disk, and of a bucket."""

import pathlib
from collections.abc import Callable
from typing import Any


class Disk:
    """A folder in which a run's small files are written; on a disk it is the run folder itself.

    Attributes:
      folder: a local one.
    """

    folder: pathlib.Path

    def __init__(self, folder: Any):
        self.folder = pathlib.Path(folder)

    def reach(self) -> None:
        """Asks whether a bucket's folder can be written; by every process, before all else.

        Raises:
          ValueError: if it can't be, or another process of this host has its scratch folder.
        """

    def open(self, *, alone: bool = True) -> None:
        """Makes the local folder like the run folder; by every process.

        Args:
          alone: whether the folder is this run's alone from now on.
        """

    def send(self) -> None:
        """From now on what is written is sent, by a thread."""

    def check(self) -> None:
        """Raises what has ended the sending."""

    def watch(self, saving: Callable[[], bool], kept: Callable[[], str]) -> None:
        """Ends this process if a save can't come to its end.

        Args:
          saving: whether one is in progress.
          kept: says what a run that starts again goes on from.
        """

    def hold(self, path: pathlib.Path) -> None:
        """This file is not sent as long as it is the one that is held."""

    def exchange(self) -> None:
        """Process 0's folder has the files of all processes from here on; by all of them."""

    def close(self, *, forget: bool = False) -> None:
        """Sends the rest; with `forget` nothing, and takes back what `open` claimed."""
