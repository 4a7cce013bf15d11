"""Pairs of cells from plans between whole snapshots, which are finite sets.

The plan P of neighbouring snapshots is solved once (`fm.couplings.entropic_plan`), and pairs (i, j)
are drawn with probability P_ij / sum P. With tau0 infinite it is the entropic plan. A finite tau0
keeps the weights of the later cells and lets the earlier ones have the mass that suits them: the
sum of row i over its weight is what cell i grew to, 0 where it died.

Source: Chizat et al. 2016, arXiv 1607.05816.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax.tasks.snapshots import Snapshots

THRESHOLD = 1e-2  # by which the marginals may be wrong, summed
MAX_ITERATIONS = 20_000


class Plan(NamedTuple):
    """A plan between some cells of two snapshots.

    Attributes:
      rows0, rows1: which cells, `[n]` and `[m]`.
      mass: `[n, m]`.
    """

    rows0: np.ndarray
    rows1: np.ndarray
    mass: np.ndarray


def planned(
    snapshots: Snapshots, epsilon: float, tau0: float, *, most: int, num: int, seed: int
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """`num` pairs of the plans of `solve_plans`, and `growth` by them."""
    plans = solve_plans(snapshots, epsilon, tau0, most=most, seed=seed)
    return pairs_of_plans(snapshots, plans, num, seed), growth(snapshots, plans)


def solve_plans(
    snapshots: Snapshots, epsilon: float, tau0: float, *, most: int, seed: int
) -> list[Plan]:
    """The plan of every interval, between at most `most` cells of each of its snapshots.

    Args:
      snapshots: the cells.
      epsilon: weight of the entropy, in units of |x0 - x1|^2.
      tau0: cost of changing the weights of the earlier cells, in that unit; infinite keeps them.
      most: larger snapshots are thinned at random.
      seed: of the thinning.
    """
    rng, plans = np.random.default_rng((seed, 1)), []
    rows = [np.sort(rng.permutation(len(snapshots.cells[k]))[:most]) for k in snapshots.trained_on]
    cells = [snapshots.cells[k][r] for k, r in zip(snapshots.trained_on, rows, strict=True)]
    for k in range(len(rows) - 1):
        mass = fm.couplings.entropic_plan(
            jnp.asarray(cells[k]), jnp.asarray(cells[k + 1]), epsilon, tau0=tau0,
            threshold=THRESHOLD, max_iterations=MAX_ITERATIONS,
        )  # fmt: skip
        plans.append(Plan(rows[k], rows[k + 1], np.asarray(mass, np.float64)))
    return plans


def pairs_of_plans(snapshots: Snapshots, plans: list[Plan], num: int, seed: int) -> np.ndarray:
    """Pairs `[num, intervals, 2, D]`, each of an interval with the probability P_ij / sum P."""
    rng, columns = np.random.default_rng((seed, 2)), []
    for k, plan in zip(snapshots.trained_on, plans, strict=False):
        after = snapshots.trained_on[snapshots.trained_on.index(k) + 1]
        sums = np.cumsum(plan.mass)
        drawn = np.searchsorted(sums, rng.uniform(size=num) * sums[-1], side="right")
        i, j = np.divmod(np.minimum(drawn, plan.mass.size - 1), plan.mass.shape[1])
        starts, stops = snapshots.cells[k][plan.rows0[i]], snapshots.cells[after][plan.rows1[j]]
        columns.append(np.stack([starts, stops], axis=1))
    return np.stack(columns, axis=1)


def growth(snapshots: Snapshots, plans: list[Plan]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the cells before the left-out time, and what each grows to by the next time."""
    plan = plans[snapshots.trained_on.index(snapshots.left_out - 1)]
    return plan.rows0, plan.mass.sum(1) * len(plan.rows0)
