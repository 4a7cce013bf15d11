"""CIFAR-10, MNIST and Fashion-MNIST prepared from their original archives, without TensorFlow.

TFDS reads a prepared data set without TensorFlow, but its own recipes for preparing these three
need it. Here the archives are read by `fmjax.data.archives`, every picture becomes a PNG (lossless)
made by Pillow, and TFDS writes the records itself, under the stock name, version, features and
keys. What comes out is thus an ordinary TFDS data set in ArrayRecord format, in the stock order,
and `tfds.data_source` reads it anywhere.

    python -m fmjax.data.prepare cifar10 --archives DIR --data-dir DIR

takes the archives from a folder; without `--archives` they are downloaded.
"""

import argparse
import contextlib
import errno
import http.client
import io
import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import tensorflow_datasets as tfds
from PIL import Image

from .archives import SOURCES, Archive, Source, Splits, download, verify

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def data_root(data_dir: str | os.PathLike | None) -> Path:
    """The folder of the data sets: the argument, else TFDS_DATA_DIR, else TFDS's own default.

    TFDS reads the variable when it is imported; here it is read at every call.
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_prepared(name: str, data_dir: str | os.PathLike | None = None) -> bool:
    """Whether the stock version of the data set `name` is prepared in `data_dir`."""
    return (_folder(name, data_dir) / "dataset_info.json").is_file()


def prepare(
    name: str,
    *,
    archives: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    check: bool = True,
) -> Path:
    """Prepares a data set from its original archives; a prepared copy is left as it is.

    An atomic write: the copy is written under another name and then renamed. Of several processes
    with one `data_dir`, on one host or on many, one downloads and prepares; the others wait for it.

    Args:
      name: "cifar10", "mnist" or "fashion_mnist".
      archives: the folder that holds the original archives under their original names; None
        downloads them into `data_dir`/downloads.
      data_dir: where prepared data sets live; None takes TFDS_DATA_DIR or TFDS's own default.
      check: whether the archives must have the published SHA-256. Switch it off for pictures that
        were packed anew, such as Debian's dataset-fashion-mnist.

    Returns:
      The folder of the prepared copy, `data_dir`/name/version.

    Raises:
      ValueError: for an unknown name, and for an archive that is truncated or not the right one.
      FileNotFoundError: if an archive is absent and can't be downloaded.
      OSError: if the disk is full, or can't be written; nothing is left of what was begun.

    Example:
      >>> prepare("mnist", archives="archives", data_dir="data")  # doctest: +SKIP
      PosixPath('data/mnist/3.0.1')
    """
    if name not in SOURCES:
        raise ValueError(f"name must be one of {sorted(SOURCES)}; got {name!r}.")
    if is_prepared(name, data_dir):
        return _folder(name, data_dir)
    with _alone(name, data_root(data_dir)):
        if not is_prepared(name, data_dir):  # else another process has done so
            _prepare(name, archives, data_root(data_dir), check)
    return _folder(name, data_dir)


@contextlib.contextmanager
def _alone(name: str, root: Path) -> Iterator[None]:
    """Holds a lock on the data set's disk, which the system lets go of however the process ends."""
    lock = filelock.FileLock(root / f".{name}.lock", fallback_to_soft=False)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:  # there each prepares, and the first copy serves
            raise _disk_error(root, error) or error from error
    try:
        yield
    finally:
        lock.release()


def _prepare(name: str, archives: str | os.PathLike | None, root: Path, check: bool) -> None:
    source = SOURCES[name]
    # MNIST and Fashion-MNIST name their archives alike, so each has a folder of its own.
    folder = Path(archives) if archives is not None else root / "downloads" / f"fmjax_{name}"
    for archive in source.archives:
        if not (folder / archive.file_name).is_file():
            _fetch(name, archive, folder, root, may_download=archives is None)
        if check:
            verify(folder / archive.file_name, archive)
    builder = _Builder(name, source, source.read(folder), root)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            file_format="array_record",
        )
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises the latter
        if not is_prepared(name, root):  # else another process was quicker: its copy serves
            raise _disk_error(root, error) or error from error


