"""Run folders of networks that have learnt nothing."""

import functools

import jax
import jax.numpy as jnp

from experiments import trained
from fmjax.harness import step
from fmjax.harness.run import Run


def untrained(config, event_shape, name):
    """A run folder with a checkpoint of a network that has learnt nothing; its average differs."""
    model = trained._model(config, 10)
    init = functools.partial(model.init, t=jnp.zeros(()), x=jnp.zeros((1, *event_shape)))
    state = step.init_state(config, init, jax.random.key(0), step.make_optimizer(config))
    key = jax.random.key(1)  # the last layer of a U-Net begins at zero
    moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(key, x.shape), state.params)
    with Run(name, config) as run:
        run.restore(state)  # nothing is there yet; it begins the folder's record
        run.save(state._replace(ema_params=moved, step=jnp.asarray(30)), wait=True)
    return config.workdir
