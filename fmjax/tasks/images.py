"""What image experiments share: their flags, and what is done with a trained one.

Pixels are dequantised uniformly, in training and in evaluation, so that the likelihood is one of
the discrete images: x = 2 (v + u) / num_levels - 1, u ~ U[0, 1).

A conditional run tells the network the class of every image, but for a part of them, drawn one by
one, for which it says "none": so it learns both branches of classifier-free guidance.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import models, plotting, training
from fmjax.data import pixels
from fmjax.evaluation import images as evaluation
from fmjax.evaluation.judging import RealImages
from fmjax.harness import places
from fmjax.harness.config import RunConfig
from fmjax.harness.task import Init, Samples, Task
from fmjax.models import kernels as xla
from fmjax.tasks import image_figures
from fmjax.tasks.image_data import Images as Images
from fmjax.tasks.image_data import Pictures as Pictures
from fmjax.tasks.image_data import describe, load
from fmjax.tasks.image_networks import KERNELS as KERNELS
from fmjax.tasks.image_networks import DiTConfig as DiTConfig
from fmjax.tasks.image_networks import UNetConfig as UNetConfig
from fmjax.tasks.image_networks import check_beginning, check_network
from fmjax.tasks.image_networks import choose_kernels as choose_kernels
from fmjax.tasks.image_networks import init_params as init_params
from fmjax.tasks.image_networks import make_network as make_network

Network = models.UNet | models.DiT


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
    network: Literal["unet", "dit"] = "unet"
    """A U-Net, whose size --model says, or a transformer over patches, whose size --dit says."""
    model: UNetConfig = UNetConfig()
    """The U-Net's size."""
    dit: DiTConfig = DiTConfig()
    """The transformer's size."""
    conditional: bool = False
    """Whether the network is told the class of an image."""
    label_dropout: float = 0.1
    """Share of the images whose class a conditional network isn't told in training."""
    guidance: float | None = None
    """Scale of the guidance in drawing from a conditional network, 1 is none; without the flag 2
    where the network has learnt it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the network's computation in training. Parameters, statistics and loss stay float32."""
    remat: bool = False
    """Whether the backward pass computes a block's activations again instead of keeping them."""
    kernels: Literal["auto", "xla", "cpu"] = "auto"
    """Convolutions and attention by XLA's kernels or those made for one CPU device, which compile
    longer; auto takes the latter from 300 steps on, which pay that back."""
    num_samples: int = 64
    """Images to draw at the end; of a conditional network as many of each class as go into them.
    0 for none."""
    sample_tolerance: float = 1e-3
    """Tolerance of Tsit5 in drawing."""
    eval_examples: int = 256
    """Held-out images for bits/dim, the first of the split; 0 for none."""
    eval_batch_size: int = 64
    """Images per likelihood solve."""
    eval_probes: int = 1
    """Hutchinson probes per image."""
    eval_tolerance: float = 1e-3
    """Tolerance of Tsit5 in the likelihood."""


def open_images(config: ImageConfig) -> Pictures:
    """The images that the flags name, and what they are.

    Raises:
      ValueError: for flags that can't work together; by what is read, as `data.load` does.
    """
    check_conditions(config)
    check_network(config)
    if config.init_from is not None:
        check_beginning(config, places.as_path(config.init_from), "--init-from")
    pictures = Pictures(config)
    check_network(config, pictures.event_shape)
    if config.conditional and pictures.num_classes < 2:
        raise ValueError(
            f"--conditional needs images of several classes; {config.dataset} has "
            f"{pictures.num_classes}. Give --no-conditional."
        )
    return pictures


def check_conditions(config: ImageConfig) -> None:
    """Refuses flags of conditions that can't work, or that an unconditional run has no use for."""
    if not 0 <= config.label_dropout <= 1:
        raise ValueError(f"--label-dropout must be in [0, 1]; got {config.label_dropout}.")
    if config.guidance not in (None, 1) and not config.conditional:
        raise ValueError(
            f"--guidance needs a network that knows classes; got {config.guidance} without "
            "--conditional."
        )
    if config.guidance not in (None, 1) and not config.label_dropout:
        raise ValueError(
            f"--guidance other than 1 needs a network that was trained without classes too; got "
            f"{config.guidance} and --label-dropout 0. 0.1 is usual."
        )


