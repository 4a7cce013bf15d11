"""The choices that the small experiments leave to their user: path, coupling, training times."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

import fmjax as fm
from fmjax.harness.config import mesh
from fmjax.training import sharding

PATHS = {"cond_ot": fm.cond_ot(), "cosine": fm.cosine(), "linear_vp": fm.linear_vp(), "vp": fm.vp()}
COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
TIMES = {"uniform": fm.uniform, "logit_normal": fm.logit_normal(), "edm_skewed": fm.edm_skewed()}
# The velocity's square has no mean over times up to 1 where the slope of sigma is infinite.
T_MAX = {"linear_vp": 0.999, "vp": 0.999}


@dataclasses.dataclass(frozen=True)
class Choices:
    """The flags of an experiment that leaves these choices to its user."""

    path: Literal["cond_ot", "cosine", "linear_vp", "vp"] = "cond_ot"
    """Conditional path from noise to data."""
    coupling: Literal["independent", "minibatch_ot"] = "independent"
    """How noise and data are paired within a batch."""
    times: Literal["uniform", "logit_normal", "edm_skewed"] = "uniform"
    """Density of the training times."""


class Chosen(NamedTuple):
    """What the flags name.

    Attributes:
      path: the conditional path.
      coupling: `(key, x0, x1) -> x0`.
      times: `(key, shape) -> t`.
    """

    path: fm.AffinePath
    coupling: fm.Coupling
    times: fm.TimeSampler


def choose(config: Any) -> Chosen:
    """The path, the coupling and the times that the flags of a run name.

    Args:
      config: a `RunConfig` that is a `Choices` too.
    """
    pair, draw_times = COUPLINGS[config.coupling], TIMES[config.times]

    def coupling(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        if config.coupling != "independent":
            # Replicated: the assignment is a loop, which would talk between them every turn.
            x0, x1 = jax.lax.with_sharding_constraint((x0, x1), sharding.replicated(mesh(config)))
        return pair(key, x0, x1)

    def times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return T_MAX.get(config.path, 1.0) * draw_times(key, shape)

    return Chosen(PATHS[config.path], coupling, times)
