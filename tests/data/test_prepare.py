"""Preparing from archives in the original formats, made here with a few images each."""

import errno
import hashlib
import io
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from made_archives import make_cifar10, make_mnist, truncate

from fmjax import data
from fmjax.data import prepare
from fmjax.data.archives import SOURCES, Archive


def as_set(images, labels):
    return sorted(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_load_gives_the_pixels_and_labels_of_the_archives(tmp_path, name):
    splits = (make_cifar10 if name == "cifar10" else make_mnist)(tmp_path)
    folder = prepare.prepare(name, archives=tmp_path, data_dir=tmp_path / "d", check=False)
    assert folder == tmp_path / "d" / name / SOURCES[name].version
    for split, (images, labels) in splits.items():
        loaded = data.load(name, split, tmp_path / "d")
        assert loaded.images.dtype == np.uint8 and loaded.labels.dtype == np.int32
        assert loaded.images.flags.c_contiguous and loaded.num_classes == 10
        assert as_set(loaded.images, loaded.labels) == as_set(images, labels)  # TFDS shuffles
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("name", ["cifar10", "mnist", "fashion_mnist"])
def test_version_features_and_class_names_are_the_stock_ones(tmp_path, name):
    import tensorflow_datasets as tfds

    (make_cifar10 if name == "cifar10" else make_mnist)(tmp_path)
    folder = prepare.prepare(name, archives=tmp_path, data_dir=tmp_path / "d", check=False)
    ours = tfds.builder_from_directory(folder).info
    stock = tfds.builder(name, data_dir=tmp_path / "empty").info  # from TFDS's own code
    assert (ours.name, str(ours.version)) == (stock.name, str(stock.version))
    assert ours.features.to_json() == stock.features.to_json()
    assert ours.supervised_keys == stock.supervised_keys
    if name != "cifar10":  # TFDS takes CIFAR-10's names from the archive
        assert ours.features["label"].names == stock.features["label"].names


def test_cifar10_ids_are_the_places_in_the_archive(tmp_path):
    import tensorflow_datasets as tfds

    splits = make_cifar10(tmp_path)
    prepare.prepare("cifar10", archives=tmp_path, data_dir=tmp_path, check=False)
    source = tfds.data_source("cifar10", split="train", data_dir=tmp_path)
    for example in source:
        index = int(example["id"].decode().removeprefix("train_"))
        np.testing.assert_array_equal(example["image"], splits["train"][0][index])
        assert example["label"] == splits["train"][1][index]


def test_a_prepared_copy_is_left_as_it_is(tmp_path):
    make_mnist(tmp_path)
    folder = prepare.prepare("mnist", archives=tmp_path, data_dir=tmp_path, check=False)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert prepare.prepare("mnist", archives=tmp_path / "absent", data_dir=tmp_path) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_failure_leaves_no_data_set_behind(tmp_path):
    make_mnist(tmp_path, max_label=10)
    with pytest.raises(ValueError, match="10"):
        prepare.prepare("mnist", archives=tmp_path, data_dir=tmp_path / "d", check=False)
    assert list((tmp_path / "d" / "mnist").iterdir()) == []
    assert not prepare.is_prepared("mnist", tmp_path / "d")


def test_another_archive_than_the_published_one_is_refused(tmp_path):
    make_cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz must .*170052171.*c4a38c50.*got"):
        prepare.prepare("cifar10", archives=tmp_path, data_dir=tmp_path)


def test_unknown_name():
    with pytest.raises(ValueError, match="'cifar10', 'fashion_mnist', 'mnist'.*got 'cifar'"):
        prepare.prepare("cifar")


@pytest.fixture
def offline(monkeypatch):
    def urlopen(url, timeout):
        assert timeout <= 10
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_offline_the_error_says_what_to_do(tmp_path, name):
    with pytest.raises(FileNotFoundError) as caught:
        data.load(name, "train", tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name / SOURCES[name].version) in message
    assert f"python -m fmjax.data.prepare {name} --archives DIR --data-dir {tmp_path}" in message
    assert "no network" in message and "load_digits" in message
    for archive in SOURCES[name].archives:
        assert archive.file_name in message and archive.url in message
    assert [path.name for path in tmp_path.iterdir()] == [f".{name}.lock"]


@pytest.mark.usefixtures("offline")
def test_an_archive_lacking_in_the_folder_is_not_downloaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no cifar-10-binary.tar.gz"):
        prepare.prepare("cifar10", archives=tmp_path, data_dir=tmp_path)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """A server of MNIST-like archives whose checksums are the published ones; lists its calls."""
    folder = tmp_path / "server"
    folder.mkdir()
    make_mnist(folder)
    source, calls = SOURCES["mnist"], []
    archives = []
    for archive in source.archives:
        content = (folder / archive.file_name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        archives.append(Archive(archive.url, len(content), sha256))
    monkeypatch.setitem(SOURCES, "mnist", source._replace(archives=tuple(archives)))

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO((folder / url.rsplit("/", 1)[1]).read_bytes())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return folder, calls


def test_load_downloads_and_prepares_once(tmp_path, network):
    _, calls = network
    assert data.load("mnist", "train", tmp_path).images.shape == (7, 28, 28, 1)
    assert calls == [archive.url for archive in SOURCES["mnist"].archives]
    assert data.load("mnist", "test[:3]", tmp_path).images.shape == (3, 28, 28, 1)
    assert len(calls) == 4


TOGETHER = """
import pathlib, sys, time
from fmjax import data
from fmjax.data import archives, prepare
folder, number = pathlib.Path(sys.argv[1]), sys.argv[2]
source = archives.SOURCES["mnist"]
def read(where):
    with open(folder / "reads", "a") as file:
        file.write(number)
    time.sleep(0.5)
    return source.read(where)
archives.SOURCES["mnist"] = source._replace(read=read)
(folder / f"ready_{number}").touch()
while len(list(folder.glob("ready_*"))) < 2:
    time.sleep(0.01)
prepare.prepare("mnist", archives=folder, data_dir=folder / "d", check=False)
print(data.load("mnist", "train", folder / "d").images.sum())
"""


@pytest.mark.slow
def test_two_processes_on_an_empty_folder_prepare_once(tmp_path):
    images, _ = make_mnist(tmp_path)["train"]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, tmp_path, str(k)], stdout=subprocess.PIPE, text=True
        )
        for k in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [int(text.splitlines()[-1]) for text in said] == [images.astype(int).sum()] * 2
    assert (tmp_path / "reads").read_text() in ("0", "1")
    assert len(list((tmp_path / "d" / "mnist").iterdir())) == 1  # nothing incomplete


