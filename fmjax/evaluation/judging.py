"""What sample quality is measured with: an encoder and the real images' features under it.

The encoder is the FID Inception network where its weights are at hand, under one of two protocols
of preprocessing; or a published CIFAR-10 ResNet, whose figures anybody can compute again; or else a
classifier of `fmjax.evaluation.encoder`, trained on the data set. Only the first gives an FID; the
others give "FD (NAME)", comparable under that encoder alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import data, metrics
from fmjax.data import pixels
from fmjax.evaluation import encoder as encoders
from fmjax.evaluation.classifier import Classifier
from fmjax.evaluation.reference import Reference, load_or_compute
from fmjax.harness.pods import cluster
from fmjax.harness.records import make_folder
from fmjax.metrics import resnet
from fmjax.metrics.encoders import (
    LEGACY_TENSORFLOW,
    TORCHMETRICS,
    Encoder,
    inception_encoder,
    resnet_encoder,
)

KID_IMAGES = 10_000  # real images for KID, the first: all pairs of more would cost more than shows
PROTOCOLS = {"A": LEGACY_TENSORFLOW, "B": TORCHMETRICS}


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """What sample quality is measured with."""

    inception: pathlib.Path | None = None
    """Weights of the FID Inception network, pt_inception-2015-12-05-6726825d.pth or safetensors."""
    inception_sha256: str = "6726825d"
    """SHA-256 that the weights must have, or its first eight digits or more."""
    protocol: Literal["A", "B"] = "A"
    """Preprocessing: A as clean-fid's legacy_tensorflow, B as torchmetrics'."""
    resnet: pathlib.Path | None = None
    """Weights of a CIFAR-10 ResNet: a .th of pytorch_resnet_cifar10, or as .npz or safetensors."""
    encoder: pathlib.Path | None = None
    """Folder of an encoder, else runs/encoder_DATASET, made where there is none."""
    reference_split: str | None = None
    """The real images, else the run's --train-split."""
    reference_dir: pathlib.Path = pathlib.Path("runs/reference")
    """Where features of real images are kept."""
    num_splits: int = 10
    """Groups of samples that errors are taken over."""
    allow_few_samples: bool = False
    """Whether to accept fewer samples than a covariance of full rank needs."""


class RealImages(NamedTuple):
    """What a run was trained on, as a judge asks for it.

    Attributes:
      dataset: its name, or where it is.
      word: the same as a file may be called.
      train_split: the split that the run was trained on.
      eval_split: the split that it was not.
      load: `split -> ImageDataset`.
      sha256: of the images and labels that it was trained on.
    """

    dataset: str
    word: str
    train_split: str
    eval_split: str
    load: Callable[[str], data.ImageDataset]
    sha256: str


