"""What the image experiments share: flags, data, U-Net, loss, samples and bits/dim.

Pixels are dequantised uniformly, in training and in evaluation, so that the likelihood is one of
the discrete images: x = 2 (v + u) / num_levels - 1, u ~ U[0, 1).

A conditional run tells the network the class of every image, but for a part of them, drawn one by
one, for which it says "none": so it learns both branches of classifier-free guidance.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import plots
from experiments.errors import standard_error
from fmjax import data, models, training
from fmjax.data import pixels
from fmjax.harness import cluster, loop, step
from fmjax.harness.config import RunConfig, begin, check_num_examples, mesh
from fmjax.harness.run import Run
from fmjax.models import cpu
from fmjax.models import kernels as xla
from fmjax.tasks import choices
from fmjax.training import digests, sharding

KERNELS = {"xla": xla.KERNELS, "cpu": cpu.KERNELS}
_OWN = {"folder": "folder", "npz": "file"}
PAID_BACK = 300  # steps, and fewer in every run that experiments.benchmarks.kernels measures


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The U-Net. Image sides must be divisible by 2^(levels - 1)."""

    channels: int = 32
    """Channels of the first level."""
    channel_multipliers: tuple[int, ...] = (1, 2)
    """Channels of each level, as multiples; the image is halved between levels."""
    num_res_blocks: int = 1
    """Residual blocks per level."""
    attention_resolutions: tuple[int, ...] = ()
    """Image heights at which there is attention."""
    num_heads: int = 1
    """Attention heads, unless head_channels is given."""
    head_channels: int | None = None
    """Channels per attention head."""
    dropout: float = 0.0
    """Dropout rate in the residual blocks."""
    scale_shift_norm: bool = False
    """Whether time scales and shifts the normalised features, or is added to them."""
    conv_resample: bool = True
    """Whether to resample by convolutions, or by pooling and repetition."""
    num_groups: int | None = None
    """Groups of the normalisations; up to 32 with at least four channels in each without it."""
    time_scale: float = 1000.0
    """What times are multiplied by before their embedding."""


@dataclasses.dataclass(frozen=True)
class ImageConfig(RunConfig):
    """The flags of an image experiment."""

    dataset: str = "digits"
    """scikit-learn's "digits", the TFDS name of an image data set, folder:PATH of pictures (in
    folders by class or not), or npz:FILE of arrays `images` and `labels`."""
    image_size: int | None = None
    """Pictures of a folder become squares of so many pixels; without it all are of one size."""
    data_dir: pathlib.Path | None = None
    """Where TFDS data sets are; else TFDS_DATA_DIR, else TFDS's own default."""
    train_split: str = "train"
    """Images to train on, in TFDS's notation: train, train[:5000], ..."""
    eval_split: str = "test"
    """Held-out images for bits/dim."""
    flip: bool = False
    """Whether to mirror images left to right at random."""
    model: UNetConfig = UNetConfig()
    """The U-Net's size."""
    conditional: bool = False
    """Whether the network is told the class of an image."""
    label_dropout: float = 0.1
    """Share of the images whose class a conditional network isn't told in training."""
    guidance: float = 1.0
    """Scale of the guidance in drawing from a conditional network; 1 is none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation in training. Parameters, statistics and loss stay float32."""
    remat: bool = False
    """Whether the backward pass computes a block's activations again instead of keeping them."""
    kernels: Literal["auto", "xla", "cpu"] = "auto"
    """Convolutions and attention by XLA's kernels or those made for one CPU device, which compile
    longer; auto takes the latter from 300 steps on, which pay that back."""
    num_samples: int = 64
    """Images to draw at the end; of a conditional network as many of each class as go into them."""
    sample_tolerance: float = 1e-3
    """Tolerance of Tsit5 in drawing."""
    eval_examples: int = 256
    """Held-out images for bits/dim, the first of the split."""
    eval_batch_size: int = 64
    """Images per likelihood solve."""
    eval_probes: int = 1
    """Hutchinson probes per image."""
    eval_tolerance: float = 1e-3
    """Tolerance of Tsit5 in the likelihood."""


