"""Samples from a finished run: any number of them, and by class where the run knows classes.

    fmjax sample runs/digits --num 64 --seed 5 --labels 3 --guidance 2

Sample k depends on the parameters, the seed and k alone, to the solver's tolerance: whatever the
number of samples, the batch size and the devices. Batches that are drawn are kept in the run
folder, so that a command which was interrupted goes on where it was; a file is never overwritten.
The processes of a pod share the batches, by the flags `--cluster.*` of training and on a run folder
that all see; process 0 writes the file.
"""

import dataclasses
import pathlib
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath

from fmjax import plotting
from fmjax.evaluation import drawing
from fmjax.harness import keys, places
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.pods import cluster
from fmjax.harness.pods.cluster import ClusterConfig
from fmjax.harness.progress import progress
from fmjax.harness.read import read
from fmjax.harness.records import make_folder, write_whole
from fmjax.harness.share import Batch, put, solve
from fmjax.harness.store import Arrays, Store
from fmjax.harness.task import Samples, Trained
from fmjax.training import digests, sharding


@dataclasses.dataclass(frozen=True)
class Config:
    """Draws from a finished run."""

    run: Annotated[epath.Path, tyro.conf.Positional]
    """Run folder, or gs://BUCKET/FOLDER."""
    num: int = 64
    """Samples."""
    seed: int = 0
    """Seed of the noise."""
    labels: tuple[int, ...] = ()
    """Classes to draw, by turns; all of them without the flag. For a run with --conditional."""
    given: tuple[float, ...] = ()
    """Conditions of all samples in the table's units, one number for each of the columns that the
    run was given; else those of held-out rows, by turns."""
    guidance: float = 1.0
    """Scale of the guidance; 1 is none. For a run with --conditional."""
    solver: Literal["Euler", "Heun", "Midpoint", "Tsit5", "Dopri5", "jumps"] = "Tsit5"
    """Diffrax's solver of this name; or an average velocity's own jumps, --num-steps of them."""
    num_steps: int | None = None
    """Equal steps; without the flag steps are adaptive."""
    tolerance: float = 1e-3
    """Of adaptive steps, relative and absolute."""
    average: bool = True
    """Whether to take the moving average of the parameters, or the last ones."""
    batch_size: int = 128
    """Samples per solve, over all devices of a process."""
    format: Literal["grid", "png", "npz"] = "grid"
    """One picture of all, a folder of pictures, or an .npz file of arrays and labels."""
    out: pathlib.Path | None = None
    """The file or folder to write, which must not be there yet; else in RUN/drawn."""
    cluster: ClusterConfig = ClusterConfig()
    """The processes of a pod, which share the batches."""


def main(config: Config) -> pathlib.Path:
    cluster.join(config.cluster)
    _check(config)
    config = dataclasses.replace(config, run=places.as_path(config.run))
    with places.at_hand(config.run / "drawn") as drawn:
        return _main(config, drawn)


def _main(config: Config, drawn: pathlib.Path) -> pathlib.Path:
    """Draws, where the local folder of RUN/drawn is at hand."""
    out = _out(config, drawn)
    trained = read(config.run, average=config.average, guidance=config.guidance)
    samples = trained.task.samples
    if samples is None:
        raise ValueError(f"Samples need Task.samples; the task of {config.run} has none.")
    _check_picture(config, samples)
    wanted = _wanted(config, samples)
    batches, condition = _batches(config, drawn, trained, samples, wanted)
    solve(batches, "batches")
    cluster.main_first(lambda: _write(config, out, samples, batches, condition))
    return out


def _write(
    config: Config, out: pathlib.Path, samples: Samples, batches: Sequence[Batch], condition: Any
) -> None:
    """The samples as the task keeps them, `[num, ...]` each, with their conditions."""
    x1 = np.concatenate([batch.get()["x1"] for batch in batches])[: config.num]
    arrays = samples.arrays(x1)
    make_folder(out.parent)
    if config.format == "npz":
        told = samples.told or (lambda condition: {"labels": condition})
        kept = arrays | ({} if condition is None else told(condition))
        write_whole(out, lambda file: np.savez_compressed(file, **kept))  # pyright: ignore[reportArgumentType]
    elif config.format == "png":
        _save_each(out, samples, arrays, config.num)
    else:
        assert samples.picture is not None  # _check_picture
        plotting.save(out, samples.picture(arrays, condition))
    print(f"{config.num} samples in {config.out or config.run / 'drawn' / out.name}")


def _save_each(out: pathlib.Path, samples: Samples, arrays: Arrays, num: int) -> None:
    """A folder of pictures, which is there whole or not at all."""
    assert samples.single is not None  # _check_picture
    part = out.with_name(f"{out.name}.{uuid.uuid4().hex}.tmp")  # the rights are the user's own
    part.mkdir()
    for k in progress(range(num), "pictures"):
        one = {name: array[k] for name, array in arrays.items()}
        plotting.save(part / f"{k:06d}.png", samples.single(one))
    part.rename(out)