def test_a_disk_without_locks_is_prepared_on_too(tmp_path, monkeypatch):
    def acquire(self):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    make_mnist(tmp_path)
    monkeypatch.setattr(prepare.filelock.FileLock, "acquire", acquire)
    folder = prepare.prepare("mnist", archives=tmp_path, data_dir=tmp_path / "d", check=False)
    assert prepare.is_prepared("mnist", tmp_path / "d") and folder.is_dir()


def test_an_unknown_split_is_refused_before_the_download(tmp_path, network):
    with pytest.raises(ValueError, match="one of train, test; got 'validation'"):
        data.load("mnist", "validation", tmp_path)
    assert network[1] == []


def test_a_broken_download_is_refused_and_removed(tmp_path, network):
    folder, _ = network
    truncate(folder / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte.gz must be the published file"):
        prepare.prepare("mnist", data_dir=tmp_path)
    downloads = [file.name for file in (tmp_path / "downloads" / "fmjax_mnist").iterdir()]
    assert downloads == ["train-images-idx3-ubyte.gz"]  # the first one was whole
    assert not prepare.is_prepared("mnist", tmp_path)


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "variable"))
    assert prepare.data_root(tmp_path / "argument") == tmp_path / "argument"
    assert prepare.data_root(None) == tmp_path / "variable"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert prepare.data_root(None) == Path.home() / "tensorflow_datasets"


@pytest.mark.slow
def test_command_line_without_tensorflow(tmp_path):
    make_mnist(tmp_path)
    program = (
        "import sys; from fmjax import data; from fmjax.data import prepare\n"
        "prepare.main(sys.argv[1:])\n"
        "print(data.load('mnist', 'train', sys.argv[-1]).images.shape, 'tensorflow' in sys.modules)"
    )
    arguments = ["mnist", "--no-check", "--archives", str(tmp_path), "--data-dir", str(tmp_path)]
    run = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"mnist is prepared in {tmp_path / 'mnist' / '3.0.1'}" in done.stdout
    assert "(7, 28, 28, 1) False" in done.stdout


def test_command_line_errors_are_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.main(["cifar10", "--archives", str(tmp_path), "--data-dir", str(tmp_path)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cifar10 must be prepared or its archives be at hand")
    assert "Traceback" not in said
    with pytest.raises(SystemExit) as caught:
        prepare.main(["mnist", "--traceback", "--archives", "none", "--data-dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" in said and "FileNotFoundError: mnist" in said


def test_ctrl_c_while_preparing(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare", interrupted)
    with pytest.raises(SystemExit) as caught:
        prepare.main(["mnist", "--data-dir", str(tmp_path)])
    assert caught.value.code == 130 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, monkeypatch):
    """ArrayRecord's writer has its own kind of error, with the system's words in the text."""
    make_mnist(tmp_path)
    full = os.strerror(errno.ENOSPC)

    def download_and_prepare(*args, **kwargs):
        raise RuntimeError(f'Failed to finalize writing of split "train": write() failed: {full}')

    monkeypatch.setattr(prepare._Builder, "download_and_prepare", download_and_prepare)
    with pytest.raises(OSError, match=f"{tmp_path} can't be written: {full}; nothing is left"):
        prepare.prepare("mnist", archives=tmp_path, data_dir=tmp_path, check=False)
    monkeypatch.setattr(prepare, "download", lambda *args: os.open(tmp_path / "x", os.O_RDONLY))
    with pytest.raises(FileNotFoundError, match="No such file"):  # of the network, or of a file
        prepare.prepare("cifar10", data_dir=tmp_path)
