"""A small classifier whose features serve for a Fréchet distance where there is no Inception.

    python -m fmjax.evaluation.encoder --dataset fashion_mnist

Its folder, runs/encoder_fashion_mnist, holds the weights and encoder.json: the data set, the flags,
the accuracy on held-out images, the weights' SHA-256. A distance between such features is called
"FD (encoder NAME)". It is no FID, and figures of two encoders can't be compared.

Adam, its rate falling to zero along a cosine; the parameters' moving average is what is kept. On a
CPU equal flags give equal weights, byte for byte.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fmjax import data, training
from fmjax.data import pixels
from fmjax.evaluation import classifier
from fmjax.evaluation.classifier import Classifier
from fmjax.evaluation.classifier import load_encoder as load_encoder
from fmjax.evaluation.reference import encode
from fmjax.files import hash_bytes
from fmjax.harness import command
from fmjax.harness.bounds import check_numbers, check_seeds
from fmjax.harness.progress import progress
from fmjax.harness.records import environment, make_folder
from fmjax.metrics import Estimate, class_accuracy
from fmjax.metrics.encoders import Encoder

NUM_STEPS = {"digits": 300, "mnist": 1500, "fashion_mnist": 1500, "cifar10": 2000}
OWN_STEPS = 1000  # for a data set of a user's own
FLIPPED = frozenset({"cifar10"})  # a mirrored digit is none, and all shoes point the same way


@dataclasses.dataclass(frozen=True)
class Config:
    """A classifier as an encoder."""

    dataset: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Labelled images: scikit-learn's "digits", or the TFDS name of a data set."""
    data_dir: pathlib.Path | None = None
    """Where TFDS data sets are; else TFDS_DATA_DIR, else TFDS's own default."""
    workdir: pathlib.Path | None = None
    """The encoder's folder; else runs/encoder_DATASET."""
    seed: int = 0
    """Seed of everything random: parameters, order of the images, mirroring."""
    train_split: str = "train"
    """Images to train on, in TFDS's notation: train, train[:5000], ..."""
    test_split: str = "test"
    """Held-out images for the accuracy."""
    num_steps: int | None = None
    """Training steps; else the data set's own number, from 300 to 2000."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 5e-3
    """Adam's first learning rate."""
    ema_decay: float = 0.99
    """Decay of the parameters' moving average."""


def main(config: Config) -> dict[str, Any]:
    """Trains, measures, writes; returns what stands in encoder.json."""
    check(config)
    folder = config.workdir or pathlib.Path(f"runs/encoder_{config.dataset}")
    if (folder / "encoder.json").exists():
        return _already_there(folder, config)
    make_folder(folder)
    train_set, test_set = (load(config, split) for split in (config.train_split, config.test_split))
    record = make(config, folder, train_set, test_set)
    print(json.dumps(record, indent=2, ensure_ascii=False))
    print(f"\nEncoder  {folder}")
    return record


def make(
    config: Any, folder: pathlib.Path, train_set: data.ImageDataset, test_set: data.ImageDataset
) -> dict[str, Any]:
    """Trains on one data set, measures on another, writes; returns what stands in encoder.json.

    Args:
      config: the flags; `dataset` is what the data set is called.
      folder: where to, made already.
      train_set: labelled images.
      test_set: others, of the same classes.
    """
    image_shape = train_set.images.shape[1:]
    model = Classifier(
        num_classes=train_set.num_classes,
        num_levels=train_set.num_levels,
        strides=(2 if min(image_shape[:2]) >= 16 else 1, 2, 1, 2),
    )
    began = time.perf_counter()
    params = train(config, model, train_set)
    seconds = time.perf_counter() - began
    weights = classifier.to_bytes(params)
    digest = hash_bytes(weights)
    encoder = classifier.as_encoder(model, params, image_shape, name=config.dataset, digest=digest)
    accuracy, error = measure_accuracy(encoder, test_set)
    record = {
        "name": f"{config.dataset} classifier, {100 * accuracy:.1f} % test accuracy",
        "dataset": config.dataset,
        "accuracy": accuracy,
        "accuracy_standard_error": error if len(test_set.labels) > 1 else None,
        "num_test_images": len(test_set.labels),
        "num_train_images": len(train_set.labels),
        "image_shape": image_shape,
        "network": classifier.network(model),
        "num_parameters": sum(x.size for x in jax.tree.leaves(params)),
        "flip": config.dataset in FLIPPED,
        "config": flags(config),
        "train_seconds": round(seconds, 1),
        "sha256": digest,
    } | environment()
    classifier.write(folder, weights, record)
    return record


