"""Batches of numbers that are computed once: an interrupted evaluation resumes where it was.

A store is a folder named after its settings, so that numbers made under other settings are never
taken for these. Each batch is one file, by an atomic write; a batch whose file is there is
read, not computed. Every computation leaves a line in `computed.jsonl` beside the stores; a kill
between the two loses the line, never the batch.
"""

import json
import pathlib
import time
import zipfile
from collections.abc import Callable
from typing import Any

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
        self._log = folder / "computed.jsonl"
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
        path = self.folder / f"{name}.npz"
        if not path.exists():
            began = time.perf_counter()
            arrays = {key: np.asarray(value) for key, value in compute().items()}
            arrays["seconds"] = np.asarray(time.perf_counter() - began)
            write_whole(path, lambda file: np.savez(file, **arrays))  # pyright: ignore[reportArgumentType]
            with open(self._log, "a") as file:
                file.write(json.dumps({"batch": f"{self.folder.name}/{name}"}) + "\n")
        return _read(path)


def num_computed(folder: pathlib.Path) -> int:
    """Batches that have been computed in this evaluation folder, over all its starts."""
    path = folder / "computed.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def _read(path: pathlib.Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"A stored batch must be a complete .npz file; got {path}, which can't be read "
            f"({error}). Delete it, and it is computed again."
        ) from None
