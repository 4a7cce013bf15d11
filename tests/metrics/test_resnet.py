"""The CIFAR-10 ResNets: a plain NumPy network, the published accuracies, and what is refused."""

import functools
import hashlib
import os
import pathlib

import jax
import jax.numpy as jnp
import made_weights as made
import numpy as np
import pytest
import safetensors.numpy

from fmjax import data, metrics
from fmjax.evaluation import judging
from fmjax.evaluation.reference import encode
from fmjax.metrics import resnet
from fmjax.metrics.encoders import resnet_encoder

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)


@functools.cache
def state_dict(depth=8):
    """Random weights under which activations stay of order one and every part of a norm counts."""
    rng = np.random.default_rng(0)
    return {name: _draw(rng, name, shape) for name, shape in entries(depth).items()}


def entries(depth):
    """What the authors' class has, typed from its code."""
    shapes = {"conv1.weight": (16, 3, 3, 3), "linear.weight": (10, 64), "linear.bias": (10,)}
    shapes |= {f"bn1.{part}": (16,) for part in NORM}
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range((depth - 2) // 6):
            for n in (1, 2):
                name = f"layer{stage}.{block}"
                before = width // 2 if (n, block) == (1, 0) and stage > 1 else width
                shapes[f"{name}.conv{n}.weight"] = (width, before, 3, 3)
                shapes |= {f"{name}.bn{n}.{part}": (width,) for part in NORM}
    return shapes


NORM = ("weight", "bias", "running_mean", "running_var")


def _draw(rng, name, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return x * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    return 1 + np.tanh(x) / 2 if name.endswith(("bn1.weight", "bn2.weight", "var")) else x / 4


def plain(weights, images, depth):
    """Features and logits in float64, channels first, with no library's layers."""
    p = {name: value.astype(np.float64) for name, value in weights.items()}

    def conv(x, name, stride):
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        return np.einsum("bchwij,ocij->bohw", windows, p[f"{name}.weight"], optimize=True)

    def norm(x, name):
        w, b, mean, var = (p[f"{name}.{part}"][:, None, None] for part in NORM)
        return w * (x - mean) / np.sqrt(var + 0.00001) + b

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    x = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    x = np.maximum(norm(conv(x, "conv1", 1), "bn1"), 0)
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            name, halves = f"layer{stage}.{block}", stage > 1 and block == 0
            y = np.maximum(norm(conv(x, f"{name}.conv1", 2 if halves else 1), f"{name}.bn1"), 0)
            y = norm(conv(y, f"{name}.conv2", 1), f"{name}.bn2")
            if halves:
                wide = np.zeros_like(y)
                quarter = y.shape[1] // 4
                wide[:, quarter : 3 * quarter] = x[:, :, ::2, ::2]
                x = wide
            x = np.maximum(y + x, 0)
    features = x.mean(axis=(2, 3))
    return features, features @ p["linear.weight"].T + p["linear.bias"]


def save_npz(path, weights):
    np.savez(path, **weights)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_npz(tmp_path_factory.mktemp("weights") / "a resnet, ü.npz", state_dict())


@pytest.fixture(scope="module")
def encoder(weights):
    return resnet_encoder(weights)


@pytest.mark.parametrize("depth", [8, 14])
def test_features_and_logits_are_those_of_plain_numpy(depth, tmp_path):
    encoder = resnet_encoder(save_npz(tmp_path / "w.npz", state_dict(depth)))
    features, logits = plain(state_dict(depth), IMAGES, depth)
    assert np.linalg.norm(features[0] - features[1]) > 0.02 * np.linalg.norm(features[0])
    got = encoder.features(IMAGES)
    assert (type(got), got.dtype, got.shape) == (np.ndarray, np.float32, (3, 64))
    np.testing.assert_allclose(got, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(encoder.logits(got), logits, rtol=1e-4, atol=1e-4)


def block_variables(block, x, **values):
    """Zeros but for `values`, so that what is left can be computed by hand."""
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)

    def fill(path, leaf):
        name = "_".join(key.key for key in path[1:])
        return jnp.broadcast_to(jnp.asarray(values.get(name, leaf), jnp.float32), leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, zeros)


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    """With norms that give zero a block is the rectified shortcut."""
    x = jnp.arange(2.0 * 4 * 4 * 16).reshape(2, 4, 4, 16) - 100
    block = resnet._Block(32, stride=2)
    got = np.asarray(block.apply(block_variables(block, x), x))
    assert got.shape == (2, 2, 2, 32)
    np.testing.assert_array_equal(got[..., 8:24], np.maximum(x, 0)[:, ::2, ::2])
    assert not got[..., :8].any() and not got[..., 24:].any()
    same = resnet._Block(16)
    np.testing.assert_array_equal(same.apply(block_variables(same, x), x), np.maximum(x, 0))


def test_a_normalisation_has_its_epsilon_and_running_statistics():
    """Variance 0, mean -2, weight 0.01: bn1(0) = 0.5 + 0.02 / sqrt(1e-5), which bn2 takes from 3
    channels through the middle of conv2 with variance 3e-5 beside the epsilon."""
    x = jnp.zeros((1, 5, 5, 16))
    middle = jnp.zeros((3, 3, 16, 16)).at[1, 1, :3].set(1.0)
    block = resnet._Block(16)
    variables = block_variables(
        block, x, bn1_scale=0.01, bn1_bias=0.5, bn1_mean=-2.0, bn1_var=0.0, conv2_kernel=middle,
        bn2_scale=0.1, bn2_bias=7.0, bn2_mean=20.0, bn2_var=3e-5,
    )  # fmt: skip
    y = 3 * (0.5 + 0.02 / np.sqrt(1e-5))
    want = 7 + 0.1 * (y - 20) / np.sqrt(4e-5)
    np.testing.assert_allclose(block.apply(variables, x), np.full((1, 5, 5, 16), want), rtol=1e-5)


def test_features_are_each_images_own(encoder):
    whole, one = encoder.features(IMAGES), encoder.features(IMAGES[1:2])
    np.testing.assert_allclose(one[0], whole[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [8, 20, 56])
def test_the_entries_are_those_of_the_authors_class(depth):
    assert resnet.torch_shapes(depth) == dict(sorted(entries(depth).items()))


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_the_parameters_are_as_many_as_in_the_paper(depth, millions):
    """Table 6 of arXiv 1512.03385."""
    shapes = resnet.torch_shapes(depth)
    total = sum(np.prod(shape) for name, shape in shapes.items() if "running" not in name)
    assert float(f"{total / 1e6:.2g}") == millions


def test_there_are_networks_of_some_depths_only():
    for depth in (2, 7, 18, 19, -4):
        with pytest.raises(ValueError, match=f"depth must be 6 n . 2.*got {depth}"):
            resnet.torch_shapes(depth)


def test_an_encoder_says_what_it_is(encoder, weights):
    assert encoder.name == "CIFAR-10 ResNet-8" and encoder.num_features == 64
    assert encoder.digest == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_every_format_of_the_weights_gives_the_same_features(encoder, tmp_path):
    """The published files are checkpoints of a network that was trained in parallel."""
    parallel = {f"module.{name}": value for name, value in state_dict().items()}
    parallel |= {"module.bn1.num_batches_tracked": np.array(3)}
    inner, storages = made.state_dict(parallel)
    contents = {
        "checkpoint.th": made.stream({"state_dict": inner, "best_prec1": 91.7}, storages),
        "zipped.pth": made.zipped(*made.state_dict(state_dict())),
        "safetensors": safetensors.numpy.save(state_dict()),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        other = resnet_encoder(tmp_path / name, sha256=hashlib.sha256(content).hexdigest())
        np.testing.assert_array_equal(other.features(IMAGES), encoder.features(IMAGES))


FIRST, VAR = "layer2.0.conv1.weight", "layer3.0.bn2.running_var"


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("1 entries missing .*layer2.0.conv1", {FIRST: None}),
        ("36 entries missing", {name: None for name in entries(8) if name != "linear.bias"}),
        ("1 unknown .*fc.weight", {"fc.weight": np.zeros(1, np.float32)}),
        ("1 unknown .*layer1.1.conv2.weight", {"layer1.1.conv2.weight": np.zeros(1, np.float32)}),
        ("depth 14; .*missing .*layer1.1", {"layer1.1.conv1.weight": np.zeros(1, np.float32)}),
        ("0.conv1.weight is .32, 16, 3, 3.*got .3, 3", {FIRST: np.ones((3, 3, 16, 32))}),
        ("linear.bias is .10,.*got .100,", {"linear.bias": np.zeros(100, np.float32)}),
        ("floating; got .*int32", {"linear.bias": np.zeros(10, np.int32)}),
        ("finite numbers", {"linear.bias": np.full(10, np.nan, np.float32)}),
        ("variances of at least 0", {VAR: np.full(64, -1, np.float32)}),
    ],
)
def test_the_entries_must_be_the_networks(rule, change, tmp_path):
    wrong = {k: v for k, v in (state_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match=f"must be that of a CIFAR-10 ResNet.*{rule}"):
        resnet_encoder(save_npz(tmp_path / "w.npz", wrong))


def test_python_objects_in_the_weights_are_refused(tmp_path):
    path = save_npz(tmp_path / "w.npz", state_dict() | {"linear.bias": np.array([{}], object)})
    with pytest.raises(ValueError, match="w.npz .*Object arrays cannot be loaded"):
        resnet_encoder(path)


@pytest.mark.parametrize(
    "wrong",
    [
        IMAGES[0],
        IMAGES.astype(np.float32),
        IMAGES.astype(np.int64),
        IMAGES[..., :1],
        IMAGES[:, :28, :28],
        IMAGES.transpose(0, 3, 1, 2),
    ],
)
def test_other_images_are_refused(encoder, wrong):
    with pytest.raises(ValueError, match=r"takes uint8 images \[batch, 32, 32, 3\].*; got "):
        encoder.features(wrong)


def test_another_or_a_missing_file_is_refused(weights, encoder, tmp_path):
    for right in (encoder.digest, encoder.digest[:8].upper()):
        assert resnet_encoder(weights, sha256=right).digest == encoder.digest
    with pytest.raises(ValueError, match=rf"SHA-256 00000000\.\.\.; got {encoder.digest}"):
        resnet_encoder(weights, sha256="0" * 8)
    with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits"):
        resnet_encoder(weights, sha256="")
    with pytest.raises(FileNotFoundError, match="none.npz is not there.*akamaster"):
        resnet_encoder(tmp_path / "none.npz")
    (tmp_path / "page.th").write_text("<!DOCTYPE html><html>")
    with pytest.raises(ValueError, match="must be a .pth .* or an .npz file"):
        resnet_encoder(tmp_path / "page.th")


def judge(tmp_path, weights, images, num_levels=256):
    """What an evaluation measures with, where the real images are `images`."""
    dataset = data.ImageDataset(images, np.zeros(len(images), np.int64), 10, num_levels)
    config = judging.JudgeConfig(resnet=weights, reference_dir=tmp_path, num_splits=4)
    judging.check(config)
    real = judging.RealImages(
        "cifar10", "cifar10", "train", "test", lambda split: dataset, "0" * 64
    )
    return judging.make_judge(config, real, batch_size=40)


def test_an_evaluation_names_network_and_weights_beside_its_distance(tmp_path, weights, encoder):
    real = np.random.default_rng(2).integers(0, 256, (90, 32, 32, 3), np.uint8)
    found = judge(tmp_path, weights, real)
    features = encoder.features(real)
    assert found.record["distance"] == (
        f"FD (CIFAR-10 ResNet-8, 64 features, weights sha256 {encoder.digest[:8]})"
    )
    assert found.record["encoder"] == "CIFAR-10 ResNet-8" and found.record["num_features"] == 64
    assert found.record["encoder_sha256"] == encoder.digest
    np.testing.assert_allclose(found.reference.features, features, rtol=1e-4, atol=1e-5)
    other = found.encode(255 - real, 40)
    want = metrics.frechet_distance(metrics.moments(other), metrics.moments(features))
    assert found.figures(other, None)["frechet_distance"].value == pytest.approx(want, rel=1e-4)


def test_an_evaluation_refuses_images_of_another_kind(tmp_path, weights):
    wrong = {
        r"has \[28, 28, 1\] of 256": (np.zeros((90, 28, 28, 1), np.uint8), 256),
        r"has \[32, 32, 3\] of 32": (np.zeros((90, 32, 32, 3), np.uint8), 32),
    }
    for rule, (images, levels) in wrong.items():
        with pytest.raises(ValueError, match=rf"32, 32, 3\] of 256 levels; cifar10 {rule}"):
            judge(tmp_path, weights, images, levels)
    assert not list(tmp_path.iterdir())  # no features were computed


def test_an_evaluation_has_one_encoder():
    here = pathlib.Path("x")
    for flags in ({"inception": here, "resnet": here}, {"resnet": here, "encoder": here}):
        names = " and ".join(f"--judge.{name}" for name in flags)
        with pytest.raises(ValueError, match=f"one encoder; got {names}"):
            judging.check(judging.JudgeConfig(**flags))
    with pytest.raises(ValueError, match="without --judge.inception"):
        judging.check(judging.JudgeConfig(resnet=here, protocol="B"))


def shared(variable, folder, *names):
    """Files in the folder that a variable names, or else in the one beside the repository."""
    beside = pathlib.Path(__file__).parents[3] / "shared" / folder
    root = pathlib.Path(os.environ.get(variable) or beside)
    for name in names:
        if not (root / name).is_file():
            pytest.skip(f"no {name} in {root}; {variable} names another folder")
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("name", "correct"), [("resnet20", 9173), ("resnet56", 9339)])
def test_the_published_accuracies_to_the_digit(name, correct):
    """91.73 % and 93.39 % of the 10,000 test images."""
    weights = shared("FMJAX_DATA_DIR", "data", f"resnet_cifar10/{name}.npz")
    prepared = shared("TFDS_DATA_DIR", "tensorflow_datasets", "cifar10/3.0.2/dataset_info.json")
    test_set = data.load("cifar10", "test", prepared)
    encoder = resnet_encoder(weights / "resnet_cifar10" / f"{name}.npz")
    assert encoder.name == f"CIFAR-10 ResNet-{name.removeprefix('resnet')}"
    logits = encoder.logits(encode(encoder, test_set.images, batch_size=500))
    accuracy = metrics.class_accuracy(logits, test_set.labels)
    assert len(test_set.labels) == 10_000
    assert accuracy.value == correct / 10_000
    share = correct / 10_000
    assert accuracy.standard_error == pytest.approx(np.sqrt(share * (1 - share) / 10_000))
