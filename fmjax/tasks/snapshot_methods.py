"""How the cells of neighbouring snapshots are paired, and what is learned between them.

    i-cfm           cells of neighbouring times paired independently; one velocity, on lines
    ot-cfm          paired within the batch by exact optimal transport
    unbalanced      pairs of a plan between whole snapshots, in which earlier cells may grow or die
    sf2m-exact      pairs as in ot-cfm; two fields, on Brownian bridges
    sf2m-entropic   pairs of the entropic plan between whole snapshots at epsilon = 2 sigma^2

Sources: Tong et al. 2023, arXiv 2302.00482 (I-CFM, OT-CFM) and 2307.03672 (SF2M).
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import numpy as np

import fmjax as fm
from fmjax.tasks import intervals, snapshot_plans, snapshots

PLANNED = ("unbalanced", "sf2m-entropic")


@dataclasses.dataclass(frozen=True)
class MethodConfig(snapshots.SnapshotConfig):
    """The flags of an experiment on snapshots that lets its user choose the method."""

    method: Literal["i-cfm", "ot-cfm", "unbalanced", "sf2m-exact", "sf2m-entropic"] = "ot-cfm"
    """How cells of neighbouring times are paired, and what is learned."""
    sigma: float | None = None
    """Noise, in the unit of the coordinates: on lines 0.1, of bridges 0.5 without it."""
    epsilon: float = 0.5
    """Entropy of the unbalanced plan, in units of |x0 - x1|^2."""
    tau: float = 5.0
    """What it costs there to change a cell's weight, likewise."""
    plan_cells: int = 1000
    """Cells of a time, at most, between which plans are solved."""


def make_pairs(config: MethodConfig, data: snapshots.Snapshots) -> tuple[np.ndarray, Any]:
    """Pairs to draw batches from, and what the cells before the left-out time grew to, or None."""
    if config.method not in PLANNED:
        return snapshots.in_step(data, config.seed), None
    entropic = config.method == "sf2m-entropic"
    cost = (2 * noise(config) ** 2, math.inf) if entropic else (config.epsilon, config.tau)
    num, most = 32 * data.facts["num_examples"], config.plan_cells
    pairs, grown = snapshot_plans.planned(data, *cost, most=most, num=num, seed=config.seed)
    return pairs, None if entropic else grown


def make_method(
    config: MethodConfig, data: snapshots.Snapshots, model: nn.Module
) -> intervals.Method:
    """The method of the flags, of a network `(t, x) -> u` of any width of x."""
    coupling = fm.minibatch_ot if config.method in ("ot-cfm", "sf2m-exact") else fm.independent
    coupling = fm.independent if config.method in PLANNED else intervals.shuffled(coupling)
    learn = intervals.on_bridges if config.method.startswith("sf2m") else intervals.on_lines
    return learn(data, model, coupling, noise(config))


def noise(config: MethodConfig) -> float:
    """sigma, the usual one without the flag."""
    usual = 0.5 if config.method.startswith("sf2m") else 0.1
    return usual if config.sigma is None else config.sigma
