"""The FID's InceptionV3 against the PyTorch one, its resizes against their originals."""

import functools
import hashlib
import importlib.util
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import made_weights as made
import numpy as np
import pytest

from fmjax.metrics import encoders, inception, resize
from fmjax.metrics.encoders import LEGACY_TENSORFLOW, TORCHMETRICS, inception_encoder
from fmjax.weights.torch_files import read_tensors

SIZES = [(8, 8), (28, 28), (32, 32), (64, 64), (299, 299), (350, 350), (32, 48), (600, 20)]
RESIZES = {"A": resize.legacy_tensorflow, "B": resize.torchmetrics}
RESIZES = {name: jax.jit(resizer) for name, resizer in RESIZES.items()}
both_protocols = pytest.mark.parametrize("protocol", [LEGACY_TENSORFLOW, TORCHMETRICS])


@pytest.fixture
def reference(monkeypatch):
    """torch_fidelity and torchmetrics import torchvision for other networks than this one; where
    its build does not match torch's the import fails, so it is left out."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch_fidelity is not installed")
    for name in ("", ".datasets", ".models", ".transforms", ".transforms.functional"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", mock.MagicMock(__spec__=None))
    torch.set_num_threads(1)  # its threads wait busily for a shared core
    return torch


@functools.cache
def state_dict():
    """Random weights under which activations stay of order one."""
    rng = np.random.default_rng(0)
    return {name: _draw(rng, name, shape) for name, shape in inception.torch_shapes().items()}


def _draw(rng, name, shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("conv.weight"):
        return x * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name == "fc.weight":
        return x / np.float32(np.sqrt(2048))
    if name.endswith(("bn.weight", "running_var")):
        return 1 + np.tanh(x) / 2
    return x / 4


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The weights as a file, and its hash."""
    content = made.stream(*made.state_dict(state_dict()))
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def encoder(weights):
    """The encoder of a protocol, its weights read once."""
    path, digest = weights
    return functools.cache(lambda protocol: inception_encoder(path, protocol, sha256=digest))


