"""Four pairs of distributions in the plane, their batches, and exact pairing ahead of the steps.

With theta ~ U[0, pi], a fair coin b, u ~ U[-3 pi/2, 3 pi/2] and e ~ N(0, I) throughout:

    gaussian     e
    ring         5 (cos k pi/4, sin k pi/4) + e,            k uniform on 0..7
    wide ring    12 (cos k pi/4, sin k pi/4) + 1.5 e
    crescents    m = (cos theta, sin theta) or (1 - cos theta, 1/2 - sin theta), as b falls
    moons        2 (m + 0.05 e) - (1, 0)
    wide moons   7 (m + 0.1 e - 0.375) / 0.723, 0.375 and 0.723 being the mean and the deviation of
                 m + 0.1 e over both coordinates at once
    S-curve      1.5 ((sin u, sign(u) (cos u - 1)) + 0.05 e)

Source: the runner of atong01/conditional-flow-matching, runner/src/datamodules/
distribution_datamodule.py (gaussian to ring, moons, S-curve) and components/two_dim.py (wide moons
to wide ring, its "moon-8gaussians"). It takes scikit-learn's moons, whose angles are on a grid, and
scales the wide moons by the sample's deviation; here points are independent and constants exact.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from fmjax.metrics.transport import wasserstein2

Sampler = Callable[[np.random.Generator, int], np.ndarray]
Pairing = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Pair(NamedTuple):
    """Source (t = 0) and target (t = 1): functions `(rng, num) -> [num, 2]`."""

    source: Sampler
    target: Sampler


def gaussian(rng: np.random.Generator, num: int) -> np.ndarray:
    """Mean 0, covariance I."""
    return rng.standard_normal((num, 2))


def ring(radius: float, deviation: float) -> Sampler:
    """Eight Gaussians on a circle: mean 0, covariance (radius^2 / 2 + deviation^2) I."""

    def sample(rng: np.random.Generator, num: int) -> np.ndarray:
        angles = rng.integers(8, size=num) * (math.pi / 4)
        centres = radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return centres + deviation * rng.standard_normal((num, 2))

    return sample


def crescents(rng: np.random.Generator, num: int, noise: float) -> np.ndarray:
    """Mean (1/2, 1/4); variances 3/4 + noise^2 and 9/16 - 1/pi + noise^2."""
    theta, inner = rng.uniform(0.0, math.pi, num), rng.random(num) < 0.5
    x = np.where(inner, 1.0 - np.cos(theta), np.cos(theta))
    y = np.where(inner, 0.5 - np.sin(theta), np.sin(theta))
    return np.stack([x, y], axis=1) + noise * rng.standard_normal((num, 2))


def moons(rng: np.random.Generator, num: int) -> np.ndarray:
    return 2.0 * crescents(rng, num, 0.05) - np.array([1.0, 0.0])


def wide_moons(rng: np.random.Generator, num: int) -> np.ndarray:
    """Mean 0 and variance 49 over both coordinates at once."""
    # Second moments 1 and 5/8 - 1/pi, and the noise's 0.01.
    variance = (1.0 + 0.625 - 1.0 / math.pi) / 2.0 + 0.01 - 0.375**2
    return 7.0 * (crescents(rng, num, 0.1) - 0.375) / math.sqrt(variance)


def s_curve(rng: np.random.Generator, num: int) -> np.ndarray:
    """Mean 0; second moments 1.5^2 (1/2 + 0.0025) and 1.5^2 (3/2 + 4 / (3 pi) + 0.0025)."""
    u = 3.0 * math.pi * (rng.random(num) - 0.5)
    x = np.stack([np.sin(u), np.sign(u) * (np.cos(u) - 1.0)], axis=1)
    return 1.5 * (x + 0.05 * rng.standard_normal((num, 2)))


PAIRS = {
    "gaussian-8gaussians": Pair(gaussian, ring(5.0, 1.0)),
    "moons-8gaussians": Pair(wide_moons, ring(12.0, 1.5)),
    "gaussian-moons": Pair(gaussian, moons),
    "gaussian-scurve": Pair(gaussian, s_curve),
}

DEVIATIONS: dict[Sampler, float] = {gaussian: 1.0, wide_moons: 7.0}
"""Of the sources, over both coordinates at once."""


def generator(pair: str, seed: int, purpose: int) -> np.random.Generator:
    """Numbers that depend on nothing else: no seed's draws know of the other seeds in a run."""
    return np.random.default_rng((seed, list(PAIRS).index(pair), purpose))


