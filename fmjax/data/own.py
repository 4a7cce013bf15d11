"""Pictures of one's own: folders of picture files, and arrays in a .npz file.

Both are read once into memory as 8-bit images. Where nobody has said which are for testing, about a
tenth is. A picture of a folder is held out by a hash of its class and its name, so that pictures
which come later leave the others where they are.
"""

import concurrent.futures
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import hash_bytes
from . import splits
from .images import ImageDataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEST_SHARE = 0.1
_NAMED = 5  # files that an error names, of all that it counts
_GREY = ("1", "L", "LA")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")


def load_folder(
    path: str | os.PathLike, split: str, *, image_size: int | None = None, seed: int = 0
) -> ImageDataset:
    """Reads a folder of pictures into memory.

    Folders in it are classes, in the order of their names; pictures that are in no folder are of
    one class. If there are just the folders "train" and "test", those are the splits, each with its
    classes. Else about a tenth of each class is "test", at least one of two or more, chosen by
    hashes of `seed` and the names.

    A picture is turned as its EXIF says, laid on white where it is transparent, and has three
    channels, or one if all pictures are grey. Files and folders that start with a dot, and files
    without one of the usual suffixes, are passed over.

    Args:
      path: the folder.
      split: "train" or "test", with TFDS's slices: "train[:100]", "train[:90%]+test".
      image_size: pictures become squares of so many pixels, the middle of each scaled by Pillow's
        Lanczos filter; None takes pictures that are all of one size as they are.
      seed: of what is held out.

    Returns:
      Images `[N, height, width, channel]` in a fixed order that mixes the classes.

    Raises:
      FileNotFoundError: if there is no such folder.
      ValueError: if it holds no picture; pictures both in folders and beside them; folders that are
        called like splits, but not just "train" and "test"; an unreadable picture, or one of 16
        bits a channel, which is named; pictures of several sizes without `image_size`; a class of
        which "train" has nothing; for an unknown split or an empty slice.

    Example:
      >>> load_folder("my_pictures", "train", image_size=32).images.shape  # doctest: +SKIP
      (180, 32, 32, 3)
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be positive; got {image_size}.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"There is no folder {folder} of pictures: it {what}.")
    parts = sorted(child.name for child in folder.iterdir() if child.is_dir() and _seen(child))
    apart = parts == ["test", "train"] and not _pictures(folder, deep=False)
    if not apart and any(name.lower() in _SPLITS for name in parts):
        raise ValueError(
            f"Folders called like splits must be just train and test; {folder} holds "
            f"{', '.join(parts)}. Rename them, or move the others away."
        )
    found = {name: _classes(folder / name) for name in parts} if apart else {"": _classes(folder)}
    names = sorted({name for classes in found.values() for name in classes})
    files, labels, rows = [], [], {"train": [], "test": []}
    for part, classes in found.items():
        for name, members in classes.items():
            numbers = np.arange(len(files), len(files) + len(members))
            files += members
            labels += [names.index(name)] * len(members)
            told = [f"{name}/{file.relative_to(folder / part / name)}" for file in members]
            held_out = {part: numbers} if apart else _hold_out(numbers, told, seed)
            for split_name, those in held_out.items():
                rows[split_name] += list(those)
    labels = np.array(labels, np.int32)
    _check_classes(folder, names, labels, rows["train"])
    chosen = splits.mixed(split, rows, seed)
    images = _read([files[row] for row in chosen], image_size, _all_grey(files))
    return ImageDataset(images, labels[chosen], len(names))


def load_npz(path: str | os.PathLike, split: str, *, seed: int = 0) -> ImageDataset:
    """Reads 8-bit images from a .npz file, without pickle.

    The file holds `images`, uint8 `[N, height, width, channel]` or `[N, height, width]`, and
    perhaps `labels`, whole numbers `[N]` from 0; and perhaps `test_images`, with `test_labels` if
    there are labels. Without the latter about a tenth of each class is "test", chosen by hashes of
    `seed` and the rows.

    Args:
      path: the file, as `numpy.savez` writes it.
      split: "train" or "test", with TFDS's slices.
      seed: of what is held out.

    Returns:
      The images and labels, zeros without any.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it can't be read, lacks `images`, holds labels of one part alone, an array of
        another shape or dtype, or a class of which "train" has nothing; for an unknown split or an
        empty slice.

    Example:
      >>> load_npz("cells.npz", "train[:100]").images.shape  # doctest: +SKIP
      (100, 64, 64, 1)
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a folder" if file.exists() else "does not exist"
        raise FileNotFoundError(f"There is no file {file} of images: it {what}.")
    names = ("images", "labels", "test_images", "test_labels")
    try:
        with zipfile.ZipFile(file), np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in names if name in archive}
            held = sorted(archive)
    except Exception:  # a damaged archive raises one of many
        raise ValueError(
            f"{file} must be an .npz file of arrays, as numpy.savez writes it; got something else, "
            "objects in it, or a damaged one."
        ) from None
    if "images" not in arrays:
        raise ValueError(
            f"{file} must hold an array `images`; it holds {', '.join(held) or 'none'}."
        )
    parts = {name for name in ("", "test_") if f"{name}images" in arrays}
    if {name for name in ("", "test_") if f"{name}labels" in arrays} not in (set(), parts):
        raise ValueError(
            f"{file}: each of images and test_images must have its labels, or none of them; got "
            f"{', '.join(sorted(arrays))}."
        )
    images, labels = _checked(file, arrays, "")
    rows: dict[str, Any] = {"train": [], "test": []}
    if "test_images" in arrays:
        more, more_labels = _checked(file, arrays, "test_")
        if more.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{file}: images and test_images must have one shape; got {images.shape[1:]} and "
                f"{more.shape[1:]}."
            )
        rows = {"train": range(len(images)), "test": range(len(images), len(images) + len(more))}
        images, labels = np.concatenate([images, more]), np.concatenate([labels, more_labels])
    else:
        for label in np.unique(labels):
            numbers = np.flatnonzero(labels == label)
            for name, those in _hold_out(numbers, [f"{label}/{n}" for n in numbers], seed).items():
                rows[name] += list(those)
    _check_classes(file, range(labels.max() + 1), labels, rows["train"])
    chosen = splits.mixed(split, rows, seed)
    return ImageDataset(images[chosen], labels[chosen], int(labels.max()) + 1)


