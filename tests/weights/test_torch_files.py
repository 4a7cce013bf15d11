"""Reading PyTorch's files: the same tensors, and nothing else ever happens."""

import pickle
import zipfile

import made_weights as made
import numpy as np
import pytest
from made_weights import Call, Global, Persistent, Raw

from fmjax.weights import torch_files
from fmjax.weights.torch_files import read_tensors

FORMATS = {"stream": made.stream, "zip": made.zipped}
both_formats = pytest.mark.parametrize("form", FORMATS)
NUMBERS = np.arange(12, dtype=np.float32)


def write(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    return path


def assert_same(got, want):
    assert list(got) == list(want)
    for name, value in want.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@both_formats
def test_every_dtype_and_shape_comes_back(form, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"x.{kind}": rng.integers(0, 2, (3, 4)).astype(kind) for kind in made.KINDS}
    arrays |= {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 3), np.float32)}
    assert_same(read_tensors(write(tmp_path, FORMATS[form](*made.state_dict(arrays)))), arrays)


@both_formats
def test_views_of_one_storage(form, tmp_path):
    """Offsets and strides count numbers of the storage, not bytes."""
    value = {
        "transposed": made.tensor("0", NUMBERS, (4, 3), (1, 4)),
        "tail": made.tensor("0", NUMBERS, (5,), (1,), offset=7),
        "every_third": made.tensor("0", NUMBERS, (4,), (3,), offset=2),
        "empty_at_the_end": made.tensor("0", NUMBERS, (0,), (1,), offset=12),
    }
    want = {
        "transposed": NUMBERS.reshape(3, 4).T,
        "tail": NUMBERS[7:],
        "every_third": NUMBERS[2::3],
        "empty_at_the_end": NUMBERS[12:],
    }
    assert_same(read_tensors(write(tmp_path, FORMATS[form](value, {"0": NUMBERS}))), want)


@both_formats
def test_parameters_and_metadata_are_tensors_alone(form, tmp_path):
    """A state dict is an OrderedDict with attributes, and may hold parameters."""
    parameter = Call(
        Global("torch._utils", "_rebuild_parameter"), (made.tensor("0", NUMBERS), True, None)
    )
    # OrderedDict(), then its items, then BUILD with the attributes.
    items = pickle.MARK + made.dumps("w")[2:-1] + made.dumps(parameter)[2:-1] + pickle.SETITEMS
    attributes = made.dumps({"_metadata": {"": {"version": 1}}})[2:-1] + pickle.BUILD
    empty = made.dumps(Call(made.ordered_dict(), ()))[2:-1]
    content = FORMATS[form](Raw(empty + items + attributes), {"0": NUMBERS})
    assert_same(read_tensors(write(tmp_path, content)), {"w": NUMBERS})


@both_formats
def test_a_checkpoint_gives_its_state_dict(form, tmp_path):
    """What a training script saves: the state dict among other things, tensors or not."""
    value = {"epoch": 3, "best": made.tensor("1", NUMBERS[:1]), "state_dict": {}}
    value["state_dict"]["w"] = made.tensor("0", NUMBERS)
    content = FORMATS[form](value, {"0": NUMBERS, "1": NUMBERS[:1]})
    assert_same(read_tensors(write(tmp_path, content)), {"w": NUMBERS})


def hostile(marker):
    """Ways to have code run, each of which would make the file `marker`."""
    touch = f"open({str(marker)!r}, 'w')"
    script = (f"touch {marker}",)
    return {
        "os.system": Call(Global("os", "system"), script),
        "posix.system": Raw(  # STACK_GLOBAL, whose names are strings on the stack
            b"\x8c\x05posix\x8c\x06system\x93" + made.dumps(script)[2:-1] + pickle.REDUCE
        ),
        "builtins.exec": Call(Global("builtins", "exec"), (touch,)),
        "builtins.eval": Raw(b"(" + made.dumps(touch)[2:-1] + b"ibuiltins\neval\n"),  # INST
        "builtins.getattr": Call(Global("builtins", "getattr"), (made.ordered_dict(), "copy")),
        "torch.load": Call(Global("torch", "load"), ("other.pth",)),
        "torch.storage._load_from_bytes": Call(Global("torch.storage", "_load_from_bytes"), (b"",)),
        "collections.OrderedDict.fromkeys": Call(
            Global("collections", "OrderedDict.fromkeys"), ("ab",)
        ),
        "__torch__.Inception": Global("__torch__", "Inception"),  # TorchScript
    }


