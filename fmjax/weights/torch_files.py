"""Tensors out of PyTorch's files, safetensors and .npz, without running their code.

A `.pth` file is a pickle, a small program that may call any function by its name. Here only these
names are known, each as an inert stand-in; any other ends the reading before it is looked up:

    collections.OrderedDict      torch._utils._rebuild_tensor_v2
    torch.FloatStorage, ...      torch._utils._rebuild_parameter

The pickle yields descriptions of tensors (storage, offset, shape, strides), which are checked
against the raw numbers beside it: a zip file with one member per storage (PyTorch 1.6 and later),
or a stream (before) of five pickles, magic number, version, platform, tensors and storage keys,
then for each key an int64 count and the numbers.
"""

import collections
import functools
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

_ZIP = b"PK\x03\x04"
_STREAM = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
_STREAM_VERSION = 1001
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The named tensors of a `.pth` file in either format of PyTorch, a safetensors or .npz file.

    The file's content tells which it is, not its name. Nothing in it is executed, and nothing is
    written to disk.

    Args:
      path: the file. A `.pth` must hold one flat dictionary of tensors, a state dict, or a
        dictionary with one as its `state_dict`, of which the rest is not used.

    Returns:
      Arrays by name.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: for another kind of file, a pickle that asks for anything but tensors, a truncated
        or damaged file, and a tensor that reaches beyond its storage.

    Example:
      >>> read_tensors("pt_inception-2015-12-05-6726825d.pth")["fc.weight"].shape  # doctest: +SKIP
      (1008, 2048)
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(16)
    read = _reader(path, start)
    try:
        return read(path)
    except _Unfit as error:
        raise ValueError(f"{path}: {error}") from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make pickle and zipfile raise nearly anything
        raise ValueError(
            f"{path} must be a complete file; reading it ended with {type(error).__name__}: "
            f"{error}. It is truncated or damaged: fetch it anew."
        ) from error


def _reader(path: Path, start: bytes) -> Callable[[Path], dict[str, np.ndarray]]:
    if start.startswith(_ZIP):
        return _read_npz if _is_npz(path) else _read_zip
    if start.startswith(_STREAM):
        return _read_stream
    if start[8:9] == b"{":
        return _read_safetensors
    raise ValueError(
        f"{path} must be a .pth file of PyTorch, a safetensors or an .npz file; it begins with "
        f"{start!r}. "
        "Is it a web page, or compressed?"
    )


class _Unfit(ValueError):
    """What is wrong with the file, in words."""


class _StorageType(NamedTuple):
    dtype: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


# Stand-ins are instances without a __dict__, so that a pickle can't change them either.
class _RebuildTensor:
    __slots__ = ()

    def __call__(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *unused: Any
    ) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise _Unfit(f"a tensor must have a storage; got {type(storage).__name__}.")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *unused: Any) -> Any:
        return data


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
} | {("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()}


class _Unpickler(pickle.Unpickler):
    """Knows the names of `_KNOWN` and keeps the storages that were mentioned."""

    def __init__(self, file: Any):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _KNOWN:
            raise _Unfit(
                f"a file of weights must name nothing but tensors; it asks for "
                f"{module_name}.{global_name}, which was not looked up. If you trust the file, "
                "save its state dict as safetensors."
            )
        return _KNOWN[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), _, int(size), *view) if not any(view):
                storage = _Storage(dtype, key, size)
            case _:
                raise _Unfit(f"a storage must be (type, key, device, size); got {pid!r:.200}.")
        if size < 0 or self.storages.setdefault(key, storage) != storage:
            raise _Unfit(f"storage {key!r} must have one type and one size; got {storage}.")
        return storage


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        roots = [n for n in archive.namelist() if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(roots) != 1:
            raise _Unfit(f"the zip file must hold one data.pkl; got {len(roots)}.")
        root = roots[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            _check_little(_member(archive, f"{root}byteorder") == b"little")
        with archive.open(_stored(archive, f"{root}data.pkl")) as file:
            tensors = _tensors(_Unpickler(file).load())

        @functools.cache
        def load(storage: _Storage) -> np.ndarray:
            return _numbers(storage, _member(archive, f"{root}data/{storage.key}"))

        return {name: _array(name, tensor, load) for name, tensor in tensors.items()}


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """PyTorch does not compress, so that nothing can grow while it is read."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Unfit(f"{name} must be stored uncompressed, as PyTorch does.")
    return info


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    return archive.read(_stored(archive, name))


def _read_stream(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        _, version, platform = (_Unpickler(file).load() for _ in range(3))
        if version != _STREAM_VERSION:
            raise _Unfit(f"the stream's version must be {_STREAM_VERSION}; got {version!r:.50}.")
        _check_little(platform["little_endian"])
        unpickler = _Unpickler(file)
        tensors = _tensors(unpickler.load())
        keys = _Unpickler(file).load()
        stored = {key: _next_storage(file, unpickler.storages[key]) for key in keys}
    return {n: _array(n, tensor, lambda s: stored[s.key]) for n, tensor in tensors.items()}


def _next_storage(file: BinaryIO, storage: _Storage) -> np.ndarray:
    count = int.from_bytes(file.read(8), "little")
    if count != storage.size:
        raise _Unfit(f"storage {storage.key!r} must hold {storage.size} numbers; it has {count}.")
    left = os.fstat(file.fileno()).st_size - file.tell()  # a false count must not claim memory
    return _numbers(storage, file.read(min(left, count * np.dtype(storage.dtype).itemsize)))


def _numbers(storage: _Storage, raw: bytes) -> np.ndarray:
    dtype = np.dtype(storage.dtype)
    if len(raw) != storage.size * dtype.itemsize:
        raise _Unfit(
            f"storage {storage.key!r} must be {storage.size} x {dtype.itemsize} bytes long; got "
            f"{len(raw)}. The file is truncated or damaged: fetch it anew."
        )
    return np.frombuffer(raw, dtype)


def _tensors(value: Any) -> dict[str, _Tensor]:
    """The pickled object or its `state_dict`, if that is a flat dictionary of tensors."""
    if isinstance(value, dict) and isinstance(inner := dict.get(value, "state_dict"), dict):
        value = inner
    if not isinstance(value, dict):
        raise _Unfit(f"the file must hold a dictionary of tensors; got {type(value).__name__}.")
    for name, tensor in dict.items(value):
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            kind = type(tensor).__name__
            raise _Unfit(
                f"the file must hold tensors by name; {name!r:.99} is of type {kind}. Save the "
                "state dict alone."
            )
    return dict(dict.items(value))


def _array(name: str, tensor: _Tensor, load: Callable[[_Storage], np.ndarray]) -> np.ndarray:
    """The tensor as an array of its own, once its shape and strides are known to stay inside."""
    storage, offset, shape, strides = tensor
    whole = all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    if not whole or len(shape) != len(strides):
        raise _Unfit(f"{name}: shape and strides must be whole numbers; got {tensor[1:]}.")
    numbers, count = load(storage), math.prod(shape)
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    if count and (reach > len(numbers) or count > len(numbers)):
        raise _Unfit(
            f"{name} must be inside its storage of {len(numbers)} numbers; got offset {offset}, "
            f"shape {shape}, strides {strides}."
        )
    if not count:
        return np.zeros(shape, numbers.dtype)
    steps = [stride * numbers.itemsize for stride in strides]
    return np.array(np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps))


def _check_little(little: Any) -> None:
    if little is not True:
        raise _Unfit("the file must be little-endian; it was written on a big-endian machine.")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import numpy as safetensors_numpy  # only such files need the package

    return safetensors_numpy.load_file(path)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:  # which its reader says better
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