def _seen(path: Path) -> bool:
    return not path.name.startswith(".")


def _pictures(folder: Path, *, deep: bool) -> list[Path]:
    """The pictures of a folder in the order of their names, those of folders in it if `deep`."""
    found = folder.rglob("*") if deep else folder.iterdir()
    found = (p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(w[0] == "." for w in p.relative_to(folder).parts))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The pictures of each class, the folders' names; one class without a name if they lie open."""
    folders = sorted(child for child in folder.iterdir() if child.is_dir() and _seen(child))
    classes = {child.name: _pictures(child, deep=True) for child in folders}
    classes = {name: files for name, files in classes.items() if files}
    flat = _pictures(folder, deep=False)
    if flat and classes:
        raise ValueError(
            f"{folder} must hold pictures or folders of them, each folder a class; got "
            f"{flat[0].name} beside the folder {next(iter(classes))}. Move the pictures into a "
            "folder of their own."
        )
    if not flat and not classes:
        raise ValueError(
            f"{folder} must hold pictures, {', '.join(SUFFIXES)}, or folders of them; got none."
        )
    return classes or {"": flat}


def _hold_out(numbers: np.ndarray, names: Sequence[str], seed: int) -> dict[str, np.ndarray]:
    """About a tenth of a class, at least one of two or more, and the rest."""
    hashes = [hash_bytes(f"{seed}/{name}".encode()) for name in names]
    place = np.array([int(text[:13], 16) / 16**13 for text in hashes])  # uniform in [0, 1)
    test = place < TEST_SHARE
    if len(numbers) > 1 and not test.any():
        test = place == place.min()
    return {"train": numbers[~test], "test": numbers[test]}


