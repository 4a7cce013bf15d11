"""Archives in the original formats, made here with a few images each."""

import gzip
import io
import tarfile

import numpy as np


def make_cifar10(folder, *, corrupt=None):
    """The binary CIFAR-10 archive with 3 images in each file; returns its pixels and labels."""
    rng, splits, files = np.random.default_rng(0), {}, {}
    for split, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test"])):
        images = rng.integers(0, 256, (3 * len(names), 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, len(images), dtype=np.uint8)
        splits[split] = images, labels
        for i, name in enumerate(names):
            member = "test_batch.bin" if name == "test" else f"{name}.bin"
            rows = slice(3 * i, 3 * i + 3)
            pixels = images[rows].transpose(0, 3, 1, 2).reshape(3, -1)
            files[member] = np.concatenate([labels[rows, None], pixels], 1).tobytes()
    if corrupt is not None:
        corrupt(files)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for member, content in {"batches.meta.txt": b"", "../escaped": b"x", **files}.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{member}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return splits


def make_mnist(folder, *, max_label=9):
    """MNIST's four IDX files with 7 and 4 images; returns their pixels and labels."""
    rng, splits = np.random.default_rng(1), {}
    for split, prefix, n in (("train", "train", 7), ("test", "t10k", 4)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.append(rng.integers(0, 10, n - 1, dtype=np.uint8), np.uint8(max_label))
        splits[split] = images[..., None], labels
        words = (2051, n, 28, 28), (2049, n)
        for name, header, array in zip(
            ("images-idx3", "labels-idx1"), words, (images, labels), strict=True
        ):
            content = np.array(header, ">u4").tobytes() + array.tobytes()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return splits


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