def images(height=32, width=32, channels=3):
    """Two images that differ much, or features would hardly: coarse blocks, and a dark ramp."""
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (-(-height // 8), -(-width // 8), channels), dtype=np.uint8)
    blocks = blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    ramp = np.linspace(0, 60, height * width * channels).reshape(height, width, channels)
    return np.stack([blocks, ramp.astype(np.uint8)])


def assert_close(got, want, tolerance):
    """Relative to the difference between the two images, all that a metric sees of them."""
    assert (got.shape, got.dtype) == (want.shape, np.float32)
    assert np.linalg.norm(want[0] - want[1]) > 0.05 * np.linalg.norm(want)
    error = np.linalg.norm(got - want, axis=1).max() / np.linalg.norm(want[0] - want[1])
    print(f"relative error {error:.1e}")
    assert error < tolerance


def test_features_and_logits_are_torch_fidelitys(reference, tmp_path):
    """One file that torch wrote, in the format that the usual file has, read by both."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch, path = reference, tmp_path / "torch.pth"
    tensors = {name: torch.from_numpy(value) for name, value in state_dict().items()}
    tensors["Mixed_5b.branch1x1.bn.num_batches_tracked"] = torch.tensor(7)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    network = FeatureExtractorInceptionV3("", ["2048", "logits_unbiased"], str(path))
    want = [x.numpy() for x in network(torch.from_numpy(images()).permute(0, 3, 1, 2))]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = inception_encoder(path, LEGACY_TENSORFLOW, sha256=digest)
    features = encoder.features(images())
    assert_close(features, want[0], 1e-5)
    assert encoder.logits is not None
    assert_close(encoder.logits(features), want[1], 1e-5)


def test_torchs_newer_format_holds_the_same_weights(reference, tmp_path):
    path = tmp_path / "torch.pth"
    reference.save({k: reference.from_numpy(v) for k, v in state_dict().items()}, path)
    tensors = read_tensors(path)
    assert list(tensors) == list(state_dict())
    assert all(np.array_equal(tensors[name], value) for name, value in state_dict().items())


def test_features_are_torchmetrics(reference, weights, encoder):
    """From floats in [0, 1], which torchmetrics casts to 8 bits, to the sum of the features."""
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    path = str(weights[0])
    metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=path)
    floats = reference.from_numpy(images()).permute(0, 3, 1, 2).float() / 255
    want = metric.inception((floats * 255).byte()).numpy()
    features = encoder(TORCHMETRICS).features(images())
    assert_close(features, want, 1e-5)
    metric.update(floats, real=True)
    total = metric.real_features_sum.numpy()
    np.testing.assert_allclose(features.sum(0), total, rtol=1e-4, atol=1e-5)


def test_torchmetrics_cast_gives_back_every_level(reference):
    levels = reference.arange(256, dtype=reference.uint8)
    assert reference.equal((levels.float() / 255 * 255).byte(), levels)


@pytest.mark.parametrize("shape", SIZES)
def test_resizes_are_their_originals(reference, shape):
    """In grey levels: both are computed alike, and differ by roundings of numbers up to 255."""
    from torch_fidelity import interpolate_compat_tensorflow as compat

    x = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    planes = reference.from_numpy(x).permute(0, 3, 1, 2).float()
    legacy = compat.interpolate_bilinear_2d_like_tensorflow1x(planes, (299, 299), None, False)
    smooth = reference.nn.functional.interpolate(
        planes, (299, 299), mode="bilinear", align_corners=False, antialias=True
    )
    for name, want in {"A": legacy, "B": smooth}.items():
        got = np.asarray(RESIZES[name](x)) * 128 + 128
        error = np.abs(got - want.permute(0, 2, 3, 1).numpy()).max()
        print(f"{name} {shape}: {error:.1e} grey levels")
        assert error < 2e-4


@pytest.mark.parametrize("size", [8, 32, 299, 350])
def test_legacy_resize_is_numpys_interpolation(size):
    """At i size / 299, constant beyond the last pixel."""
    row = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    want = (np.interp(np.arange(299) * size / 299, np.arange(size), row) - 128) / 128
    across = np.broadcast_to(row[None, :, None], (1, size, size, 1))[..., [0, 0, 0]]
    got = np.asarray(RESIZES["A"](across))
    np.testing.assert_allclose(got[0, 5, :, 1], want, atol=1e-5 if size < 299 else 1e-4)
    down = RESIZES["A"](across.swapaxes(1, 2))
    np.testing.assert_allclose(down, got.swapaxes(1, 2), atol=1e-6)


@pytest.mark.parametrize("shape", SIZES)
def test_antialiased_resize_is_jaxs(shape):
    x = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    want = jax.image.resize(x.astype(np.float32), (1, 299, 299, 3), "linear", antialias=True)
    # JAX rounds the centres differently: 1e-4 of 128 grey levels.
    np.testing.assert_allclose(RESIZES["B"](x), (want - 128) / 128, atol=2e-4)


@both_protocols
def test_resizes_keep_constants_and_full_size_images(protocol):
    for level in (0, 128, 255):
        got = protocol.preprocess(jnp.full((1, 37, 11, 3), level, jnp.uint8))
        np.testing.assert_allclose(got, (level - 128) / 128, atol=1e-6)
        assert (got.shape, got.dtype) == ((1, 299, 299, 3), jnp.float32)
    x = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    np.testing.assert_array_equal(protocol.preprocess(x), (x.astype(np.float32) - 128) / 128)


# Features 100, 500, ... of both images, and the norms of all 2048.
RECORDED = {
    "A": (
        [
            [0.087714, 49.796776, 13.266160, 0.257617, 0],
            [0.256941, 31.579218, 8.977602, 0.162441, 0],
        ],
        [637.22369, 426.92685],
    ),
    "B": (
        [
            [0.110930, 49.891911, 13.513975, 0.260099, 0],
            [0.266002, 31.753262, 9.020704, 0.161308, 0],
        ],
        [637.56671, 428.79486],
    ),
}


@pytest.mark.slow
@both_protocols
def test_features_are_the_recorded_ones(encoder, protocol):
    """Printed by torch-fidelity and torchmetrics for the same weights, so that the network is
    tested where they are not installed."""
    some, norms = RECORDED[protocol.name]
    features = encoder(protocol).features(images())
    np.testing.assert_allclose(features[:, 100::400], some, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), norms, rtol=1e-5)


@pytest.mark.slow
def test_an_encoder_says_what_it_is(encoder, weights):
    a, b = encoder(LEGACY_TENSORFLOW), encoder(TORCHMETRICS)
    assert (a.name, b.name) == ("InceptionV3, protocol A", "InceptionV3, protocol B")
    assert a.digest == b.digest == weights[1]
    assert a.num_features == 2048


@both_protocols
def test_grey_images_are_repeated(protocol):
    grey = images(channels=1)
    want = protocol.preprocess(grey.repeat(3, axis=-1))
    np.testing.assert_array_equal(protocol.preprocess(grey), want)


@pytest.mark.slow
def test_features_are_each_images_own(encoder):
    features = encoder(LEGACY_TENSORFLOW).features
    turned = features(images()[::-1])[::-1]
    np.testing.assert_allclose(features(images()), turned, rtol=1e-4, atol=1e-5)


def test_logits_have_no_bias(encoder):
    features = np.random.default_rng(0).standard_normal((5, 2048), dtype=np.float32)
    want = features.astype(np.float64) @ state_dict()["fc.weight"].T.astype(np.float64)
    np.testing.assert_allclose(encoder(TORCHMETRICS).logits(features), want, atol=1e-4)


@both_protocols
@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), "must be uint8, 0 to 255; got float32"),
        (np.zeros((2, 8, 8, 3), np.int64), "must be uint8, 0 to 255; got int64"),
        (np.zeros((8, 8, 3), np.uint8), "1 or 3 channels; got shape"),
        (np.zeros((2, 3, 8, 8), np.uint8), "1 or 3 channels; got shape"),
        (np.zeros((2, 8, 8, 4), np.uint8), "1 or 3 channels; got shape"),
        (np.zeros((2, 0, 8, 3), np.uint8), "1 or 3 channels; got shape"),
    ],
)
def test_images_must_be_8_bit_pictures(encoder, protocol, wrong, rule):
    for function in (encoder(protocol).features, protocol.preprocess):
        with pytest.raises(ValueError, match=rule):
            function(wrong)


def test_a_wrong_hash_is_refused_before_the_file_is_read(tmp_path):
    path = tmp_path / encoders.FILE_NAME
    path.write_bytes(b"anything")
    digest = hashlib.sha256(b"anything").hexdigest()
    with pytest.raises(ValueError, match=rf"SHA-256 6726825d\.\.\.; got {digest}"):
        inception_encoder(path, LEGACY_TENSORFLOW)
    other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    with pytest.raises(ValueError, match=rf"SHA-256 {other}; got {digest}"):
        inception_encoder(path, LEGACY_TENSORFLOW, sha256=other)
    for right in (digest, digest[:8], digest[:20].upper()):
        with pytest.raises(ValueError, match="must be a .pth file"):
            inception_encoder(path, LEGACY_TENSORFLOW, sha256=right)
    for wrong in (digest[:7], "", digest + "0", "x" * 8):
        with pytest.raises(ValueError, match="sha256 must be 8 to 64 hexadecimal digits"):
            inception_encoder(path, LEGACY_TENSORFLOW, sha256=wrong)


def test_a_missing_file_says_what_to_get_and_where(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        inception_encoder(tmp_path / "none.pth", TORCHMETRICS)
    wanted = ("none.pth", encoders.FILE_NAME, "6726825d", "fid_weights", "torch-fidelity")
    assert all(part in str(error.value) for part in wanted)


def test_the_state_dict_must_be_the_networks():
    whole = state_dict()
    first, var = "Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch_pool.bn.running_var"
    cases = {
        "1 entries missing .*Conv2d_1a": {k: v for k, v in whole.items() if k != first},
        "1 unknown .*AuxLogits": whole | {"AuxLogits.fc.weight": np.zeros(1, np.float32)},
        "1a.*is .32, 3, 3, 3.*got .3, 3, 3, 32": whole
        | {first: whole[first].transpose(1, 2, 3, 0)},
        "fc.bias is .1008,": whole | {"fc.bias": np.zeros(1000, np.float32)},
        "floating; got .*int32": whole | {first: whole[first].astype(np.int32)},
        "finite numbers": whole | {"fc.weight": whole["fc.weight"] * np.float32(np.nan)},
        "variances of at least 0": whole | {var: -whole[var]},
    }
    for rule, wrong in cases.items():
        with pytest.raises(ValueError, match=rule):
            inception.params_from_state_dict(wrong)


def test_num_batches_tracked_is_not_used():
    counts = {f"{n.removesuffix('weight')}num_batches_tracked": np.array(3) for n in state_dict()}
    plain = inception.params_from_state_dict(state_dict())
    counted = inception.params_from_state_dict(state_dict() | counts)
    jax.tree.map(np.testing.assert_array_equal, plain, counted)


def test_a_normalisation_is_folded_with_its_epsilon():
    """Variance and epsilon alike 1e-3 give a gain of 1 / sqrt(2e-3), to float32's last digits."""
    name = "Mixed_6a.branch3x3"
    values = {"weight": 1.0, "bias": 0.5, "running_mean": 2.0, "running_var": 1e-3}
    entries = {f"{name}.bn.{k}": np.full(384, v, np.float32) for k, v in values.items()}
    layer = inception.params_from_state_dict(state_dict() | entries)["params"][name]
    gain = 1 / np.sqrt(2e-3)
    np.testing.assert_allclose(layer["bias"], 0.5 - 2 * gain, rtol=1e-6)
    want = state_dict()[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * gain
    np.testing.assert_allclose(layer["kernel"], want, rtol=1e-6)