def _check(config: Config) -> None:
    numbers = dataclasses.replace(config, given=())  # these may be negative
    check_numbers(
        numbers,
        may_be_zero={"guidance", "seed", "labels", "cluster.process_id"},
        may_be_empty={"labels", "given"},
    )
    check_seeds("seed", [config.seed])
    sharding.check_batch_size(config.batch_size, jax.local_device_count())
    if config.num_steps is None and config.solver == drawing.JUMPS:
        raise ValueError("--solver jumps needs their number: give --num-steps, 1 for instance.")
    if config.num_steps is None and config.solver not in drawing.ADAPTIVE:
        raise ValueError(
            f"--solver {config.solver} has no error estimate: give --num-steps, or one of "
            f"{', '.join(drawing.ADAPTIVE)}."
        )


def _check_picture(config: Config, samples: Samples) -> None:
    needed = {"grid": samples.picture, "png": samples.single}.get(config.format, True)
    if needed is None:
        raise ValueError(
            f"--format {config.format} needs samples that can be shown as pictures; those of "
            f"{config.run} can't. Take --format npz."
        )


def _out(config: Config, drawn: pathlib.Path) -> pathlib.Path:
    suffix = {"grid": ".png", "png": "", "npz": ".npz"}[config.format]
    names = (
        "seed",
        "labels",
        "given",
        "guidance",
        "solver",
        "num_steps",
        "tolerance",
        "average",
        "num",
    )
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    told = {n: getattr(config, n) for n in names if getattr(config, n) != usual[n] or n == "seed"}
    told = {n: value if isinstance(value, tuple) else (value,) for n, value in told.items()}
    words = [f"{n}_{'_'.join(map(str, values))}" for n, values in told.items()]
    out = config.out or drawn / ("_".join(words) + suffix)
    if out.exists():
        raise ValueError(f"{out} is there and stays as it is. Give --out another name.")
    if suffix and out.suffix != suffix:
        raise ValueError(f"--out must end in {suffix} for --format {config.format}; got {out}.")
    return out


def _wanted(config: Config, samples: Samples) -> np.ndarray | None:
    """The classes to draw, which samples take by turns."""
    if samples.num_classes is None:
        if config.labels:
            raise ValueError(f"--labels needs a run with --conditional; {config.run} has none.")
        return None
    wanted = config.labels or tuple(range(samples.num_classes))
    if max(wanted) >= samples.num_classes:
        raise ValueError(
            f"--labels must be in 0..{samples.num_classes - 1}, the classes of {config.run}; got "
            f"{' '.join(map(str, wanted))}."
        )
    return np.array(wanted, np.int32)


def _given(config: Config, samples: Samples) -> Any:
    """The condition of all samples that the flags give, or None."""
    if not config.given:
        return None
    if samples.given is None:
        raise ValueError(
            f"--given needs a run that is conditional on columns; {config.run} is not."
        )
    return samples.given(config.given)


def _batches(
    config: Config,
    drawn: pathlib.Path,
    trained: Trained,
    samples: Samples,
    wanted: np.ndarray | None,
) -> tuple[list[Batch], Any]:
    """The batches of the samples, and the samples' conditions."""
    adaptive = None if config.num_steps else config.tolerance
    way = drawing.Way(config.solver, num_steps=config.num_steps, tolerance=adaptive)
    size = min(config.batch_size, config.num)
    solve = drawing.make_solve(trained)
    if config.solver == drawing.JUMPS:
        drawing.check_jumps(trained)
    settings = {"parameters": trained.digest, "seed": config.seed, "way": list(way), "size": size}
    store = Store(drawn, "batches", settings | {"guidance": config.guidance})
    given = _given(config, samples)

    @jax.jit
    def noise(each: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: samples.source.sample(key, 1)[0])(each)

    def condition(rows: np.ndarray) -> Any:
        if given is not None:
            return jax.tree.map(lambda x: np.repeat(x[None], len(rows), axis=0), given)
        return trained.condition(rows) if wanted is None else wanted[rows % len(wanted)]

    def batch(i: int) -> Batch:
        rows = np.arange(i * size, (i + 1) * size)
        told = condition(rows)
        # The samples as they are solved: what a task makes of them is not stored.
        name = f"batch_{i:06d}" + ("" if told is None else f"_{digests.hash_tree(told)[:8]}")

        def compute() -> Arrays:
            x0 = np.asarray(noise(drawing.keys_of(keys.key(config.seed, "drawn"), rows)))
            each = drawing.keys_of(keys.key(config.seed, "jumps"), rows)
            x1, _ = solve(way, *put((x0, told)), each=each)
            return {"x1": np.asarray(x1)}

        return Batch(store, name, compute, "samples")

    batches = [batch(i) for i in range(-(-config.num // size))]
    return batches, condition(np.arange(config.num))