@both_formats
@pytest.mark.parametrize("name", hostile("x"))
@pytest.mark.parametrize("place", ["alone", "after a tensor", "in the storage"])
def test_code_is_refused_by_its_name(form, name, place, tmp_path):
    marker = tmp_path / "ran"
    code = hostile(marker)[name]
    value = {
        "alone": code,
        "after a tensor": {"w": made.tensor("0", NUMBERS), "code": code},
        "in the storage": {"w": Persistent(("storage", code, "0", "cpu", 12))},
    }[place]
    path = write(tmp_path, FORMATS[form](value, {"0": NUMBERS}))
    with pytest.raises(ValueError, match=rf"asks for {name}, which was not looked up"):
        read_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize("place", range(5))
def test_code_is_refused_in_each_pickle_of_the_stream(place, tmp_path):
    marker = tmp_path / "ran"
    code = hostile(marker)["os.system"]
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, []]
    parts = [*parts[:place], code, *parts[place + 1 :]]
    with pytest.raises(ValueError, match="os.system|must be a .pth file"):
        read_tensors(write(tmp_path, b"".join(map(made.dumps, parts))))
    assert not marker.exists()


def test_a_pickle_cannot_change_what_it_is_given(tmp_path):
    """BUILD sets attributes, and a stand-in that took them would serve the next file otherwise."""
    before = str(torch_files._KNOWN)
    for target in [*torch_files._KNOWN]:
        for state in ({"__call__": 1, "dtype": "f8"}, (None, {"__call__": 1, "dtype": "f8"})):
            build = made.dumps(Global(*target))[2:-1] + made.dumps(state)[2:-1] + pickle.BUILD
            with pytest.raises(ValueError):
                read_tensors(write(tmp_path, made.zipped({"w": Raw(build)}, {})))
    assert str(torch_files._KNOWN) == before
    test_views_of_one_storage("stream", tmp_path)


@both_formats
@pytest.mark.parametrize(
    ("shape", "strides", "offset", "rule"),
    [
        ((13,), (1,), 0, "inside its storage of 12"),
        ((12,), (1,), 1, "inside its storage"),
        ((3, 4), (5, 1), 0, "inside its storage"),
        ((2,), (2**62,), 0, "inside its storage"),
        ((2**40,), (0,), 0, "inside its storage"),  # one number, repeated beyond all memory
        ((3,), (-1,), 2, "whole numbers"),
        ((-1,), (1,), 0, "whole numbers"),
        ((3,), (1,), -1, "whole numbers"),
        ((3.0,), (1,), 0, "whole numbers"),
        ((3, 4), (1,), 0, "whole numbers"),
    ],
)
def test_tensors_stay_inside_their_storage(form, shape, strides, offset, rule, tmp_path):
    value = {"w": made.tensor("0", NUMBERS, shape, strides, offset)}
    with pytest.raises(ValueError, match=f"w.* must .*{rule}"):
        read_tensors(write(tmp_path, FORMATS[form](value, {"0": NUMBERS})))


@both_formats
def test_storages_must_have_the_promised_size(form, tmp_path):
    for size in (11, 13, 2**50):
        value = {"w": made.tensor("0", NUMBERS, size=size)}
        with pytest.raises(ValueError, match="storage '0' must"):
            read_tensors(write(tmp_path, FORMATS[form](value, {"0": NUMBERS})))
    value = {"w": made.tensor("0", NUMBERS), "v": made.tensor("0", NUMBERS.astype("i4"))}
    with pytest.raises(ValueError, match="one type and one size"):
        read_tensors(write(tmp_path, FORMATS[form](value, {"0": NUMBERS})))


@both_formats
def test_a_storage_that_is_not_there(form, tmp_path):
    value = {"w": made.tensor("0", NUMBERS)}
    with pytest.raises(ValueError, match="must be a complete file.*KeyError"):
        read_tensors(write(tmp_path, FORMATS[form](value, {})))


@both_formats
def test_truncated_anywhere(form, tmp_path):
    content = FORMATS[form](*made.state_dict({"v": NUMBERS, "w": NUMBERS[:5]}))
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"weights\.pth"):
            read_tensors(write(tmp_path, content[:length]))


def test_a_changed_number_in_a_zip_file_is_seen(tmp_path):
    content = made.zipped(*made.state_dict({"w": NUMBERS}))
    broken = content.replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes())
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_tensors(write(tmp_path, broken))


