"""Archives that are read, and those that are truncated or something else."""

import gzip
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_archives import make_cifar10, make_mnist, truncate

from fmjax.data import archives


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_reading_gives_the_pixels_and_labels_in_order(tmp_path, name):
    made = (make_cifar10 if name == "cifar10" else make_mnist)(tmp_path)
    read = archives.SOURCES[name].read(tmp_path)
    assert list(read) == list(made)
    for split, (images, labels) in made.items():
        np.testing.assert_array_equal(read[split][0], images)
        np.testing.assert_array_equal(read[split][1], labels)
    assert list(tmp_path.rglob("*escaped*")) == []


def test_truncated_archives_are_named(tmp_path):
    make_cifar10(tmp_path)
    make_mnist(tmp_path)
    for name, file in (
        ("cifar10", "cifar-10-binary.tar.gz"),
        ("mnist", "t10k-labels-idx1-ubyte.gz"),
    ):
        truncate(tmp_path / file)
        with pytest.raises(ValueError, match=f"{file} must be a complete .*Download it again"):
            archives.SOURCES[name].read(tmp_path)


def shorten(files):
    files["data_batch_4.bin"] = files["data_batch_4.bin"][:-1]


def test_wrong_content_is_named(tmp_path):
    make_cifar10(tmp_path, corrupt=shorten)
    with pytest.raises(ValueError, match="data_batch_4.bin, records of 3073 bytes each; got 9218"):
        archives.SOURCES["cifar10"].read(tmp_path)
    make_cifar10(tmp_path, corrupt=lambda files: files.pop("test_batch.bin"))
    with pytest.raises(ValueError, match="test_batch.bin.*no such member.*binary version"):
        archives.SOURCES["cifar10"].read(tmp_path)
    make_mnist(tmp_path)
    images, labels = (tmp_path / f"train-{x}-ubyte.gz" for x in ("images-idx3", "labels-idx1"))
    shutil.copy(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    with pytest.raises(ValueError, match=r"N images of 28 x 28 and N labels; got .*4 labels"):
        archives.SOURCES["mnist"].read(tmp_path)
    content = bytearray(gzip.decompress(images.read_bytes()))
    content[2] = 0x0D  # IDX's mark of floats
    images.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="IDX file of 3-dimensional bytes.*begin with 00000d03"):
        archives.SOURCES["mnist"].read(tmp_path)
    shutil.copy(labels, images)
    with pytest.raises(ValueError, match="train-images.* must be an IDX file of 3-dimensional"):
        archives.SOURCES["mnist"].read(tmp_path)


def test_the_published_checksums_are_those_tfds_knows():
    import tensorflow_datasets as tfds

    for name, source in archives.SOURCES.items():
        known = tfds.builder_cls(name).url_infos
        for archive in source.archives:
            info = known[archive.url]
            assert (int(info.size), info.checksum) == (archive.size, archive.sha256), archive


@pytest.mark.slow
def test_importing_archives_loads_neither_tfds_nor_tensorflow():
    program = (
        "import sys, fmjax.data.archives\n"
        "print({'tensorflow_datasets', 'tensorflow', 'flax'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert out.stdout.strip() == "set()", out.stderr
