"""Files in PyTorch's two formats, written without PyTorch: honest ones and hostile ones."""

import io
import pickle
import zipfile
from typing import Any, NamedTuple

import numpy as np

KINDS = {"f8": "Double", "f4": "Float", "f2": "Half", "i8": "Long", "i4": "Int", "i2": "Short"}
KINDS |= {"i1": "Char", "u1": "Byte", "b1": "Bool"}


class Global(NamedTuple):
    """A name that the reader is asked to look up."""

    module: str
    name: str


class Call(NamedTuple):
    """A call that the reader is asked to make."""

    function: Any
    arguments: tuple


class Persistent(NamedTuple):
    """What a pickle keeps outside itself, such as a storage."""

    pid: Any


class Raw(NamedTuple):
    """Opcodes as they are."""

    opcodes: bytes


class _Pickler(pickle._Pickler):
    view: tuple = ()  # the older format says of a storage, too, that it is no view of another

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Persistent):
            self.save(obj.pid + self.view)
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Raw):
            self.write(obj.opcodes)
        else:
            super().save(obj, save_persistent_id)


def dumps(value: Any, view: tuple = ()) -> bytes:
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=2)
    pickler.view = view
    pickler.dump(value)
    return file.getvalue()


def tensor(key: str, numbers: np.ndarray, shape=None, strides=None, offset=0, size=None) -> Call:
    """A view of storage `key`; shape and strides are those of `numbers` unless they are given."""
    kind = Global("torch", KINDS[numbers.dtype.str[1:]] + "Storage")
    pid = ("storage", kind, key, "cpu", numbers.size if size is None else size)
    if shape is None:
        shape, strides = numbers.shape, tuple(s // numbers.itemsize for s in numbers.strides)
    arguments = (Persistent(pid), offset, shape, strides, False, Call(ordered_dict(), ()))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def ordered_dict() -> Global:
    return Global("collections", "OrderedDict")


def stream(value: Any, storages: dict[str, np.ndarray], **platform: Any) -> bytes:
    """The format before PyTorch 1.6."""
    platform = {"protocol_version": 1001, "little_endian": True} | platform
    before = b"".join(map(dumps, (0x1950A86A20F9469CFC6C, 1001, platform)))
    numbers = [x.size.to_bytes(8, "little") + x.tobytes() for x in storages.values()]
    return b"".join([before, dumps(value, view=(None,)), dumps(list(storages)), *numbers])


def zipped(
    value: Any, storages: dict[str, np.ndarray], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """The format since PyTorch 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", dumps(value))
        archive.writestr("archive/byteorder", "little")
        for key, numbers in storages.items():
            archive.writestr(f"archive/data/{key}", numbers.tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def state_dict(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Call], dict[str, np.ndarray]]:
    """The pickled object and the storages of contiguous arrays, for `stream` and `zipped`."""
    storages = {str(n): array for n, array in enumerate(arrays.values())}
    return {
        name: tensor(key, storages[key]) for name, key in zip(arrays, storages, strict=True)
    }, storages
