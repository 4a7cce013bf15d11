"""The classifier that serves as an encoder: its accuracy, its files, and what it refuses."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from oracles import jit
from scipy import special

from fmjax import data
from fmjax.evaluation import classifier, encoder
from fmjax.evaluation.classifier import Classifier
from fmjax.evaluation.encoder import Config, load_encoder

TEST = data.load_digits("test")
IMAGES = TEST.images[:9]


def train(folder, **kwargs):
    config = Config(workdir=folder, **{"num_steps": 120, "batch_size": 64} | kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        return encoder.main(config)


pytestmark = pytest.mark.slow  # nearly all need one that was trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained encoder's folder, not to be changed."""
    path = tmp_path_factory.mktemp("runs") / "an encoder, ü"
    train(path)
    return path


@pytest.fixture
def one_layer(monkeypatch):
    """One convolution in place of four, which compiles faster."""
    monkeypatch.setattr(
        encoder, "Classifier", lambda **kw: Classifier(**kw | {"widths": (8,), "strides": (2,)})
    )


@pytest.fixture
def copy(folder, tmp_path):
    """One to be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def direct(folder):
    """The network and its parameters, read without `load_encoder`."""
    flat = safetensors.numpy.load_file(folder / "encoder.safetensors")
    params = traverse_util.unflatten_dict({tuple(k.split("/")): x for k, x in flat.items()})
    return Classifier(num_classes=10, num_levels=17, strides=(1, 2, 1, 2)), params


def test_tiny_training_reads_digits_and_records_how_well(folder):
    record = json.loads((folder / "encoder.json").read_text())
    model, params = direct(folder)
    logits = np.asarray(jit(model.apply)(params, TEST.images))
    accuracy = np.mean(logits.argmax(axis=1) == TEST.labels)
    # Guessing gives 0.1; this seed gave 0.990.
    assert accuracy > 0.9
    assert record["accuracy"] == accuracy and record["num_test_images"] == 297
    error = np.std(logits.argmax(axis=1) == TEST.labels) / np.sqrt(297)
    np.testing.assert_allclose(record["accuracy_standard_error"], error, rtol=1e-12)
    assert load_encoder(folder).name == f"digits classifier, {100 * accuracy:.1f} % test accuracy"
    assert record["network"]["num_levels"] == 17 and record["image_shape"] == [8, 8, 1]
    assert {"jax", "flax", "safetensors"} <= record["versions"].keys()
    assert sorted(path.name for path in folder.iterdir()) == ["encoder.json", "encoder.safetensors"]


def test_equal_seeds_give_equal_bytes(tmp_path, one_layer):
    small = {"num_steps": 4, "train_split": "train[:200]", "test_split": "test[:20]"}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, seed=seed, **small)
    a, b, c = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_a_loaded_encoder_is_the_network(folder):
    loaded, (model, params) = load_encoder(folder), direct(folder)
    features = loaded.features(IMAGES)
    assert (type(features), features.dtype, features.shape) == (np.ndarray, np.float32, (9, 64))
    assert loaded.num_features == 64
    wanted = jit(model.apply, static_argnames="method")(params, IMAGES, method="features")
    np.testing.assert_allclose(features, wanted, atol=1e-5)
    logits = jit(model.apply)(params, IMAGES)
    np.testing.assert_allclose(loaded.logits(features), logits, atol=1e-4)
    # The head is affine: the features are the last ones before it.
    head = params["params"]["head"]
    by_hand = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(loaded.logits(features), by_hand, atol=1e-4)


def test_features_do_not_depend_on_batch_mates(folder):
    loaded = load_encoder(folder)
    whole = loaded.features(IMAGES)
    singly = np.concatenate([loaded.features(image[None]) for image in IMAGES])
    np.testing.assert_allclose(singly, whole, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 0.1  # and on the image they do


@pytest.mark.parametrize("num_levels", [17, 256])
def test_pixels_enter_as_the_middle_of_their_bin(num_levels):
    size = dict(num_classes=2, widths=(8,), strides=(2,))
    model = Classifier(num_levels=num_levels, **size)
    other = Classifier(num_levels=1, **size)  # x = 2 v
    values = np.random.default_rng(0).integers(0, num_levels, (3, 8, 8, 3), np.uint8)
    params = jit(model.init)(jax.random.key(0), values)
    x = np.float32(2 * (values + 0.5) / num_levels - 1)
    np.testing.assert_allclose(
        jit(model.apply)(params, values), jit(other.apply)(params, x / 2), atol=1e-5
    )


def test_the_loss_is_the_mean_cross_entropy_and_flips_only_when_told(folder):
    model, params = direct(folder)
    labels, key = TEST.labels[:9], jax.random.key(0)
    log_p = special.log_softmax(np.asarray(jit(model.apply)(params, IMAGES)), axis=1)
    wanted = -log_p[np.arange(9), labels].mean()
    plain, flipped = (jit(encoder.make_loss(model, flip=flip)) for flip in (False, True))
    assert float(plain(params, key, (IMAGES, labels))) == pytest.approx(wanted, abs=1e-5)
    assert float(flipped(params, key, (IMAGES, labels))) != pytest.approx(wanted, rel=0.1)
    assert encoder.FLIPPED == {"cifar10"}


def test_the_published_default_is_about_a_hundred_thousand_parameters():
    for shape in ((8, 8, 1), (32, 32, 3)):
        model = Classifier(num_classes=10, num_levels=256, strides=(2, 2, 1, 2))
        images = jnp.zeros((1, *shape), jnp.uint8)
        params = jax.eval_shape(model.init, jax.random.key(0), images)
        assert 95_000 < sum(x.size for x in jax.tree.leaves(params)) < 105_000


def test_other_images_are_refused(folder):
    features = load_encoder(folder).features
    for wrong in (IMAGES[:, :4], IMAGES.repeat(3, axis=-1), IMAGES[0], IMAGES.astype(np.float32)):
        with pytest.raises(ValueError, match=r"takes uint8 images \[batch, 8, 8, 1\]; got "):
            features(wrong)
    brighter = IMAGES.copy()
    brighter[3, 2, 1, 0] = 17
    with pytest.raises(ValueError, match=r"pixel values in 0\.\.16; got 17"):
        features(brighter)


def test_a_missing_folder_or_file_comes_with_the_command(copy, tmp_path):
    command = "python -m fmjax.evaluation.encoder --dataset"
    with pytest.raises(
        FileNotFoundError, match=f"encoder.json is not there. Make one by {command}"
    ):
        load_encoder(tmp_path / "nowhere")
    (copy / "encoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"safetensors is not there. Make one by {command}"):
        load_encoder(copy)


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda x: x[:-100], lambda x: x + b"0"])
def test_weights_that_are_changed_or_truncated_are_refused(copy, damage):
    path = copy / "encoder.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="must have the SHA-256 .*--dataset digits --workdir"):
        load_encoder(copy)
    with pytest.raises(ValueError, match="must have the SHA-256"):
        train(copy)  # nor is it taken for a finished one


@pytest.mark.parametrize("content", ["", '{"name": "x"', "[]", '{"name": "x"}'])
def test_a_damaged_record_is_refused(copy, content):
    (copy / "encoder.json").write_text(content)
    with pytest.raises(ValueError, match="encoder.json must be a JSON record"):
        load_encoder(copy)


@pytest.mark.parametrize("change", [{"widths": [32, 64, 64, 32]}, {"num_classes": 11}])
def test_a_record_of_another_network_is_refused(copy, change):
    record = classifier.read_record(copy)
    record["network"] |= change
    (copy / "encoder.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="describes another network .* params/h"):
        load_encoder(copy)


def test_a_folder_with_an_encoder_is_left_as_it_is(folder, monkeypatch):
    monkeypatch.setattr(encoder, "train", None)  # not to be called
    assert train(folder) == classifier.read_record(folder)
    with pytest.raises(ValueError, match="holds an encoder made with .*take another --workdir"):
        train(folder, seed=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": -1},
        {"num_steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"ema_decay": 1.1},
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(encoder, "load", None)
    flag = next(iter(wrong)).replace("_", "-")
    with pytest.raises(ValueError, match=f"--{flag} must"):
        train(tmp_path / "x", **wrong)
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_writes_nothing(tmp_path, one_layer):
    with pytest.raises(FloatingPointError, match="The loss of step 3 is nan; nothing is written"):
        train(tmp_path, num_steps=3, learning_rate=1e30)
    assert list(tmp_path.iterdir()) == []
