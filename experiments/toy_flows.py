"""The networks of `experiments.toy_table`: training all seeds of a cell in parallel, and solving.

The path energy E int_0^1 |v(t, x_t)|^2 dt rides along in the solve, as a third coordinate e with
de/dt = |v(t, x)|^2 and e(0) = 0: it is integrated by the very steps that move x.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from diffrax import Euler

import fmjax as fm
from experiments import toy_data
from fmjax import models, training

METHODS = {"OT-CFM": toy_data.exact, "I-CFM": toy_data.independent, "FM": toy_data.independent}


class Method(NamedTuple):
    """What differs between the methods of the table.

    Attributes:
      pairing: of a batch, by NumPy, ahead of the steps.
      loss: `(params, key, (x0, x1)) -> []`.
      velocity: `(params, t, x) -> u`, whose flow makes samples.
      dim: the network's channels.
      times: between which the flow is solved.
    """

    pairing: toy_data.Pairing
    loss: Callable[[Any, jax.Array, tuple[jax.Array, jax.Array]], jax.Array]
    velocity: Callable[[Any, jax.Array, jax.Array], Any]
    dim: int = 2
    times: tuple[float, float] = (0.0, 1.0)


MODEL = models.MLP(features=(64, 64, 64), activation=nn.selu)
TX = optax.adamw(1e-3, weight_decay=1e-5)


def init(key: jax.Array, dim: int = 2) -> training.TrainState:
    return training.init_train_state(MODEL.init(key, jnp.zeros(()), jnp.zeros((1, dim))), TX)


def draw(method: str, sigma: float, key: jax.Array, x0: jax.Array, x1: jax.Array) -> fm.PathSample:
    """Times and points on a method's path; the formulas stand in `experiments.toy_table`."""
    key_t, key_noise = jax.random.split(key)
    t = fm.uniform(key_t, x1.shape[:1])
    if method == "FM":
        return fm.sample_path(fm.cond_ot(sigma_min=sigma), x0, x1, t)
    sample = fm.sample_path(fm.cond_ot(), x0, x1, t)
    return sample._replace(x_t=sample.x_t + sigma * jax.random.normal(key_noise, x1.shape))


@functools.cache
def mean_loss(method: str, sigma: float) -> Callable[..., jax.Array]:
    def loss(params: Any, key: jax.Array, pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        velocity = functools.partial(MODEL.apply, params)
        return jnp.mean(fm.cfm_loss(velocity, draw(method, sigma, key, *pair)))

    return loss


def make(name: str, sigma: float) -> Method:
    """A method of the table, at this noise."""
    path = "FM" if name == "FM" else "I-CFM"  # OT-CFM differs in its pairs: one program less
    return Method(METHODS[name], mean_loss(path, sigma), MODEL.apply)


@functools.partial(jax.jit, static_argnames="loss", donate_argnums=0)
def run_chunk(
    states: training.TrainState, keys: jax.Array, chunk: Any, *, loss: Callable[..., jax.Array]
) -> tuple[training.TrainState, jax.Array]:
    """Steps of all seeds: states and keys `[seeds]`, chunk (x0, x1) `[steps, seeds, batch, 2]`."""
    step = training.make_train_step(loss, TX, ema_decay=0.0)  # no moving average

    def body(states: training.TrainState, batch: Any) -> tuple[training.TrainState, jax.Array]:
        states, metrics = jax.vmap(step)(states, keys, batch)
        return states, metrics.loss

    return jax.lax.scan(body, states, chunk)


def train(
    seeds: Sequence[int], chunks: Iterable[tuple[Any, Any]], method: Method
) -> tuple[Any, np.ndarray]:
    """Trains one network per seed, all in one program along a leading axis.

    Returns:
      The last parameters, stacked over seeds, and the losses `[num_steps, seeds]`.
    """
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(jnp.array(seeds))
    states = jax.jit(jax.vmap(functools.partial(init, dim=method.dim)))(keys[:, 0])
    losses = []
    for chunk in chunks:
        # It returns before it is done, and the next chunk is paired while this one trains.
        states, chunk_losses = run_chunk(states, keys[:, 1], chunk, loss=method.loss)
        losses.append(chunk_losses)
    return states.params, np.concatenate([np.asarray(chunk) for chunk in losses])


def solve(
    velocity: fm.Velocity,
    x0: jax.Array,
    *,
    times: tuple[float, float] = (0.0, 1.0),
    num_steps: int = 100,
) -> jax.Array:
    """Euler's trajectory of (x, e), `[num_steps + 1, batch, 3]`, from x0 `[batch, 2]`."""

    def augmented(t: jax.Array, state: jax.Array) -> jax.Array:
        u = velocity(t, state[:, :-1])
        return jnp.concatenate([u, jnp.sum(u**2, axis=1, keepdims=True)], axis=1)

    state = jnp.concatenate([x0, jnp.zeros_like(x0[:, :1])], axis=1)
    ts = jnp.linspace(*times, num_steps + 1)
    return fm.integrate(
        augmented, state, t0=times[0], t1=times[1], ts=ts, solver=Euler(), num_steps=num_steps
    ).x


@functools.partial(jax.jit, static_argnames=("velocity", "times"))
def solve_all(
    params: Any,
    x0: jax.Array,
    *,
    velocity: Callable[[Any, jax.Array, jax.Array], Any],
    times: tuple[float, float],
) -> jax.Array:
    """`[seeds, 101, batch, 3]`, from stacked parameters and x0 `[seeds, batch, 2]`."""
    return jax.vmap(lambda params, x0: solve(functools.partial(velocity, params), x0, times=times))(
        params, x0
    )
