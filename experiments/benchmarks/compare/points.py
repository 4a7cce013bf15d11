"""What both sides of a row are given: points, images and the network's weights, by numpy alone."""

import os
import pathlib

import numpy as np

LAYERS = (3, 64, 64, 64, 2)  # torchcfm's MLP: time is one of the inputs
BATCH = 16  # of the U-Net's rows
PAIRING = (128, 512, 2048)
CHOSEN = "train[:4096]"  # CIFAR-10 images for the input and pairing rows


def normal(num: int, seed: int = 0) -> np.ndarray:
    """Standard normal points `[num, 2]`."""
    return np.random.default_rng(seed).standard_normal((num, 2), np.float32)


def moons(num: int, seed: int = 1) -> np.ndarray:
    """Two moons `[num, 2]`, of the size that `fm_mlp` and `torch_mlp` draw them in."""
    rng = np.random.default_rng(seed)
    angle, upper = np.pi * rng.random(num), rng.random(num) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    points = 3 * np.stack([x, y], axis=1) - 1 + 0.6 * rng.standard_normal((num, 2))
    return points.astype(np.float32)


def pairing_batch(num: int, folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Noise and data, `[num, 3072]`: the images of cifar.npy if a side has left them, or noise."""
    rng = np.random.default_rng(num)
    x0, x1 = (rng.standard_normal((num, 3072), np.float32) for _ in range(2))
    path = folder / "cifar.npy"
    if path.exists():
        x1 = np.load(path)[:num].reshape(num, -1).astype(np.float32) / 127.5 - 1
    return x0, x1


def has_cifar() -> bool:
    root = os.environ.get("TFDS_DATA_DIR")
    return root is not None and (pathlib.Path(root) / "cifar10").exists()


def write_weights(folder: pathlib.Path, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    np.savez(folder / "weights.npz", *(array for layer in layers for array in layer))


def read_weights(folder: pathlib.Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels `[in, out]` and biases `[out]`."""
    with np.load(folder / "weights.npz", allow_pickle=False) as file:
        arrays = [file[f"arr_{i}"] for i in range(2 * len(LAYERS) - 2)]
    return list(zip(arrays[::2], arrays[1::2], strict=True))
