"""What the image experiments share: flags, data, U-Net, loss, samples and bits/dim.

Pixels are dequantised uniformly, in training and in evaluation, so that the likelihood is one of
the discrete images: x = 2 (v + u) / num_levels - 1, u ~ U[0, 1).
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any, Literal

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import cluster, loop, plots, step
from experiments.config import RunConfig, begin, check_num_examples, mesh
from experiments.errors import standard_error
from experiments.run import Run
from fmjax import data, models, training
from fmjax.data import pixels
from fmjax.models import cpu
from fmjax.models import kernels as xla
from fmjax.training import sharding

KERNELS = {"xla": xla.KERNELS, "cpu": cpu.KERNELS}
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
    """scikit-learn's "digits", or the TFDS name of an image data set."""
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation in training. Parameters, statistics and loss stay float32."""
    remat: bool = False
    """Whether the backward pass computes a block's activations again instead of keeping them."""
    kernels: Literal["auto", "xla", "cpu"] = "auto"
    """Convolutions and attention by XLA's kernels or those made for one CPU device, which compile
    longer; auto takes the latter from 300 steps on, which pay that back."""
    num_samples: int = 64
    """Images to draw at the end."""
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
    begin(config)
    dataset = load(config, config.train_split)
    check_num_examples(config, len(dataset.images))
    held_out = load(config, config.eval_split)
    plain = models.UNet(**dataclasses.asdict(config.model))
    shape, levels = dataset.images.shape[1:], dataset.num_levels
    init = functools.partial(plain.init, t=jnp.zeros(()), x=jnp.zeros((1, *shape)))
    jax.eval_shape(init, jax.random.key(0))  # a size that can't work is refused here
    kernels = choose_kernels(config)
    model = plain.clone(kernels=KERNELS[kernels])
    trained = model.clone(dtype=jnp.dtype(config.precision), remat=config.remat)
    key_params, key_train, key_x0, key_eval = jax.random.split(jax.random.key(config.seed), 4)
    tx = step.make_optimizer(config)
    with Run(name, config) as run:
        state = step.init_state(config, init, key_params, tx)
        draw, loss_fn = make_draw(config, levels), make_loss(trained)
        _say(f"Training with the {kernels} kernels (--kernels {config.kernels}).")
        steps = step.make_steps(config, draw, loss_fn, tx, state)
        state, rate = loop.train(run, state, steps, key_train, dataset.images)
        summary = {
            "experiment": name,
            "step": int(state.step),
            "num_parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            **save_samples(run, model, config, state, levels, shape, key_x0),
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
      ValueError: as `data.load` does; for a folder, and for what TFDS can't load.
    """
    if config.dataset == "digits":
        return data.load_digits(split)
    try:
        return data.load(config.dataset, split, config.data_dir)
    except (ValueError, AssertionError, ImportError) as error:
        reason = _no_dataset(config.dataset, str(error).splitlines()[0])
        if reason is None:
            raise
        raise ValueError(
            '--dataset must be "digits" or the TFDS name of an image data set, such as mnist, '
            f"fashion_mnist or cifar10; got {config.dataset}: {reason}"
        ) from error


def _no_dataset(name: str, said: str) -> str | None:
    """Why a name is no data set's, where TFDS or `fmjax.data` could make nothing of it."""
    foreign = said.startswith(("Parsing builder name", "Failed to construct"))  # in TFDS's words
    if pathlib.Path(name).expanduser().is_dir() and (foreign or said.startswith("name must be")):
        return "that is a folder. Pictures of your own can't be trained on yet."
    return f"TFDS says: {said}" if foreign else None


def make_draw(config: ImageConfig, num_levels: int) -> step.Draw:
    """`(key, uint8 images) -> PathSample`: flip, dequantise, pair with noise, choose times."""

    def draw(key: jax.Array, images: jax.Array) -> fm.PathSample:
        key_flip, key_u, key_path = jax.random.split(key, 3)
        if config.flip:
            images = pixels.random_flip(key_flip, images)
        x1 = pixels.dequantize(key_u, images, num_levels)
        return step.draw_path_sample(config, key_path, x1)

    return draw


def make_loss(model: models.UNet) -> training.LossFn:
    def loss_fn(params: Any, key: jax.Array, path_sample: fm.PathSample) -> jax.Array:
        velocity = functools.partial(
            model.apply, params, deterministic=False, rngs={"dropout": key}
        )
        return jnp.mean(fm.cfm_loss(velocity, path_sample))

    return loss_fn


def save_samples(
    run: Run,
    model: models.UNet,
    config: ImageConfig,
    state: training.TrainState,
    num_levels: int,
    shape: tuple[int, ...],
    key: jax.Array,
) -> dict[str, Any]:
    """Draws samples over all devices and saves their picture and the loss curve."""
    controller = diffrax.PIDController(rtol=config.sample_tolerance, atol=config.sample_tolerance)

    @jax.jit
    def solve(params: Any, x0: jax.Array) -> tuple[jax.Array, jax.Array]:
        velocity = functools.partial(model.apply, params)
        trajectory = fm.integrate(velocity, x0, stepsize_controller=controller)
        return trajectory.x[-1], trajectory.num_evaluations

    _say(f"Drawing {config.num_samples} samples ...")
    x0 = np.asarray(jax.random.normal(key, (config.num_samples, *shape)))
    x1, num_evaluations = sharding.gathered(
        solve(state.ema_params, sharding.spread(x0, mesh(config)))
    )
    grid = run.folder / "samples" / f"step_{int(state.step):08d}.png"
    if cluster.is_main():
        plots.save_loss_curve(run.metrics(), run.folder / "loss.png")
        images = np.asarray(pixels.quantize(x1, num_levels))
        plots.save_grid(images, grid, num_levels=num_levels)
    return {
        "num_evaluations": int(num_evaluations),
        "sampler": f"Tsit5, tolerance {config.sample_tolerance:g}, EMA parameters",
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
    images = dataset.images[: config.eval_examples]
    size = min(config.eval_batch_size, len(images))
    controller = diffrax.PIDController(rtol=config.eval_tolerance, atol=config.eval_tolerance)

    @jax.jit
    def bits(params: Any, key: jax.Array, batch: jax.Array) -> jax.Array:
        key_u, key_probe = jax.random.split(key)
        log_p = fm.log_prob(
            functools.partial(model.apply, params),
            pixels.dequantize(key_u, batch, dataset.num_levels),
            divergence=fm.hutchinson_divergence(key_probe, config.eval_probes),
            stepsize_controller=controller,
        )
        return fm.bits_per_dim(log_p, batch.shape[1:], num_levels=dataset.num_levels)

    _say("Bits/dim of held-out images ...")
    began, values = time.perf_counter(), []
    for start in range(0, len(images), size):
        rows = np.arange(start, start + size) % len(images)  # a short last batch is filled up
        batch = sharding.spread(images[rows], mesh(config))
        values.append(sharding.gathered(bits(params, jax.random.fold_in(key, start), batch)))
    values = np.concatenate(values)[: len(images)]
    return {
        "bits_per_dim": float(values.mean()),
        "bits_per_dim_standard_error": standard_error(values),
        "bits_per_dim_method": (
            f"first {len(images)} images of {config.dataset} {config.eval_split}; uniform "
            f"dequantisation of {dataset.num_levels} levels, one draw; Hutchinson with "
            f"{config.eval_probes} probe(s); Tsit5, tolerance {config.eval_tolerance:g}; EMA "
            "parameters"
        ),
        "bits_per_dim_seconds": round(time.perf_counter() - began, 1),
    }