def run_experiment(name: str, config: ImageConfig) -> dict[str, Any]:
    """Trains, draws, measures; returns what stands in summary.json."""
    check_conditions(config)
    begin(config)
    dataset = load(config, config.train_split)
    check_num_examples(config, len(dataset.images))
    held_out = load(config, config.eval_split)
    plain = make_model(config, dataset.num_classes)
    shape, levels = dataset.images.shape[1:], dataset.num_levels
    init = functools.partial(plain.init, t=jnp.zeros(()), x=jnp.zeros((1, *shape)))
    jax.eval_shape(init, jax.random.key(0))  # a size that can't work is refused here
    kernels = choose_kernels(config)
    model = plain.clone(kernels=KERNELS[kernels])
    trained = model.clone(dtype=jnp.dtype(config.precision), remat=config.remat)
    key_params, key_train, key_x0, key_eval = jax.random.split(jax.random.key(config.seed), 4)
    tx = step.make_optimizer(config)
    with Run(name, config, describe(dataset)) as run:
        state = step.init_state(config, init, key_params, tx)
        draw, loss_fn = make_draw(config, levels, dataset.num_classes), make_loss(trained)
        _say(f"Training with the {kernels} kernels (--kernels {config.kernels}).")
        steps = step.make_steps(config, draw, loss_fn, tx, state)
        state, rate = loop.train(
            run, state, steps, key_train, len(dataset.images), make_batch(config, dataset)
        )
        summary = {
            "experiment": name,
            "step": int(state.step),
            "num_parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            **save_samples(run, model, config, state, dataset, key_x0),
            **measure_bits_per_dim(model, config, state.ema_params, held_out, key_eval),
            "images_per_second": rate,
            "wall_seconds": round(run.seconds, 1),
        }
        run.finish(summary)
    return summary


def choose_kernels(config: ImageConfig) -> Literal["xla", "cpu"]:
    """The kernels to train with, as the flag says or as the break-even was measured."""
    if config.kernels != "auto":
        return config.kernels
    devices = mesh(config).devices
    one_cpu = devices.size == 1 and devices.flat[0].platform == "cpu"
    return "cpu" if one_cpu and config.num_steps >= PAID_BACK else "xla"


def load(config: ImageConfig, split: str) -> data.ImageDataset:
    """The split of the run's data set, in memory.

    Raises:
      ValueError: as `data.load` and its likes do; for a folder without "folder:", and for what TFDS
        can't load.
    """
    kind, colon, path = config.dataset.partition(":")
    if config.image_size is not None and kind != "folder":
        raise ValueError(
            f"--image-size is for --dataset folder:PATH; got {config.image_size} and "
            f"{config.dataset}."
        )
    if config.dataset == "digits":
        return data.load_digits(split)
    if colon and kind in ("folder", "npz"):
        if not path:
            raise ValueError(
                f"--dataset {kind}: must name a {_OWN[kind]}; got none behind the colon."
            )
        if kind == "npz":
            return data.load_npz(path, split)
        return data.load_folder(path, split, image_size=config.image_size)
    try:
        return data.load(config.dataset, split, config.data_dir)
    except (ValueError, AssertionError, ImportError) as error:
        reason = _no_dataset(config.dataset, str(error).splitlines()[0])
        if reason is None:
            raise
        raise ValueError(
            '--dataset must be "digits", folder:PATH, npz:FILE or the TFDS name of an image data '
            f"set, such as mnist, fashion_mnist or cifar10; got {config.dataset}: {reason}"
        ) from error


def _no_dataset(name: str, said: str) -> str | None:
    """Why a name is no data set's, where TFDS or `fmjax.data` could make nothing of it."""
    foreign = said.startswith(("Parsing builder name", "Failed to construct"))  # in TFDS's words
    if pathlib.Path(name).expanduser().is_dir() and (foreign or said.startswith("name must be")):
        return f"that is a folder. Write folder:{name}"
    if pathlib.Path(name).expanduser().is_file():
        return f"that is a file. Arrays in an .npz file are npz:{name}"
    return f"TFDS says: {said}" if foreign else None


