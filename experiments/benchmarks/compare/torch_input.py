"""The peer's side of the input pipeline: torch's DataLoader over plain data sets.

The same images: PNG records decoded by Pillow in as many worker processes as there are threads,
read once; and uint8 arrays in memory without workers, which is what a loop over decoded images
would take. torchvision is not needed.
"""

import io

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from experiments.benchmarks.compare import points
from experiments.benchmarks.compare.workers import Case, Options, timed


class Records(Dataset):
    """PNG bytes, decoded one by one."""

    def __init__(self, images: np.ndarray):
        self.encoded = [_png(image) for image in images]

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.encoded[index])) as image:
            return torch.from_numpy(np.asarray(image).copy())


class Memory(Dataset):
    """Decoded images."""

    def __init__(self, images: np.ndarray):
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def reading(options: Options) -> dict[str, Case]:
    torch.set_num_threads(options.threads)
    images = np.load(options.folder / "cifar.npy", allow_pickle=False)
    many = DataLoader(
        Records(images), batch_size=128, num_workers=options.threads, persistent_workers=True
    )
    few = DataLoader(Memory(images), batch_size=points.BATCH, shuffle=True)

    def drain(loader: DataLoader) -> None:
        for _ in loader:
            pass

    return {
        "read": timed(lambda: drain(many), len(images)),
        "batch": timed(lambda: drain(few), len(images)),
    }
