"""fmjax's side of the small network's training: torchcfm's MLP, its data drawn in the step."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import fmjax as fm
from experiments.benchmarks.compare.points import LAYERS
from experiments.benchmarks.compare.workers import Case, Options, timed
from fmjax import training

BATCH, STEPS = 256, 500


class MLP(nn.Module):
    """torchcfm's network: time beside the coordinates, SELU unless another is asked for."""

    activation: Any = nn.selu

    @nn.compact
    def __call__(self, t: jax.Array, x: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (x.shape[0], 1))
        h = jnp.concatenate([x, t.astype(x.dtype)], axis=1)
        for width in LAYERS[1:-1]:
            h = self.activation(nn.Dense(width)(h))
        return nn.Dense(LAYERS[-1])(h)


def moons(key: jax.Array, num: int) -> jax.Array:
    key_angle, key_upper, key_noise = jax.random.split(key, 3)
    angle = math.pi * jax.random.uniform(key_angle, (num,))
    upper = jax.random.bernoulli(key_upper, 0.5, (num,))
    x = jnp.where(upper, jnp.cos(angle), 1 - jnp.cos(angle))
    y = jnp.where(upper, jnp.sin(angle), 0.5 - jnp.sin(angle))
    return 3 * jnp.stack([x, y], axis=1) - 1 + 0.6 * jax.random.normal(key_noise, (num, 2))


def make_step(model: MLP) -> tuple[training.TrainState, training.TrainStep]:
    def loss_fn(params: Any, key: jax.Array, batch: None) -> jax.Array:
        key_x1, key_x0, key_t = jax.random.split(key, 3)
        x1, x0 = moons(key_x1, BATCH), jax.random.normal(key_x0, (BATCH, 2))
        path_sample = fm.sample_path(fm.cond_ot(), x0, x1, fm.uniform(key_t, (BATCH,)))
        return jnp.mean(fm.cfm_loss(functools.partial(model.apply, params), path_sample))

    tx = training.adam(1e-3)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 2)))
    return training.init_train_state(params, tx), training.make_train_step(loss_fn, tx)


def train(state: training.TrainState, step: training.TrainStep, key: jax.Array, num: int) -> Any:
    """`num` steps in one dispatch: the last state and all metrics."""
    return jax.lax.scan(lambda state, _: step(state, key, None), state, length=num)


def training_case(steps_per_dispatch: int) -> Case:
    state, step = make_step(MLP())
    key = jax.random.key(1)
    many = jax.jit(functools.partial(train, step=step, key=key, num=steps_per_dispatch))
    one = jax.jit(lambda state: step(state, key, None))
    advance = jax.jit(one if steps_per_dispatch == 1 else many, donate_argnums=0)

    def run() -> None:
        nonlocal state
        for _ in range(STEPS // steps_per_dispatch):
            state, _ = advance(state)
        jax.block_until_ready(state)

    return timed(run, STEPS)


def training_cases(options: Options) -> dict[str, Case]:
    del options
    return {"one": training_case(1), "hundred": training_case(100)}
