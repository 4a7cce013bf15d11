"""The ways to train an average velocity: which pairs of times each draws, and its loss.

All of them train one network U(t, s, x), s >= t, with x_s = x_t + (s - t) U; `fmjax.flow_maps` has
their mathematics. What is chosen here are the published recipes' pairs of times and weights:

    flow_matching         s = t: the common flow, and what more of it buys
    mean_flow             logit_normal(0.6, 1.6) to logit_normal(4, 1.6), a quarter s = t
    improved_mean_flow    two of logit_normal(0.4, 1), half s = t; along the network's own velocity
    alpha_flow            as mean_flow; alpha falls from 1 to 0.01 along a sigmoid in the step
    shortcut              a quarter of the batch has s - t = 2^-k, k = 0..6, at multiples of it; the
                          halves of the shortest are taken at s = t
    terminal_velocity     two uniform times; flow matching at t beside it
    consistency           the map to s = 1 alone, from ECT's pairs of neighbouring times, in five
                          stages for runs that are shorter than ECT's; the distance unsquared

The losses of mean_flow, improved_mean_flow and alpha_flow are weighted by themselves, to the power
.75. A network that knows the map to the data alone draws in several steps by going back to noisier
times; the others take n equal steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fmjax as fm
from fmjax import flow_maps

PATH = fm.cond_ot()
LOWEST_ALPHA = 0.01
POWERS = 7  # of two, from 2^0 to 2^-6: the shortcut's horizons
STAGES = 5  # of consistency's pairs


class Drawn(NamedTuple):
    """What is random about a batch.

    Attributes:
      x0, x1: source and data, `[batch, *event]`.
      t, s: times, `[batch]`, s >= t.
      labels: `[batch]`, or None for a network without classes.
    """

    x0: jax.Array
    x1: jax.Array
    t: jax.Array
    s: jax.Array
    labels: Any = None


class Method(NamedTuple):
    """One way to train an average velocity.

    Attributes:
      pairs: `(key, shape, progress) -> TimePair`; progress goes from 0 to 1 with the steps.
      loss: `(average_velocity, drawn, progress) -> [batch]`.
      sample: `(key, average_velocity, x0, num_steps) -> x1`, its way to draw in few steps.
      anneals: whether pairs or loss depend on the progress.
    """

    pairs: Callable[[jax.Array, tuple[int, ...], jax.Array], flow_maps.TimePair]
    loss: Callable[[flow_maps.AverageVelocity, Drawn, jax.Array], jax.Array]
    sample: Callable[[jax.Array, flow_maps.AverageVelocity, jax.Array, int], jax.Array]
    anneals: bool = False


def path_sample(drawn: Drawn) -> fm.PathSample:
    """The point at t on the straight path from x0 to x1."""
    return fm.sample_path(PATH, drawn.x0, drawn.x1, drawn.t)


def equal_steps(
    key: jax.Array, average_velocity: flow_maps.AverageVelocity, x0: jax.Array, num_steps: int
) -> jax.Array:
    """x1 in `num_steps` equal steps."""
    del key
    return flow_maps.sample_steps(average_velocity, x0, jnp.linspace(0.0, 1.0, num_steps + 1))


def renoised(
    key: jax.Array, average_velocity: flow_maps.AverageVelocity, x0: jax.Array, num_steps: int
) -> jax.Array:
    """x1 in `num_steps` jumps to the data, each but the first from fresh noise at its time."""
    ts = jnp.linspace(0.0, 1.0, num_steps + 1)
    return flow_maps.sample_renoised(key, average_velocity, PATH, x0, ts)


def _weighted(loss: jax.Array, x: jax.Array) -> jax.Array:
    """py-meanflow's weight: its epsilon of 1e-3 is of the sum over the event."""
    return flow_maps.adaptive_weight(loss, power=0.75, epsilon=1e-3 / x[0].size)


def _pairs(times: Callable[..., flow_maps.TimePair]) -> Callable[..., flow_maps.TimePair]:
    return lambda key, shape, progress: times(key, shape)


_TOWARDS_DATA = flow_maps.ordered_times(
    fm.logit_normal(0.6, 1.6), fm.logit_normal(4.0, 1.6), equal=0.25
)
_IN_THE_MIDDLE = flow_maps.ordered_times(
    fm.logit_normal(0.4, 1.0), fm.logit_normal(0.4, 1.0), equal=0.5, order=flow_maps.sort_times
)
_ANYWHERE = flow_maps.ordered_times(fm.uniform, fm.uniform, equal=0.0, order=flow_maps.sort_times)