def drop_labels(config: ImageConfig, key: jax.Array, labels: Any, num_classes: int) -> Any:
    """The labels that the network is told: a part of them, drawn one by one, is "none"."""
    if labels is None:  # of a network without classes
        return None
    return fm.drop_labels(key, labels, num_classes, config.label_dropout)


def training_velocity(
    config: ImageConfig, model: Network, params: Any, key: jax.Array, labels: Any
) -> fm.Velocity:
    """The velocity as it is trained: with dropout, in the precision that the flags ask for."""
    trained = model.clone(dtype=jnp.dtype(config.precision), remat=config.remat)
    return functools.partial(
        trained.apply, params, labels=labels, deterministic=False, rngs={"dropout": key}
    )


def velocity_of(model: Network, params: Any, labels: Any = None) -> fm.Velocity:
    """The velocity under the labels `[batch]`; that of no class without them."""
    apply = functools.partial(model.apply, params)
    return apply if labels is None else functools.partial(apply, labels=labels)


def make_task(
    config: ImageConfig,
    pictures: Pictures,
    model: Network,
    init: Init,
    step: training.TrainStep,
    *,
    velocity_of: Callable[[Network, Any, Any], fm.Velocity] = velocity_of,
) -> Task:
    """The task of an image experiment, from what differs between them.

    Args:
      config: its flags.
      pictures: from `open_images`.
      model: from `make_network`.
      init: `key -> TrainState`.
      step: `(state, key, Images) -> (state, metrics)`.
      velocity_of: `(model, params, labels) -> velocity` from the standard normal source to the
        data, of a network that predicts something else; labels are None for no class.
    """
    training_now = config.known is None
    # Solves in training take its kernels, which are compiled in part; others XLA's own.
    fast = functools.partial(velocity_of, model)
    plain = functools.partial(velocity_of, model.clone(kernels=xla.KERNELS))
    return Task(
        num_examples=pictures.facts["num_examples"],
        batch=pictures.batch,
        init=init,
        step=step,
        velocity=plain,
        finish=functools.partial(image_figures.finish, pictures, fast),
        evaluate=lambda trained, folder, flags: evaluation.evaluate(
            real_images(config, pictures), trained, folder, flags
        ),
        preview=functools.partial(image_figures.preview, pictures, fast),
        samples=_samples(config, pictures),
        num_held_out=len(pictures.held_out.images) if training_now else 0,
        held_out=pictures.held_out_batch,
        about=f"{choose_kernels(config)} kernels (--kernels {config.kernels})",
        data=lambda: describe(pictures.train),
    )


def real_images(config: ImageConfig, pictures: Pictures) -> RealImages:
    """What a run was trained on, for those who judge its samples."""
    return RealImages(
        config.dataset,
        config.data_name(),
        config.train_split,
        config.eval_split,
        functools.partial(load, config),
        pictures.facts["sha256"],
    )


def _samples(config: ImageConfig, pictures: Pictures) -> Samples:
    num_classes, levels = pictures.num_classes, pictures.num_levels

    def arrays(x1: np.ndarray) -> dict[str, np.ndarray]:
        return {"images": np.asarray(pixels.quantize(jnp.asarray(x1), levels))}

    def condition(rows: np.ndarray) -> np.ndarray:
        return (rows % num_classes).astype(np.int32)

    def picture(arrays: dict[str, np.ndarray], labels: Any) -> np.ndarray:
        if labels is None:
            return plotting.grid(arrays["images"], num_levels=levels)
        classes = list(dict.fromkeys(np.asarray(labels).tolist()))
        return plotting.by_class(arrays["images"], labels, levels, classes=classes)

    def single(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return plotting.picture(arrays["images"], num_levels=levels)

    return Samples(
        fm.standard_normal(pictures.event_shape),
        arrays,
        condition if config.conditional else None,
        num_classes if config.conditional and config.label_dropout else None,
        num_classes if config.conditional else None,
        picture,
        single if pictures.event_shape[-1] in (1, 3) else None,
    )