def _fetch(name: str, archive: Archive, folder: Path, root: Path, may_download: bool) -> None:
    try:
        if not may_download:
            raise FileNotFoundError(f"{folder} holds no {archive.file_name}")
        download(archive, folder)
    except (OSError, http.client.HTTPException) as error:
        absent = FileNotFoundError(missing(name, root, f"{archive.file_name}: {error}"))
        raise _disk_error(root, error) or absent from error


def _disk_error(folder: Path, error: Exception) -> OSError | None:
    """The error of a disk that can't be written, in words; None for another error."""
    number = getattr(error, "errno", None)
    if isinstance(error, RuntimeError):  # ArrayRecord's: the system's words are in its text
        number = next((n for n in _OF_DISKS if os.strerror(n) in str(error)), None)
    if number not in _OF_DISKS:
        return None
    return OSError(
        f"{folder} can't be written: {os.strerror(number)}; nothing is left of what was begun. "
        "Make room there, or repair the disk, and start again."
    )


def missing(name: str, data_dir: str | os.PathLike | None, reason: str) -> str:
    """What to tell a user who has neither a prepared copy nor the archives of `name`."""
    root, archives = data_root(data_dir), SOURCES[name].archives
    wanted = "".join(f"\n  {a.file_name}  ({a.url})" for a in archives)
    return (
        f"{name} must be prepared or its archives be at hand. No prepared copy is in "
        f"{_folder(name, data_dir)}, and of its archives at least one is missing: {reason}. "
        f"Put into a folder DIR{wanted}\nand run\n"
        f"  python -m fmjax.data.prepare {name} --archives DIR --data-dir {root}\n"
        "or let TFDS_DATA_DIR name a folder with a prepared copy. Images that need no "
        "download are fmjax.data.load_digits's."
    )


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes pictures that are at hand under a stock data set's name, version and features."""

    def __init__(self, name: str, source: Source, splits: Splits, data_dir: Path):
        self.name = name  # pyright: ignore[reportAttributeAccessIssue]  # TFDS's own way as well
        self.VERSION = tfds.core.Version(source.version)
        self._source, self._splits = source, splits
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features: dict[str, Any] = {"id": tfds.features.Text()} if self._source.has_id else {}
        features["image"] = tfds.features.Image(shape=self._source.image_shape)
        features["label"] = tfds.features.ClassLabel(names=self._source.label_names)
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name} from its original archives, as PNG.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=self._source.archives[0].url.rsplit("/", 1)[0],
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(split) for split in self._splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(*self._splits[split], strict=True)):
            png = io.BytesIO()
            Image.fromarray(image.squeeze()).save(png, "PNG")
            example = {"image": png.getvalue(), "label": int(label)}
            if self._source.has_id:
                example["id"] = f"{split}_{index:05d}"
            yield index, example  # TFDS orders by a hash of this key: stock key, stock order


def _folder(name: str, data_dir: str | os.PathLike | None) -> Path:
    return data_root(data_dir) / name / SOURCES[name].version


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m fmjax.data.prepare") -> None:
    """The command line: `python -m fmjax.data.prepare cifar10 --archives DIR --data-dir DIR`."""
    parser = argparse.ArgumentParser(prog=prog, description=prepare.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--archives", help="folder of the original archives; else downloaded")
    parser.add_argument("--data-dir", help="where it goes; else TFDS_DATA_DIR or TFDS's default")
    parser.add_argument("--no-check", action="store_true", help="take archives packed anew")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    args = parser.parse_args(argv)
    if is_prepared(args.name, args.data_dir):
        parser.exit(
            message=f"{_folder(args.name, args.data_dir)} is already there, left as it is.\n"
        )
    try:
        folder = prepare(
            args.name, archives=args.archives, data_dir=args.data_dir, check=not args.no_check
        )
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted. What is written is complete: start the command again.\n")
    except (ValueError, OSError) as error:
        if args.traceback:
            traceback.print_exc()
        parser.exit(2, "" if args.traceback else f"error: {error}\n")
    print(f"{args.name} is prepared in {folder}")


if __name__ == "__main__":
    main()