def _same_times(key: jax.Array, shape: tuple[int, ...], progress: jax.Array) -> Any:
    del progress
    t = fm.uniform(key, shape)
    return flow_maps.TimePair(t, t)


def _dyadic_pairs(key: jax.Array, shape: tuple[int, ...], progress: jax.Array) -> Any:
    """Of a quarter the horizon is 2^-k and t a multiple of it; of the others s = t."""
    del progress
    key_t, key_power, key_cell, key_share = jax.random.split(key, 4)
    power = jax.random.randint(key_power, shape, 0, POWERS)
    horizon = jnp.exp2(-power.astype(jnp.float32))
    cell = jax.random.randint(key_cell, shape, 0, 2**power)
    far = jax.random.uniform(key_share, shape) < 0.25
    t = jnp.where(far, cell * horizon, fm.uniform(key_t, shape))
    return flow_maps.TimePair(t, jnp.where(far, t + horizon, t))


def _consistency_pairs(key: jax.Array, shape: tuple[int, ...], progress: jax.Array) -> Any:
    """ECT's times, and the next ones, nearer by each stage."""
    t = flow_maps.ect_times()(key, shape)
    stage = jnp.minimum(jnp.floor(STAGES * progress), STAGES - 1)
    return flow_maps.TimePair(t, flow_maps.ect_next(t, stage))


def _flow_matching(average_velocity, drawn, progress):
    del progress
    return fm.cfm_loss(flow_maps.instantaneous(average_velocity), path_sample(drawn))


def _mean_flow(average_velocity, drawn, progress):
    del progress
    loss = flow_maps.mean_flow_loss(average_velocity, path_sample(drawn), drawn.s)
    return _weighted(loss, drawn.x1)


def _improved_mean_flow(average_velocity, drawn, progress):
    del progress
    velocity = flow_maps.instantaneous(average_velocity)
    loss = flow_maps.improved_mean_flow_loss(
        average_velocity, velocity, path_sample(drawn), drawn.s
    )
    return _weighted(loss, drawn.x1)


def falling_alpha(progress: jax.Array) -> jax.Array:
    """AlphaFlow's alpha, from 1 to `LOWEST_ALPHA` along a sigmoid."""
    return jnp.maximum(jax.nn.sigmoid(25 * (0.4 - progress)), LOWEST_ALPHA)


def _alpha_flow(average_velocity, drawn, progress):
    alpha = falling_alpha(progress)
    loss = flow_maps.alpha_flow_loss(average_velocity, path_sample(drawn), drawn.s, alpha)
    return alpha * _weighted(loss / alpha, drawn.x1)  # MeanFlow's weight as alpha falls


def _shortcut(average_velocity, drawn, progress):
    del progress

    def trained(t, s, x):
        """No example trains a horizon below the shortest."""
        return average_velocity(t, jnp.where(s - t < 2.0 ** (0.5 - POWERS), t, s), x)

    loss = flow_maps.alpha_flow_loss(trained, path_sample(drawn), drawn.s, 0.5, first=trained)
    return jnp.where(drawn.s > drawn.t, 0.5, 1.0) * loss  # where s > t it is twice the shortcut's


def _terminal_velocity(average_velocity, drawn, progress):
    del progress
    velocity, sample = flow_maps.instantaneous(average_velocity), path_sample(drawn)
    loss = flow_maps.terminal_velocity_loss(average_velocity, velocity, sample, drawn.s)
    return loss + fm.cfm_loss(velocity, sample)


def _consistency(average_velocity, drawn, progress):
    del progress
    loss = flow_maps.consistency_loss(average_velocity, PATH, drawn.x0, drawn.x1, drawn.t, drawn.s)
    # The distance itself, whose gradient does not fall as the times draw nearer.
    return flow_maps.ect_weight(drawn.t) * flow_maps.adaptive_weight(loss, power=0.5, epsilon=1e-12)


METHODS = {
    "flow_matching": Method(_same_times, _flow_matching, equal_steps),
    "mean_flow": Method(_pairs(_TOWARDS_DATA), _mean_flow, equal_steps),
    "improved_mean_flow": Method(_pairs(_IN_THE_MIDDLE), _improved_mean_flow, equal_steps),
    "alpha_flow": Method(_pairs(_TOWARDS_DATA), _alpha_flow, equal_steps, anneals=True),
    "shortcut": Method(_dyadic_pairs, _shortcut, equal_steps),
    "terminal_velocity": Method(_pairs(_ANYWHERE), _terminal_velocity, equal_steps),
    "consistency": Method(_consistency_pairs, _consistency, renoised, anneals=True),
}
