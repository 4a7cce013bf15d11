"""fmjax's side of the CIFAR-10 U-Net: one training step, and one evaluation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments.benchmarks.compare.points import BATCH
from experiments.benchmarks.compare.workers import Case, Options, share_arena, timed
from fmjax import models, training
from fmjax.models import cpu

SHAPE = (BATCH, 32, 32, 3)


def network() -> models.UNet:
    return models.cifar10_unet().clone(kernels=cpu.KERNELS)


def batch() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32))


def init(model: models.UNet) -> Any:
    image = jnp.zeros((1, *SHAPE[1:]))
    return jax.jit(lambda key: model.init(key, jnp.zeros(()), image))(jax.random.key(0))


def make_step(model: models.UNet) -> tuple[Any, Any]:
    """The optimiser and the jitted step of torchcfm's script, dropout included."""

    def loss_fn(params: Any, key: jax.Array, x1: jax.Array) -> jax.Array:
        key_x0, key_t, key_dropout = jax.random.split(key, 3)
        x0, t = jax.random.normal(key_x0, x1.shape), fm.uniform(key_t, x1.shape[:1])
        velocity = functools.partial(
            model.apply, params, deterministic=False, rngs={"dropout": key_dropout}
        )
        return jnp.mean(fm.cfm_loss(velocity, fm.sample_path(fm.cond_ot(), x0, x1, t)))

    tx = training.adam(2e-4, warmup_steps=5000, clip_norm=1.0)
    step = training.make_train_step(loss_fn, tx, ema_decay=0.9999)
    return tx, jax.jit(step, donate_argnums=0)


def training_cases(options: Options) -> dict[str, Case]:
    del options
    share_arena()
    model, x1, key = network(), batch(), jax.random.key(1)
    params = init(model)
    tx, step = make_step(model)
    state = training.init_train_state(params, tx)

    def run() -> None:
        nonlocal state
        state, _ = step(state, key, x1)
        jax.block_until_ready(state)

    return {"jit": timed(run, BATCH, facts=lambda: {"parameters": _size(params)})}


def forward_cases(options: Options) -> dict[str, Case]:
    del options
    share_arena()
    model, x, t = network(), batch(), jnp.full(BATCH, 0.5)
    params = init(model)
    apply = jax.jit(model.apply)

    def run() -> None:
        jax.block_until_ready(apply(params, t, x))

    return {"jit": timed(run, BATCH, facts=lambda: {"parameters": _size(params)})}


def _size(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