def split(pair: str, seed: int, num_train: int, num_test: int) -> tuple[np.ndarray, np.ndarray]:
    """Training points `[2, num_train, 2]` and test points `[2, num_test, 2]`: source, target."""
    rng = generator(pair, seed, 0)
    points = np.stack([sampler(rng, num_train + num_test) for sampler in PAIRS[pair]])
    return points[:, :num_train].astype(np.float32), points[:, num_train:].astype(np.float32)


def independent(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """x0 as it was drawn."""
    del x1
    return x0


def exact(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
    """x0 `[batch, 2]` permuted so that sum_i |x0[i] - x1[i]|^2 is least.

    The squares add the same to every permutation, so the products are the cost.
    """
    _, columns = linear_sum_assignment(-(x1.astype(np.float64) @ x0.T.astype(np.float64)))
    return x0[columns]


def _draw(
    rng: np.random.Generator, pair: str, train: np.ndarray, num_steps: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fresh points of a Gaussian source, training points of any other: `[num_steps, batch, 2]`."""
    shape = (num_steps, batch_size)
    x1 = train[1][rng.integers(train.shape[1], size=shape)]
    if PAIRS[pair].source is gaussian:
        return rng.standard_normal((*shape, 2), np.float32), x1
    return train[0][rng.integers(train.shape[1], size=shape)], x1


def batches(
    pair: str,
    seeds: Sequence[int],
    trains: Sequence[np.ndarray],
    pairing: Pairing,
    *,
    num_steps: int,
    chunk_steps: int,
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of paired batches (x0, x1), each `[chunk_steps, seeds, batch, 2]` in float32.

    The pairing runs in threads on all cores: SciPy's assignment lets go of the interpreter, and a
    caller that dispatches a chunk before it asks for the next one trains meanwhile.
    """
    rngs = [generator(pair, seed, 1) for seed in seeds]
    with ThreadPoolExecutor() as pool:
        for begin in range(0, num_steps, chunk_steps):
            steps = min(chunk_steps, num_steps - begin)
            drawn = [
                _draw(rng, pair, train, steps, batch_size)
                for rng, train in zip(rngs, trains, strict=True)
            ]
            x0, x1 = (np.stack(x, axis=1) for x in zip(*drawn, strict=True))
            flat0, flat1 = (x.reshape(-1, batch_size, 2) for x in (x0, x1))
            x0 = np.stack(list(pool.map(pairing, flat0, flat1))).reshape(x0.shape)
            yield x0, x1


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    standard_error: float


def squared_distance(
    pair: Pair, rng: np.random.Generator, *, num_points: int = 500, num_draws: int = 64
) -> Estimate:
    """W_2^2 between the two distributions of a pair, from many small exact assignments.

    Between samples x, x' of one and y, y' of the other the mean of

        W_2^2(x, y) - (W_2^2(x, x') + W_2^2(y, y')) / 2

    is far less biased than its first term (Chizat et al. 2020, arXiv 2006.08172, on centring).
    """

    def centred(points: list[np.ndarray]) -> float:
        x, y, x_other, y_other = points
        own = wasserstein2(x, x_other) ** 2 + wasserstein2(y, y_other) ** 2
        return wasserstein2(x, y) ** 2 - own / 2.0

    draws = [[s(rng, num_points) for s in (*pair, *pair)] for _ in range(num_draws)]
    with ThreadPoolExecutor() as pool:
        values = np.array(list(pool.map(centred, draws)))
    return Estimate(float(values.mean()), float(values.std(ddof=1) / math.sqrt(num_draws)))
