"""Distributions of known density, for what is measured in nats above the entropy."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from experiments import toy_data


class Data(NamedTuple):
    """A distribution of known density: `sample(rng, num) -> [num, D]`, `log_prob(x) -> [num]`."""

    sample: Callable[[np.random.Generator, int], np.ndarray]
    log_prob: Callable[[np.ndarray], np.ndarray]


def mixture(means: np.ndarray, deviation: float) -> Data:
    """Equal Gaussians around `means` `[num, D]`."""
    num, dim = means.shape

    def sample(rng: np.random.Generator, count: int) -> np.ndarray:
        noise = rng.standard_normal((count, dim))
        return means[rng.integers(num, size=count)] + deviation * noise

    def log_prob(x: np.ndarray) -> np.ndarray:
        squares = np.square((x[:, None] - means) / deviation).sum(axis=2)
        each = np.logaddexp.reduce(-squares / 2, axis=1) - math.log(num)
        return each - dim * (math.log(deviation) + math.log(2 * math.pi) / 2)

    return Data(sample, log_prob)


def moons(noise: float = 0.1, num_angles: int = 500) -> Data:
    """Two crescents; their density is an integral over the angle, by the midpoint rule."""
    centre, scale = np.array([0.5, 0.25]), 0.75
    theta = (np.arange(num_angles) + 0.5) * math.pi / num_angles
    outer = np.stack([np.cos(theta), np.sin(theta)], axis=1)
    inner = np.array([1.0, 0.5]) - outer
    along = mixture((np.concatenate([outer, inner]) - centre) / scale, noise / scale)

    def sample(rng: np.random.Generator, num: int) -> np.ndarray:
        return (toy_data.crescents(rng, num, noise) - centre) / scale

    return Data(sample, along.log_prob)


def data_sets() -> dict[str, Data]:
    angles = np.arange(8) * math.pi / 4
    ring = 1.4 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    far = np.random.default_rng(0).standard_normal((8, 10))
    return {
        "moons": moons(),
        "8 Gaussians": mixture(ring, 0.2),
        "10-D mixture": mixture(far, 0.4),
    }
