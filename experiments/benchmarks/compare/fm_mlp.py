"""fmjax's side of the small network's training: torchcfm's MLP, its data drawn on the way."""

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
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al., 1706.02515


def selu(x: jax.Array) -> jax.Array:
    """`jax.nn.selu` with exp(x) - 1 for expm1(x), which is dearer; they differ by rounding at 1."""
    negative = jnp.exp(jnp.where(x > 0, 0, x)) - 1
    return SELU_SCALE * jnp.where(x > 0, x, SELU_ALPHA * negative)


class ExamplesLast(nn.Module):
    """`flax.linen.Dense` from `[in, batch]` to `[features, batch]`.

    So the kernel's gradient is a product whose right side is transposed, for which XLA on a CPU has
    a fast routine; where the left side is, as with the examples first, it has none.
    """

    features: int

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        init = nn.initializers
        kernel = self.param("kernel", init.lecun_normal(), (h.shape[0], self.features))
        bias = self.param("bias", init.zeros, (self.features,))
        return kernel.T @ h + bias[:, None]


class MLP(nn.Module):
    """torchcfm's network: time beside the coordinates, SELU unless another is asked for."""

    activation: Any = selu
    examples_last: bool = False  # quicker to train, slower with tangents

    @nn.compact
    def __call__(self, t: jax.Array, x: jax.Array) -> jax.Array:
        dense = ExamplesLast if self.examples_last else nn.Dense
        t = jnp.broadcast_to(jnp.reshape(t, (-1, 1)), (x.shape[0], 1))
        h = jnp.concatenate([x, t.astype(x.dtype)], axis=1)
        h = h.T if self.examples_last else h
        for n, width in enumerate(LAYERS[1:-1]):
            h = self.activation(dense(width, name=f"Dense_{n}")(h))
        u = dense(LAYERS[-1], name=f"Dense_{len(LAYERS) - 2}")(h)
        return u.T if self.examples_last else u


def moons(key: jax.Array, num: int) -> jax.Array:
    key_angle, key_upper, key_noise = jax.random.split(key, 3)
    angle = math.pi * jax.random.uniform(key_angle, (num,))
    upper = jax.random.bernoulli(key_upper, 0.5, (num,))
    x = jnp.where(upper, jnp.cos(angle), 1 - jnp.cos(angle))
    y = jnp.where(upper, jnp.sin(angle), 0.5 - jnp.sin(angle))
    return 3 * jnp.stack([x, y], axis=1) - 1 + 0.6 * jax.random.normal(key_noise, (num, 2))


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step's noise, data and times."""
    key_x1, key_x0, key_t = jax.random.split(key, 3)
    x0 = jax.random.normal(key_x0, (BATCH, 2))
    return x0, moons(key_x1, BATCH), fm.uniform(key_t, (BATCH,))


def make_step(model: MLP) -> tuple[training.TrainState, training.TrainStep]:
    def loss_fn(params: Any, key: jax.Array, batch: tuple[jax.Array, ...]) -> jax.Array:
        path_sample = fm.sample_path(fm.cond_ot(), *batch)
        return jnp.mean(fm.cfm_loss(functools.partial(model.apply, params), path_sample))

    tx = training.adam(1e-3)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 2)))
    return training.init_train_state(params, tx), training.make_train_step(loss_fn, tx)


def train(state: training.TrainState, step: training.TrainStep, key: jax.Array, num: int) -> Any:
    """`num` steps in one dispatch: the last state and all metrics.

    All that they draw is drawn at once: one by one, the random bits cost an eighth of the time.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(state.step + jnp.arange(num))
    batches = jax.vmap(draw)(keys)
    return jax.lax.scan(lambda state, batch: step(state, key, batch), state, batches)


def training_case(steps_per_dispatch: int) -> Case:
    state, step = make_step(MLP(examples_last=True))
    key = jax.random.key(1)
    many = functools.partial(train, step=step, key=key, num=steps_per_dispatch)
    advance = jax.jit(many, donate_argnums=0)

    def run() -> None:
        nonlocal state
        for _ in range(STEPS // steps_per_dispatch):
            state, _ = advance(state)
        jax.block_until_ready(state)

    return timed(run, STEPS)


def training_cases(options: Options) -> dict[str, Case]:
    del options
    return {"one": training_case(1), "hundred": training_case(100)}