@pytest.mark.parametrize(
    "content", [b"", b"<!DOCTYPE html><html>", b"\x1f\x8b\x08\x00", pickle.dumps({"w": 1}, 2)]
)
def test_another_kind_of_file(content, tmp_path):
    with pytest.raises(ValueError, match="must be a .pth .* a safetensors or an .npz file"):
        read_tensors(write(tmp_path, content))


@both_formats
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ([1.0], "dictionary of tensors; got list"),
        ({"epoch": 3}, "'epoch' is of type int"),
        ({3: made.tensor("0", NUMBERS)}, "3 is of type _Tensor"),
        ({"model": {"w": made.tensor("0", NUMBERS)}}, "'model' is of type dict"),
        ({"state_dict": {"state_dict": {}}}, "'state_dict' is of type dict"),
        ({"state_dict": [1.0], "epoch": 3}, "'state_dict' is of type list"),
        ({"state_dict": {"w": 1.0}, "best": 91.7}, "'w' is of type float"),
        ({"w": Persistent(("module", "x"))}, "a storage must be"),
        ({"w": Persistent(("storage", "Float", "0", "cpu", 12))}, "a storage must be"),
        ({"w": Call(Global("torch._utils", "_rebuild_tensor_v2"), (1, 0, (), ()))}, "a storage"),
        ({"w": Global("torch", "BFloat16Storage")}, "torch.BFloat16Storage"),
    ],
)
def test_a_file_must_hold_tensors_by_name(form, value, rule, tmp_path):
    with pytest.raises(ValueError, match=rule):
        read_tensors(write(tmp_path, FORMATS[form](value, {"0": NUMBERS})))


def test_big_endian_compressed_and_odd_files(tmp_path):
    value, storages = made.state_dict({"w": NUMBERS})
    odd = {
        "little-endian": made.stream(value, storages, little_endian=False),
        "stored uncompressed": made.zipped(value, storages, zipfile.ZIP_DEFLATED),
        "stream's version": made.stream(value, storages).replace(b"M\xe9\x03.", b"M\xea\x03.", 1),
    }
    for rule, content in odd.items():
        with pytest.raises(ValueError, match=rule):
            read_tensors(write(tmp_path, content))
    path = write(tmp_path, b"")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no tensors")
    with pytest.raises(ValueError, match="one data.pkl; got 0"):
        read_tensors(path)


def test_nothing_is_written(tmp_path):
    """Whatever a zip member is called, it is read in memory."""
    path = tmp_path / "inside" / "weights.pth"
    path.parent.mkdir()
    value = {"w": made.tensor("../../../escaped", NUMBERS)}
    path.write_bytes(made.zipped(value, {"../../../escaped": NUMBERS}))
    assert_same(read_tensors(path), {"w": NUMBERS})
    assert [p.name for p in tmp_path.rglob("*")] == ["inside", "weights.pth"]


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.pth")


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.numpy").save_file
    arrays = {"a": NUMBERS.reshape(3, 4), "b": np.arange(3)}
    path = tmp_path / "weights.anything"
    save_file(arrays, path)
    assert_same(dict(sorted(read_tensors(path).items())), arrays)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_tensors(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(save, tmp_path):
    arrays = {"a.weight": NUMBERS.reshape(3, 4), "b": np.arange(3), "c": np.float32(2.5)}
    path = tmp_path / "weights.npz"
    save(path, **arrays)
    assert_same(read_tensors(path), arrays)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match=r"weights\.npz"):
            read_tensors(write(tmp_path, content[:length]).rename(path))


def test_a_pickle_in_an_npz_is_not_loaded(tmp_path):
    class Touches:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = tmp_path / "weights.npz"
    np.savez(path, w=NUMBERS, code=np.array([Touches()], object))
    with pytest.raises(ValueError, match="weights.npz .*Object arrays cannot be loaded"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()
    np.load(path, allow_pickle=True)["code"]  # it would have run
    assert (tmp_path / "ran").exists()


@both_formats
def test_what_torch_writes(form, tmp_path):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    weight = torch.arange(24.0).reshape(2, 3, 4)
    state = dict(layer.state_dict()) | {"cut": weight[:, 1], "turned": weight.permute(2, 0, 1)}
    state |= {"half": weight.half(), "empty": weight[:0], "flag": weight > 3}
    state |= {"parameter": torch.nn.Parameter(weight)}
    want = {name: value.detach().numpy() for name, value in state.items()}
    path = tmp_path / "weights.pth"
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    assert_same(read_tensors(path), want)
    torch.save(layer.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    assert_same(read_tensors(path), {name: want[name] for name in layer.state_dict()})
    torch.save(layer, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match="torch.nn.modules.container.Sequential"):
        read_tensors(path)
