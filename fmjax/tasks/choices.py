"""The choices that an experiment's flags name: paths, couplings, training times."""

import jax

import fmjax as fm
from fmjax.harness.config import RunConfig, mesh
from fmjax.training import sharding

PATHS = {"cond_ot": fm.cond_ot(), "cosine": fm.cosine(), "linear_vp": fm.linear_vp(), "vp": fm.vp()}
COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
TIMES = {"uniform": fm.uniform, "logit_normal": fm.logit_normal(), "edm_skewed": fm.edm_skewed()}
# The velocity's square has no mean over times up to 1 where the slope of sigma is infinite.
T_MAX = {"linear_vp": 0.999, "vp": 0.999}


def draw_path_sample(config: RunConfig, key: jax.Array, x1: jax.Array) -> fm.PathSample:
    """Noise, its pairing with the data, times and the point on the path, as the flags say.

    Args:
      config: the run's flags.
      key: random key.
      x1: data, `[batch, *event]`.
    """
    key_x0, key_pair, key_t = jax.random.split(key, 3)
    x0 = jax.random.normal(key_x0, x1.shape)
    if config.coupling != "independent":
        # Replicated: the assignment is a loop, which would talk between them every turn.
        x0, x1 = jax.lax.with_sharding_constraint((x0, x1), sharding.replicated(mesh(config)))
    x0 = COUPLINGS[config.coupling](key_pair, x0, x1)
    t = T_MAX.get(config.path, 1.0) * TIMES[config.times](key_t, x1.shape[:1])
    return fm.sample_path(PATHS[config.path], x0, x1, t)