def check_conditions(config: ImageConfig) -> None:
    """Refuses flags of conditions that can't work, or that an unconditional run has no use for."""
    if not 0 <= config.label_dropout <= 1:
        raise ValueError(f"--label-dropout must be in [0, 1]; got {config.label_dropout}.")
    if config.guidance != 1 and not config.conditional:
        raise ValueError(
            f"--guidance needs a network that knows classes; got {config.guidance} without "
            "--conditional."
        )
    if config.guidance != 1 and not config.label_dropout:
        raise ValueError(
            f"--guidance other than 1 needs a network that was trained without classes too; got "
            f"{config.guidance} and --label-dropout 0. 0.1 is usual."
        )


def describe(dataset: data.ImageDataset) -> dict[str, Any]:
    """What a run folder keeps of its data: enough to draw from it, and to know the data again."""
    return {
        "event_shape": list(dataset.images.shape[1:]),
        "num_levels": dataset.num_levels,
        "num_classes": dataset.num_classes,
        "num_examples": len(dataset.images),
        "sha256": digests.hash_json(
            [digests.hash_array(dataset.images), digests.hash_array(dataset.labels)]
        ),
    }


class Images(NamedTuple):
    """Images `[batch, height, width, channel]`, uint8, and their classes `[batch]` or None."""

    images: Any
    labels: Any


def make_model(config: ImageConfig, num_classes: int | None) -> models.UNet:
    """The U-Net that the flags describe, with the classes of its data if it is conditional."""
    known = num_classes if config.conditional else None
    return models.UNet(**dataclasses.asdict(config.model), num_classes=known)


def make_velocity(
    model: models.UNet | models.MLP,
    params: Any,
    labels: jax.Array | None = None,
    guidance: float = 1.0,
) -> fm.Velocity:
    """The velocity under the labels `[batch]`, guided away from that of no class.

    At scale 1 the network is called once for each example, at another twice.
    """
    apply = functools.partial(model.apply, params)
    if labels is None:
        return apply
    if guidance == 1:
        return functools.partial(apply, labels=labels)
    return fm.batched_guidance(apply, labels, model.num_classes, guidance)


def make_batch(config: ImageConfig, dataset: data.ImageDataset) -> loop.Batch:
    """`rows -> Images`, the labels for a conditional network alone."""
    labels = dataset.labels if config.conditional else None
    return lambda rows: Images(dataset.images[rows], None if labels is None else labels[rows])


def make_draw(config: ImageConfig, num_levels: int, num_classes: int) -> step.Draw:
    """`(key, Images) -> (PathSample, labels)`: flip, dequantise, pair with noise, choose times."""

    def draw(key: jax.Array, batch: Images) -> tuple[fm.PathSample, jax.Array | None]:
        key_flip, key_u, key_path = jax.random.split(key, 3)
        images, labels = batch
        if config.flip:
            images = pixels.random_flip(key_flip, images)
        x1 = pixels.dequantize(key_u, images, num_levels)
        if labels is not None:
            key_label = jax.random.fold_in(key, 3)  # the others are those of a run without labels
            labels = fm.drop_labels(key_label, labels, num_classes, config.label_dropout)
        return choices.draw_path_sample(config, key_path, x1), labels

    return draw


def make_loss(model: models.UNet) -> training.LossFn:
    def loss_fn(params: Any, key: jax.Array, drawn: Any) -> jax.Array:
        path_sample, labels = drawn
        velocity = functools.partial(
            model.apply, params, labels=labels, deterministic=False, rngs={"dropout": key}
        )
        return jnp.mean(fm.cfm_loss(velocity, path_sample))

    return loss_fn