def _check_classes(
    place: Path, names: Sequence[Any], labels: np.ndarray, train: Sequence[int]
) -> None:
    there = {*labels[np.array(train, np.int64)].tolist()}
    missing = next((k for k in range(len(names)) if k not in there), None)
    if missing is not None:
        raise ValueError(
            f"Every class must have pictures to train on; {place} has none of {names[missing]} in "
            f"train, and pictures of {len(there)} of {len(names)} classes."
        )


def _checked(file: Path, arrays: dict[str, np.ndarray], prefix: str) -> tuple[Any, Any]:
    """The images `[N, h, w, c]` and labels `[N]` of one part of an .npz file."""
    images = arrays[f"{prefix}images"]
    if images.ndim not in (3, 4) or images.dtype != np.uint8 or not images.size:
        raise ValueError(
            f"{file}: {prefix}images must be uint8 [N, height, width, channel] or [N, height, "
            f"width], not empty; got {images.dtype} {images.shape}. Floats in [0, 1] need "
            "(255 * x).round().astype(numpy.uint8)."
        )
    images = images[..., None] if images.ndim == 3 else images
    labels = arrays.get(f"{prefix}labels", np.zeros(len(images), np.int32))
    whole = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(images),)
    if not whole or labels.min() < 0 or labels.max() >= 2**31:
        got = f" from {labels.min()} to {labels.max()}" if whole else ""
        raise ValueError(
            f"{file}: {prefix}labels must be whole numbers [{len(images)}] from 0, one for each "
            f"image; got {labels.dtype} {labels.shape}{got}. numpy.unique(labels, "
            "return_inverse=True)[1] numbers any classes."
        )
    return images, labels.astype(np.int32)


def _all_grey(files: Sequence[Path]) -> bool:
    """Whether all pictures are grey, by their headers; one that can't be read says nothing."""
    from PIL import Image

    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode not in _GREY:
                    return False
        except OSError:
            continue
    return True


def _read(files: Sequence[Path], image_size: int | None, grey: bool) -> np.ndarray:
    """The pictures, `[N, height, width, channel]`, by several threads."""

    def attempt(file: Path) -> np.ndarray | str:
        try:
            return _picture(file, image_size, grey)
        except Exception as error:  # Pillow raises many kinds; one picture of thousands is named
            return str(error) if isinstance(error, ValueError) else "it can't be read"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        read = list(pool.map(attempt, files))
    bad = [f"{file} ({x})" for file, x in zip(files, read, strict=True) if isinstance(x, str)]
    if bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError(
            f"All pictures must be readable; {len(bad)} of {len(files)} are not: "
            f"{', '.join(bad[:_NAMED])}{more}. Repair or remove them."
        )
    images = [x for x in read if isinstance(x, np.ndarray)]
    other = next((k for k, x in enumerate(images) if x.shape != images[0].shape), None)
    if other is not None:
        sizes = [f"{files[k]} is {images[k].shape[1]}x{images[k].shape[0]}" for k in (0, other)]
        raise ValueError(
            f"Pictures must be of one size: {sizes[0]} and {sizes[1]}. Give an image size, and all "
            "become squares of it."
        )
    return np.stack(images)


def _picture(file: Path, image_size: int | None, grey: bool) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        modes = [opened.mode, *(str(tile[3]) for tile in opened.tile)]  # the file's own are last
        if opened.mode[0] in "IF" or any("16" in mode for mode in modes):
            raise ValueError("more than 8 bits a channel")
        picture: Image.Image = ImageOps.exif_transpose(opened)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        picture = picture.convert("L" if grey else "RGB")
        if image_size is not None:
            size = (image_size, image_size)
            picture = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        pixels = np.asarray(picture)
    return pixels[..., None] if grey else pixels