class Judge(NamedTuple):
    """An encoder, the real images' features, and how errors are taken.

    Attributes:
      encoder: images -> features.
      reference: features and moments of the real images.
      num_classes: of the data; an encoder of as many knows them.
      num_splits: groups of the jackknife and of the Inception score.
      allow_singular: whether fewer samples than features are accepted.
      record: what stands in evaluation.json about it.
    """

    encoder: Encoder
    reference: Reference
    num_classes: int
    num_splits: int
    allow_singular: bool
    record: dict[str, Any]

    def encode(self, images: np.ndarray, batch_size: int) -> np.ndarray:
        """Features of pixel values `[num, ...]`, in batches of one size so that one compiles."""
        rows = np.arange(-(-len(images) // batch_size) * batch_size) % len(images)
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return np.concatenate([self.encoder.features(images[b]) for b in batches])[: len(images)]

    def features(self, x1: np.ndarray, num_levels: int, batch_size: int) -> np.ndarray:
        """Features of samples in [-1, 1], rounded to pixel values first."""
        return self.encode(np.asarray(pixels.quantize(jnp.asarray(x1), num_levels)), batch_size)

    def frechet(self, features: np.ndarray) -> metrics.Estimate:
        return metrics.frechet_estimate(
            features,
            self.reference.moments,
            num_splits=self.num_splits,
            allow_singular=self.allow_singular,
        )

    def figures(
        self, features: np.ndarray, labels: np.ndarray | None
    ) -> dict[str, metrics.Estimate]:
        """Every figure of one set of features `[num, D]`, by its name.

        `labels`, `[num]`, are the classes that the samples were drawn for, if they were for any.
        """
        real, splits = self.reference.features[:KID_IMAGES], self.num_splits
        found = {
            "frechet_distance": self.frechet(features),
            "kid": metrics.kernel_distance(features, real, num_splits=splits),
        }
        if self.encoder.logits is not None:
            logits = self.encoder.logits(features)
            found["inception_score"] = metrics.inception_score(logits, num_splits=splits)
            if labels is not None and logits.shape[1] == self.num_classes:
                found["class_accuracy"] = metrics.class_accuracy(logits, labels)
        return found

    def of_sets(
        self, sets: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int
    ) -> dict[str, list[float]]:
        """Distance, its error and class accuracy of every set of (pixel values, their classes)."""
        found = [self.figures(self.encode(x1, batch_size), labels) for x1, labels in sets]
        return {
            "fd": [figures["frechet_distance"].value for figures in found],
            "fd_standard_error": [figures["frechet_distance"].standard_error for figures in found],
            "accuracy": [figures["class_accuracy"].value for figures in found],
        }

    def check_num_samples(self, flag: str, num_samples: int) -> None:
        """Refuses, before anything is drawn, fewer samples than the figures and errors need."""
        splits, dim = self.num_splits, self.encoder.num_features
        if num_samples < 2 * splits:
            raise ValueError(
                f"Errors over {splits} groups need two samples in each; got {flag} {num_samples}. "
                "Draw more, or give a smaller --judge.num-splits."
            )
        left = num_samples - -(-num_samples // splits)  # the error leaves one group out
        if left <= dim and not self.allow_singular:
            least = next(n for n in range(dim, 4 * dim + 8) if n - -(-n // splits) > dim)
            raise ValueError(
                f"A covariance of {dim} features has full rank from {dim + 1} samples on, with one "
                f"of {splits} groups left out for the error; got {flag} {num_samples}. Draw at "
                f"least {least}, or give --judge.allow-few-samples and compare the figure with "
                "none."
            )


def real_sets(
    real: data.ImageDataset, labels: np.ndarray, seeds: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each seed a set of real images of these classes, drawn with replacement."""
    of_class = [np.flatnonzero(real.labels == label) for label in labels]

    def picked(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.array([rng.choice(rows) for rows in of_class])

    return [(real.images[picked(seed)], labels) for seed in seeds]


def check(config: JudgeConfig) -> None:
    """Refuses flags that can't work together, before anything is loaded."""
    if config.num_splits < 2:
        raise ValueError(f"--judge.num-splits must be at least 2; got {config.num_splits}.")
    given = [n for n in ("inception", "resnet", "encoder") if getattr(config, n) is not None]
    if len(given) > 1:
        flags = " and ".join(f"--judge.{name}" for name in given)
        raise ValueError(f"There is one encoder; got {flags}. Give one of them.")
    if config.inception is None and config.protocol != "A":
        raise ValueError(
            f"--judge.protocol is the Inception network's preprocessing; got {config.protocol} "
            "without --judge.inception FILE."
        )


def make_judge(config: JudgeConfig, images: RealImages, batch_size: int) -> Judge:
    """Loads or trains the encoder, and the real images' features, computed once.

    In a pod by process 0, while the others wait; they find its files.
    """
    made = cluster.main_first(lambda: _make_judge(config, images, batch_size))
    return made or _make_judge(config, images, batch_size)


def _make_judge(config: JudgeConfig, images: RealImages, batch_size: int) -> Judge:
    encoder, name = _encoder(config, images)
    split = config.reference_split or images.train_split
    real = images.load(split)
    _check_real(config, images.dataset, split, real, encoder.num_features)
    reference = load_or_compute(
        config.reference_dir, encoder, images.word, split, real.images, batch_size=batch_size
    )
    record = {
        "distance": name,
        "encoder": encoder.name,
        "encoder_sha256": encoder.digest,
        "num_features": encoder.num_features,
        "reference": reference.record,
        "num_splits": config.num_splits,
        "kid_images": min(KID_IMAGES, len(real.images)),
    }
    return Judge(
        encoder,
        reference,
        real.num_classes,
        config.num_splits,
        config.allow_few_samples,
        record,
    )


def _encoder(config: JudgeConfig, images: RealImages) -> tuple[Encoder, str]:
    """The encoder that the flags name, and what a Fréchet distance under it is called."""
    if config.inception is not None:
        protocol = PROTOCOLS[config.protocol]
        encoder = inception_encoder(config.inception, protocol, sha256=config.inception_sha256)
        return encoder, f"FID (protocol {config.protocol})"
    if config.resnet is not None:
        encoder = resnet_encoder(config.resnet)
        weights = f"{encoder.num_features} features, weights sha256 {encoder.digest[:8]}"
        return encoder, f"FD ({encoder.name}, {weights})"
    encoder = _classifier(config, images)
    return encoder, f"FD (encoder {encoder.name})"


def _check_real(
    config: JudgeConfig, dataset: str, split: str, real: data.ImageDataset, num_features: int
) -> None:
    """The real images are such as the encoder takes, and enough of them."""
    if config.inception is not None and real.num_levels != 256:
        raise ValueError(
            f"The Inception network takes images of 256 levels; {dataset} has "
            f"{real.num_levels}. Leave --judge.inception out: a classifier of its own serves."
        )
    shape = real.images.shape[1:]
    if config.resnet is not None and (shape != resnet.IMAGE_SHAPE or real.num_levels != 256):
        raise ValueError(
            f"A CIFAR-10 ResNet takes images [32, 32, 3] of 256 levels; {dataset} has "
            f"{list(shape)} of {real.num_levels}. Leave --judge.resnet out: a classifier of its "
            "own serves."
        )
    _check_enough(config, split, real, num_features)


def _check_enough(
    config: JudgeConfig, split: str, real: data.ImageDataset, num_features: int
) -> None:
    if len(real.images) <= num_features and not config.allow_few_samples:
        raise ValueError(
            f"A covariance of {num_features} features needs more real images; got "
            f"{len(real.images)} in {split}. Take a larger --judge.reference-split, or give "
            "--judge.allow-few-samples and compare the figure with none."
        )


def _classifier(config: JudgeConfig, images: RealImages) -> Encoder:
    """The one in the folder, or one of the data set's own, trained where there is none."""
    if config.encoder is not None:
        return encoders.load_encoder(config.encoder)
    own = images.dataset not in encoders.NUM_STEPS
    # Pictures of a user's own may change under one name.
    name = f"{images.word}-{images.sha256[:8]}" if own else images.dataset
    folder = pathlib.Path(f"runs/encoder_{name}")
    if (folder / "encoder.json").exists():
        return encoders.load_encoder(folder)
    if not cluster.is_main():
        raise ValueError(
            "The processes of a pod must see one encoder: process 0 has trained one into its "
            f"runs/encoder_{name}, and process {jax.process_index()} does not find it in "
            f"{folder.absolute()}. Start all in one working folder, or name one by --judge.encoder."
        )
    train_split = images.train_split if own else "train"
    train_set = images.load(train_split)
    test_set = images.load(images.eval_split if own else "test")
    if train_set.num_classes < 2:
        raise ValueError(
            f"An encoder is trained on classes; got {train_set.num_classes} in {images.dataset}. "
            "Name one by --judge.encoder, or published weights by --judge.inception or "
            "--judge.resnet."
        )
    real = images.load(config.reference_split or images.train_split)
    _check_enough(config, images.train_split, real, Classifier.num_features)  # before the training
    print(f"No encoder for {images.dataset}: training one into {folder}.", flush=True)
    make_folder(folder)
    flags = dataclasses.replace(encoders.Config(), workdir=folder, dataset=images.dataset)  # pyright: ignore
    encoders.make(flags, folder, train_set, test_set)
    return encoders.load_encoder(folder)