def save_samples(
    run: Run,
    model: models.UNet,
    config: ImageConfig,
    state: training.TrainState,
    dataset: data.ImageDataset,
    key: jax.Array,
) -> dict[str, Any]:
    """Draws samples over all devices and saves their picture, and the loss curve.

    Of a conditional network every class has a row of its own.
    """
    controller = diffrax.PIDController(rtol=config.sample_tolerance, atol=config.sample_tolerance)
    labels, columns = None, None
    if config.conditional:
        columns = max(1, config.num_samples // dataset.num_classes)
        labels = np.repeat(np.arange(dataset.num_classes, dtype=np.int32), columns)

    @jax.jit
    def solve(params: Any, x0: jax.Array, labels: Any) -> tuple[jax.Array, jax.Array]:
        velocity = make_velocity(model, params, labels, config.guidance)
        trajectory = fm.integrate(velocity, x0, stepsize_controller=controller)
        return trajectory.x[-1], trajectory.num_evaluations

    num = config.num_samples if labels is None else len(labels)
    _say(f"Drawing {num} samples ...")
    x0 = np.asarray(jax.random.normal(key, (num, *dataset.images.shape[1:])))
    given = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), (x0, labels))
    x1, num_evaluations = sharding.gathered(solve(state.ema_params, *given))
    grid = run.folder / "samples" / f"step_{int(state.step):08d}.png"
    if cluster.is_main():
        plots.save_loss_curve(run.metrics(), run.folder / "loss.png")
        images = np.asarray(pixels.quantize(x1, dataset.num_levels))
        plots.save_grid(images, grid, num_levels=dataset.num_levels, columns=columns)
    guided = "" if labels is None else f", guidance {config.guidance:g}"
    return {
        "num_evaluations": int(num_evaluations),
        "sampler": f"Tsit5, tolerance {config.sample_tolerance:g}{guided}, EMA parameters",
        "samples": str(grid.relative_to(run.folder)),
    }


def _say(text: str) -> None:
    if cluster.is_main():
        print(text, flush=True)


def measure_bits_per_dim(
    model: models.UNet,
    config: ImageConfig,
    params: Any,
    dataset: data.ImageDataset,
    key: jax.Array,
) -> dict[str, Any]:
    """Bits/dim of the first held-out images, with the standard error over them and the method."""
    num, read = min(config.eval_examples, len(dataset.images)), make_batch(config, dataset)
    size = min(config.eval_batch_size, num)
    controller = diffrax.PIDController(rtol=config.eval_tolerance, atol=config.eval_tolerance)

    @jax.jit
    def bits(params: Any, key: jax.Array, batch: Images) -> jax.Array:
        key_u, key_probe = jax.random.split(key)
        log_p = fm.log_prob(
            make_velocity(model, params, batch.labels),
            pixels.dequantize(key_u, batch.images, dataset.num_levels),
            divergence=fm.hutchinson_divergence(key_probe, config.eval_probes),
            stepsize_controller=controller,
        )
        return fm.bits_per_dim(log_p, batch.images.shape[1:], num_levels=dataset.num_levels)

    _say("Bits/dim of held-out images ...")
    began, values = time.perf_counter(), []
    for start in range(0, num, size):
        rows = np.arange(start, start + size) % num  # a short last batch is filled up
        batch = jax.tree.map(lambda x: sharding.spread(x, mesh(config)), read(rows))
        values.append(sharding.gathered(bits(params, jax.random.fold_in(key, start), batch)))
    values = np.concatenate(values)[:num]
    given = ", given their classes" if config.conditional else ""
    return {
        "bits_per_dim": float(values.mean()),
        "bits_per_dim_standard_error": standard_error(values),
        "bits_per_dim_method": (
            f"first {num} images of {config.dataset} {config.eval_split}{given}; uniform "
            f"dequantisation of {dataset.num_levels} levels, one draw; Hutchinson with "
            f"{config.eval_probes} probe(s); Tsit5, tolerance {config.eval_tolerance:g}; EMA "
            "parameters"
        ),
        "bits_per_dim_seconds": round(time.perf_counter() - began, 1),
    }
