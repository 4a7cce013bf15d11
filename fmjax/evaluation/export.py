"""The parameters of a finished run as one safetensors file, with the run's record inside.

    fmjax export runs/digits digits.safetensors

`fmjax.weights.load_safetensors` reads it back, any other library's reader the tensors alone.
"""

import dataclasses
import pathlib
import tempfile
from typing import Annotated

import tyro
from etils import epath

from fmjax import weights
from fmjax.harness import places
from fmjax.harness.read import read, read_config
from fmjax.harness.records import make_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Exports the parameters of a finished run."""

    run: Annotated[epath.Path, tyro.conf.Positional]
    """Run folder, or gs://BUCKET/FOLDER."""
    file: Annotated[epath.Path, tyro.conf.Positional]
    """The file to write, or gs://BUCKET/FILE; it must not be there yet."""
    average: bool = True
    """Whether to take the moving average of the parameters, or the last ones."""


def main(config: Config) -> None:
    run, file = places.as_path(config.run), places.as_path(config.file, "The file")
    if file.exists():
        raise ValueError(f"{file} is there and stays as it is. Name another file.")
    record, _ = read_config(run)
    trained = read(run, average=config.average)
    samples = trained.task.samples
    record |= {
        "step": trained.step,
        "parameters": "moving average" if trained.average else "last",
        "parameters_sha256": trained.digest,
        "num_classes": None if samples is None else samples.num_classes,
    }
    if places.in_bucket(file):
        with tempfile.TemporaryDirectory() as folder:
            weights.export_safetensors(
                here := pathlib.Path(folder) / file.name, trained.params, record
            )
            file.write_bytes(here.read_bytes())
    else:
        make_folder(pathlib.Path(file).absolute().parent)
        weights.export_safetensors(str(file), trained.params, record)
    print(f"{file}: the parameters of step {trained.step}, {record['parameters']}")
