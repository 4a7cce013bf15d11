"""Parameters as a safetensors file: back to the bit, names, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models, weights


@pytest.mark.slow
def test_parameters_come_back_to_the_bit(tmp_path):
    model = models.UNet(channels=8, channel_multipliers=(1,), num_res_blocks=1, num_classes=3)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 4, 4, 1)))
    params["params"]["more"] = {
        "half": jnp.linspace(0, 1, 5, dtype=jnp.float16),
        "number": np.array(7, np.int32),
        "turned": np.arange(6.0).reshape(2, 3).T,
        "brain": jnp.ones((2, 2), jnp.bfloat16),
    }
    record = {"config": {"workdir": tmp_path, "rates": (0.1, None)}, "step": 3}
    weights.export_safetensors(tmp_path / "a.safetensors", params, record)
    got, kept = weights.load_safetensors(tmp_path / "a.safetensors")
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    assert kept == {"config": {"workdir": str(tmp_path), "rates": [0.1, None]}, "step": 3}
    names = weights.read_tensors(tmp_path / "a.safetensors")  # as anybody reads it
    assert "params.more.turned" in names and names["params.more.number"].shape == ()


def test_what_can_not_be_exported(tmp_path):
    file = tmp_path / "a.safetensors"
    for params, message in (
        ({}, "params must hold arrays; got none"),
        ({"a": 1.0}, "nested mappings of arrays of ordinary numbers; got 1.0 at a"),
        ({"a": [np.zeros(1)]}, "got list .* at a"),
        ([np.zeros(1)], "got list .* at the top"),
        ({"a.b": np.zeros(1)}, "Names must be strings without a dot; got 'a.b'"),
        ({3: np.zeros(1)}, "Names must be strings without a dot; got 3"),
        ({"a": {}}, "at a. Of another pytree"),
        (np.zeros(1), r"got float64 \(1,\) at the top"),
        ({"a": np.zeros(1, complex)}, r"got complex128 \(1,\) at a"),
        ({"a": np.array(["b"])}, "at a. Of another pytree"),
        ({"a": jnp.zeros(1, jnp.float8_e4m3fn)}, r"got float8_e4m3fn \(1,\) at a"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.export_safetensors(file, params)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must end in .safetensors; got a.npz"):
        weights.export_safetensors(tmp_path / "a.npz", {"a": np.zeros(1)})
    weights.export_safetensors(file, {"a": np.zeros(1)})
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match="is there and stays as it is"):
        weights.export_safetensors(file, {"a": np.ones(1)})
    assert file.read_bytes() == before


def test_files_of_another_origin_and_damaged_ones(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.b": np.ones(2)}, tmp_path / "other.safetensors")
    params, record = weights.load_safetensors(tmp_path / "other.safetensors")
    assert record == {} and params["a"]["b"].tolist() == [1.0, 1.0]
    for text, kept in (("hello", {}), ("[1]", {}), ('{"a": 1}', {"a": 1})):
        save_file({"a": np.ones(2)}, tmp_path / "record.safetensors", {"record": text})
        assert weights.load_safetensors(tmp_path / "record.safetensors")[1] == kept
    for names in (("a", "a.b"), ("a.b", "a")):
        save_file({name: np.ones(1) for name in names}, tmp_path / "both.safetensors")
        with pytest.raises(ValueError, match="names a tensor and others below it"):
            weights.load_safetensors(tmp_path / "both.safetensors")
    np.savez(tmp_path / "arrays.npz", a=np.ones(1))
    with pytest.raises(ValueError, match="must be a safetensors file"):
        weights.load_safetensors(tmp_path / "arrays.npz")
    whole = (tmp_path / "other.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="cut.safetensors"):
        weights.load_safetensors(tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError):
        weights.load_safetensors(tmp_path / "nowhere.safetensors")
