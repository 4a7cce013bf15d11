"""Pictures from a finished image run: any number of them, and by class where the run knows classes.

    python -m experiments.sample runs/digits --num 64 --seed 5 --labels 3 --guidance 2

Sample k depends on the parameters, the seed and k alone, to the solver's tolerance: whatever the
number of samples, the batch size and the devices. Batches that are drawn are kept in the run
folder, so that a command which was interrupted goes on where it was; a file is never overwritten.
"""

import dataclasses
import pathlib
import uuid
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import drawing, images, plots, trained
from fmjax.data import pixels
from fmjax.harness import command
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.records import make_folder, write_whole
from fmjax.harness.store import Store, progress
from fmjax.training import sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws from a finished image run."""

    run: Annotated[pathlib.Path, tyro.conf.Positional]
    """Run folder of an image experiment."""
    num: int = 64
    """Samples."""
    seed: int = 0
    """Seed of the noise."""
    labels: tuple[int, ...] = ()
    """Classes to draw, by turns; all of them without the flag. For a run with --conditional."""
    guidance: float = 1.0
    """Scale of the guidance; 1 is none. For a run with --conditional."""
    solver: Literal["Euler", "Heun", "Midpoint", "Tsit5", "Dopri5"] = "Tsit5"
    """Diffrax's solver of this name."""
    num_steps: int | None = None
    """Equal steps; without the flag steps are adaptive."""
    tolerance: float = 1e-3
    """Of adaptive steps, relative and absolute."""
    average: bool = True
    """Whether to take the moving average of the parameters, or the last ones."""
    batch_size: int = 128
    """Samples per solve, over all devices."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture of all, a folder of pictures, or an .npz file of images and labels."""
    out: pathlib.Path | None = None
    """The file or folder to write, which must not be there yet; else in RUN/drawn."""


def main(config: Config) -> pathlib.Path:
    _, run_config = trained.read_config(config.run)
    _check(config, run_config)
    assert isinstance(run_config, images.ImageConfig)
    out = _out(config)
    data = trained.read_data(config.run, run_config)
    event_shape, levels = tuple(data["event_shape"]), data["num_levels"]
    if config.format == "png" and event_shape[-1] not in (1, 3):
        raise ValueError(
            f"--format png needs 1 or 3 channels; {config.run} has {event_shape[-1]}. Take npz."
        )
    model = trained.load(
        config.run,
        event_shape,
        average=config.average,
        num_classes=data["num_classes"],
        guidance=config.guidance,
    )
    wanted = _wanted(config, model)
    drawn = _draw(config, model, wanted, event_shape, levels)
    labels = None if wanted is None else wanted[np.arange(config.num) % len(wanted)]
    make_folder(out.parent)
    if config.format == "npz":
        arrays = {"images": drawn} | ({} if labels is None else {"labels": labels})
        write_whole(out, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore[reportArgumentType]
    elif config.format == "png":
        part = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")  # the rights are the user's own
        part.mkdir()
        for k, image in enumerate(progress(drawn, "pictures")):
            plots.save_picture(image, part / f"{k:06d}.png", num_levels=levels)
        part.rename(out)
    else:
        columns = None
        if labels is not None:  # each class asked for gets a row
            drawn, columns = plots.by_class(drawn, labels, levels)
        plots.save_grid(drawn, out, num_levels=levels, columns=columns)
    print(f"{config.num} samples in {out}")
    return out


def _check(config: Config, run_config: object) -> None:
    if not isinstance(run_config, images.ImageConfig):
        raise ValueError(f"RUN must be the folder of an image run; {config.run} is a 2-D one.")
    check_numbers(config, may_be_zero={"guidance", "seed", "labels"}, may_be_empty={"labels"})
    check_seeds("seed", [config.seed])
    sharding.check_batch_size(config.batch_size, jax.device_count())
    if config.num_steps is None and config.solver not in drawing.ADAPTIVE:
        raise ValueError(
            f"--solver {config.solver} has no error estimate: give --num-steps, or one of "
            f"{', '.join(drawing.ADAPTIVE)}."
        )


def _out(config: Config) -> pathlib.Path:
    suffix = {"grid": ".png", "png": "", "npz": ".npz"}[config.format]
    names = ("seed", "labels", "guidance", "solver", "num_steps", "tolerance", "average", "num")
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    told = {n: getattr(config, n) for n in names if getattr(config, n) != usual[n] or n == "seed"}
    told = {n: value if isinstance(value, tuple) else (value,) for n, value in told.items()}
    words = [f"{n}_{'_'.join(map(str, values))}" for n, values in told.items()]
    out = config.out or config.run / "drawn" / ("_".join(words) + suffix)
    if out.exists():
        raise ValueError(f"{out} is there and stays as it is. Give --out another name.")
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out must end in {suffix} for --format {config.format}; got {out}.")
    return out


def _wanted(config: Config, model: trained.Trained) -> np.ndarray | None:
    """The classes to draw, which samples take by turns."""
    if model.num_classes is None:
        if config.labels:
            raise ValueError(f"--labels needs a run with --conditional; {config.run} has none.")
        return None
    wanted = config.labels or tuple(range(model.num_classes))
    if max(wanted) >= model.num_classes:
        raise ValueError(
            f"--labels must be in 0..{model.num_classes - 1}, the classes of {config.run}; got "
            f"{' '.join(map(str, wanted))}."
        )
    return np.array(wanted, np.int32)


def _draw(
    config: Config,
    model: trained.Trained,
    wanted: np.ndarray | None,
    event_shape: tuple[int, ...],
    num_levels: int,
) -> np.ndarray:
    """The samples as pixel values, `[num, height, width, channel]`."""
    adaptive = None if config.num_steps else config.tolerance
    way = drawing.Way(config.solver, num_steps=config.num_steps, tolerance=adaptive)
    solve, mesh = drawing.make_solve(model), sharding.make_mesh()
    devices = jax.device_count()
    size = min(config.batch_size, -(-config.num // devices) * devices)
    settings = {"parameters": model.digest, "seed": config.seed, "way": list(way), "size": size}
    settings |= {"labels": list(config.labels), "guidance": config.guidance}
    store = Store(config.run / "drawn", "batches", settings)
    noise = jax.jit(
        lambda key, rows: jax.vmap(
            lambda row: jax.random.normal(jax.random.fold_in(key, row), event_shape)
        )(rows)
    )

    def batch(i: int) -> dict[str, np.ndarray]:
        rows = np.arange(i * size, (i + 1) * size)
        x0 = np.asarray(noise(jax.random.key(config.seed), rows))
        known = None if wanted is None else wanted[rows % len(wanted)]
        x1, _ = solve(way, *sharding.shard_batch((x0, known), mesh))
        return {"images": np.asarray(pixels.quantize(jnp.asarray(x1), num_levels))}

    indices = progress(range(-(-config.num // size)), "batches")
    found = [store.get(f"batch_{i:06d}", lambda i=i: batch(i))["images"] for i in indices]
    return np.concatenate(found)[: config.num]


if __name__ == "__main__":
    command.run(main, Config, name="experiments.sample", doc=__doc__)
