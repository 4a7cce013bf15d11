"""Batches of numbers that are computed once: an interrupted evaluation resumes where it was.

A store is a folder named after its settings, so that numbers made under other settings are never
taken for these. Each batch is one file, by an atomic write; a batch whose file is there is
read, not computed. Every computation leaves a line in `computed.jsonl` beside the stores; a kill
between the two loses the line, never the batch. In a pod each process has a file of its own for
them.
"""

import json
import pathlib
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fmjax.harness.progress import progress as progress
from fmjax.harness.records import environment, write_json, write_whole
from fmjax.training import digests

Arrays = dict[str, np.ndarray]


class Store:
    """A folder of batches under fixed settings.

    Args:
      folder: where the stores of one evaluation live.
      kind: the first part of the folder's name: "samples", "log_prob", ...
      settings: everything that the numbers depend on, as JSON can hold it.
    """

    def __init__(self, folder: pathlib.Path, kind: str, settings: dict[str, Any]):
        self.folder = folder / f"{kind}-{digests.hash_json(settings)[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        number = f"_{jax.process_index()}" if jax.process_index() else ""
        self._log = folder / f"computed{number}.jsonl"  # two hosts can't append to one file
        record = self.folder / "settings.json"
        if not record.exists():
            write_json(record, {"settings": settings, "begun_on": environment()})
        self.begun_on: dict[str, Any] = json.loads(record.read_text())["begun_on"]

    def get(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The batch of this name: read where it is stored, else computed and stored.

        Args:
          name: of the batch, unique in the store.
          compute: makes its arrays; called only where there is no file.

        Returns:
          The arrays, and under "seconds" how long it took to compute them, compilation included.

        Raises:
          ValueError: if the stored file is damaged.
        """
        if not self.has(name):
            self.make(name, compute)
        return _read(self._path(name))

    def has(self, name: str) -> bool:
        """Whether the batch of this name is stored."""
        return self._path(name).exists()

    def make(self, name: str, compute: Callable[[], Arrays]) -> None:
        """Computes and stores the batch of this name, as `get` does where there is none."""
        began = time.perf_counter()
        arrays = {key: np.asarray(value) for key, value in compute().items()}
        arrays["seconds"] = np.asarray(time.perf_counter() - began)
        write_whole(self._path(name), lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
        with open(self._log, "a") as file:
            file.write(json.dumps({"batch": f"{self.folder.name}/{name}"}) + "\n")

    def _path(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}.npz"


def keep_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Writes what all that a folder holds was made under; other settings than those are refused.

    Raises:
      ValueError: if the folder was begun under other settings.
    """
    path, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if path.exists() and (known := json.loads(path.read_text())) != settings:
        raise ValueError(
            f"{folder} holds what was made under {known}; got {settings}. Name another folder by "
            "--workdir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def num_computed(folder: pathlib.Path) -> int:
    """Batches that have been computed in this evaluation folder, over all its starts."""
    return sum(len(path.read_text().splitlines()) for path in folder.glob("computed*.jsonl"))


def _read(path: pathlib.Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"A stored batch must be a complete .npz file; got {path}, which can't be read "
            f"({error}). Delete it, and it is computed again."
        ) from None