def check(config: Config) -> None:
    """Refuses flags that can't work, before anything is loaded or compiled."""
    check_numbers(config, may_be_zero={"seed", "ema_decay"})
    check_seeds("seed", [config.seed])
    if config.ema_decay > 1:
        raise ValueError(f"--ema-decay must be in [0, 1]; got {config.ema_decay}.")


def flags(config: Config) -> dict[str, Any]:
    """The flags that make the weights, as JSON can hold them."""
    values = dataclasses.asdict(config) | {"num_steps": _num_steps(config)}
    return {name: value for name, value in values.items() if name not in ("data_dir", "workdir")}


def load(config: Config, split: str) -> data.ImageDataset:
    """The split of the data set, in memory."""
    if config.dataset == "digits":
        return data.load_digits(split)
    return data.load(config.dataset, split, config.data_dir)


def train(config: Config, model: Classifier, dataset: data.ImageDataset) -> Any:
    """The averaged parameters after all steps, on the host.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    num_steps = _num_steps(config)
    key_params, key_train = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(model.init)(key_params, dataset.images[:1])
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate, num_steps))
    loss_fn = make_loss(model, flip=config.dataset in FLIPPED)
    step_fn = training.make_train_step(loss_fn, tx, ema_decay=config.ema_decay)
    step_fn = jax.jit(step_fn, donate_argnums=0)
    state = training.init_train_state(params, tx)
    size = min(config.batch_size, len(dataset.images))
    batches = data.batches(len(dataset.images), size, seed=config.seed)
    with progress(total=num_steps, unit="step") as bar:
        for step, rows in enumerate(itertools.islice(batches, num_steps), start=1):
            batch = dataset.images[rows], dataset.labels[rows]
            state, metrics = step_fn(state, key_train, batch)
            if step % 50 == 0 or step == num_steps:
                loss = _finite(float(metrics.loss), step)
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
    return jax.device_get(state.ema_params)


def make_loss(model: Classifier, *, flip: bool) -> training.LossFn:
    """The mean cross-entropy of `(images, labels)`."""

    def loss_fn(params: Any, key: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        logits = model.apply(params, pixels.random_flip(key, images) if flip else images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels)
        return jnp.mean(losses)

    return loss_fn


def measure_accuracy(encoder: Encoder, dataset: data.ImageDataset) -> Estimate:
    """The share of images whose largest logit is their label's, and its standard error."""
    assert encoder.logits is not None
    logits = encoder.logits(encode(encoder, dataset.images, batch_size=500))
    return class_accuracy(logits, dataset.labels)


def _num_steps(config: Config) -> int:
    return (
        NUM_STEPS.get(config.dataset, OWN_STEPS) if config.num_steps is None else config.num_steps
    )


def _finite(loss: float, step: int) -> float:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss of step {step} is {loss}; nothing is written. A lower --learning-rate is "
            "the usual fix."
        )
    return loss


def _already_there(folder: pathlib.Path, config: Config) -> dict[str, Any]:
    """The record of a folder's encoder, if it is complete and was made with the same flags."""
    load_encoder(folder)
    record = classifier.read_record(folder)
    if record["config"] != flags(config):
        raise ValueError(
            f"{folder} holds an encoder made with {record['config']}; got {flags(config)}. "
            "Figures may rest on it: take another --workdir, or delete the folder."
        )
    print(f"{folder} holds this encoder already: {record['name']}.")
    return record


if __name__ == "__main__":
    command.run(main, Config, name="fmjax.evaluation.encoder", doc=__doc__)
