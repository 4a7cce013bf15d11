"""The original archives of CIFAR-10, MNIST and Fashion-MNIST: where, whether complete, and read.

They are published at the addresses that TFDS itself uses. Every archive has a published SHA-256,
which `verify` demands. The binary layouts are read with NumPy; nothing is unpacked to disk and no
pickle is read: members are taken from memory, by their exact names.
"""

import gzip
import math
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ..files import hash_file, write_whole

Splits = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> images [N, h, w, c], labels [N]


class Archive(NamedTuple):
    """An original file: where it is published, its size in bytes and its SHA-256."""

    url: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


class Source(NamedTuple):
    """A data set's archives, how they are read (`read(folder)`), and TFDS's facts about it."""

    version: str
    archives: tuple[Archive, ...]
    read: Callable[[Path], Splits]
    image_shape: tuple[int, int, int]
    label_names: Sequence[str]
    num_examples: dict[str, int]
    has_id: bool = False


def download(archive: Archive, folder: Path, timeout: float = 5.0) -> None:
    """Downloads an archive into `folder`, verified, by an atomic write.

    Args:
      archive: what to download.
      folder: made if absent.
      timeout: of every wait for the network, in seconds.

    Raises:
      OSError: if the server can't be reached or breaks off.
      ValueError: if what came is not the archive.
    """
    with urllib.request.urlopen(archive.url, timeout=timeout) as response:

        def fetch(file: BinaryIO) -> None:
            # One byte more than promised shows an archive that is too long.
            while file.tell() <= archive.size and (block := response.read(1 << 20)):
                file.write(block)
            file.flush()
            verify(folder / archive.file_name, archive, at=Path(file.name))

        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / archive.file_name, fetch)


def verify(path: Path, archive: Archive, *, at: Path | None = None) -> None:
    """Raises a ValueError that names the file unless it has the archive's size and SHA-256.

    Args:
      path: the file, as the message names it.
      archive: what it must be.
      at: where its content is, if it is not at `path` yet.
    """
    size, sha256 = (at or path).stat().st_size, hash_file(at or path)
    if sha256 != archive.sha256:
        raise ValueError(
            f"{path} must be the published file of {archive.size} bytes with SHA-256 "
            f"{archive.sha256}; got {size} bytes with {sha256}. Delete it and download it again "
            f"from {archive.url}; if it was packed anew on purpose, prepare it with check=False."
        )


def _read_cifar10(folder: Path) -> Splits:
    """Records of 1 label byte and 3 x 32 x 32 bytes, channel first."""
    train = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
    members = _read_tar(folder / "cifar-10-binary.tar.gz", (*train, "test_batch.bin"))
    splits = {}
    for split, files in (("train", train), ("test", ("test_batch.bin",))):
        records = np.concatenate([members[file] for file in files])
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = (np.ascontiguousarray(images), records[:, 0])
    return splits


def _read_tar(path: Path, files: Sequence[str]) -> dict[str, np.ndarray]:
    """The named members' records, `[N, 3073]` each, taken from memory in one pass."""
    wanted = {f"cifar-10-batches-bin/{file}": file for file in files}
    members = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.name in wanted and (content := tar.extractfile(member)) is not None:
                    members[wanted[member.name]] = np.frombuffer(content.read(), np.uint8)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} must be a complete .tar.gz; got {error!r}. {_AGAIN}") from error
    for file in files:
        got = "no such member" if file not in members else f"{members[file].size} bytes"
        if file not in members or members[file].size == 0 or members[file].size % 3073:
            raise ValueError(
                f"{path} must hold cifar-10-batches-bin/{file}, records of 3073 bytes each; got "
                f"{got}. {_AGAIN} The binary version is wanted, not the Python one."
            )
    return {file: member.reshape(-1, 3073) for file, member in members.items()}


def _read_mnist(folder: Path) -> Splits:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", 3)
        labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 1)
        if images.shape != (len(labels), 28, 28):
            raise ValueError(
                f"{folder / prefix}-* must hold N images of 28 x 28 and N labels; got images "
                f"{images.shape} and {len(labels)} labels. {_AGAIN}"
            )
        splits[split] = (images[..., None], labels)
    return splits


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Big-endian 32-bit words, 0x800 + ndim and then the shape, followed by the bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} must be a complete .gz; got {error!r}. {_AGAIN}") from error
    start = 4 * (ndim + 1)
    magic, *shape = [int.from_bytes(content[i : i + 4], "big") for i in range(0, start, 4)]
    if magic != 0x800 + ndim or len(content) != start + math.prod(shape):
        raise ValueError(
            f"{path} must be an IDX file of {ndim}-dimensional bytes, its length that of its "
            f"header; got {len(content)} bytes that begin with {content[:16].hex()}. {_AGAIN}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


_AGAIN = "Download it again: it is truncated or another file."


def _archives(base: str, table: str) -> tuple[Archive, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(Archive(base + file_name, int(size), sha256) for size, sha256, file_name in rows)


SOURCES = {  # archives: size in bytes, SHA-256, name
    "cifar10": Source(
        "3.0.2",
        _archives(
            "https://www.cs.toronto.edu/~kriz/",
            """
170052171 c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd cifar-10-binary.tar.gz
""",
        ),
        _read_cifar10,
        (32, 32, 3),
        "airplane automobile bird cat deer dog frog horse ship truck".split(),
        {"train": 50_000, "test": 10_000},
        has_id=True,
    ),
    "mnist": Source(
        "3.0.1",
        _archives(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            """
9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 train-images-idx3-ubyte.gz
28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c train-labels-idx1-ubyte.gz
1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 t10k-images-idx3-ubyte.gz
4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 t10k-labels-idx1-ubyte.gz
""",
        ),
        _read_mnist,
        (28, 28, 1),
        list("0123456789"),
        {"train": 60_000, "test": 10_000},
    ),
    "fashion_mnist": Source(
        "3.0.1",
        _archives(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            """
26421880 3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84 train-images-idx3-ubyte.gz
29515 a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845 train-labels-idx1-ubyte.gz
4422102 346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073 t10k-images-idx3-ubyte.gz
5148 67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5 t10k-labels-idx1-ubyte.gz
""",
        ),
        _read_mnist,
        (28, 28, 1),
        "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        {"train": 60_000, "test": 10_000},
    ),
}
