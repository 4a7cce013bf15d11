"""The parameters of a finished run as one safetensors file, with the run's flags inside.

    python -m experiments.export runs/digits digits.safetensors

`fmjax.weights.load_safetensors` reads it back, any other library's reader the tensors alone.
"""

import dataclasses
import json
import pathlib
from typing import Annotated

import tyro

from experiments import images, trained
from fmjax import weights
from fmjax.harness import command
from fmjax.harness.records import make_folder


@dataclasses.dataclass(frozen=True)
class Config:
    """Exports the parameters of a finished run."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder."""
    file: Annotated[pathlib.Path, tyro.conf.Positional]
    """The file to write; it must not be there yet."""
    average: bool = True
    """Whether to take the moving average of the parameters, or the last ones."""


def main(config: Config) -> None:
    if config.file.exists():
        raise ValueError(f"{config.file} is there and stays as it is. Name another file.")
    _, run_config = trained.read_config(config.run)
    shape, num_classes = (2,), None
    if isinstance(run_config, images.ImageConfig):
        known = trained.read_data(config.run, run_config)
        shape, num_classes = tuple(known["event_shape"]), known["num_classes"]
    model = trained.load(config.run, shape, average=config.average, num_classes=num_classes)
    record = json.loads((config.run / "config.json").read_text()) | {
        "step": model.step,
        "parameters": "moving average" if model.average else "last",
        "parameters_sha256": model.digest,
        "event_shape": shape,
        "num_classes": model.num_classes,
    }
    make_folder(config.file.absolute().parent)
    weights.export_safetensors(config.file, model.params, record)
    print(f"{config.file}: the parameters of step {model.step}, {record['parameters']}")


if __name__ == "__main__":
    command.run(main, Config, name="experiments.export", doc=__doc__)
