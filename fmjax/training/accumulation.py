"""Gradient accumulation: the mean over a batch, and its gradient, in parts, one after the other.

With N parts of B / N examples each, losses l_i and the key k_p = fold_in(key, p) of part p,

    (1 / B) sum_i l_i = (1 / N) sum_p (N / B) sum_{i in p} l_i(params, k_p),

and so is the gradient: a mean of equal-sized means is the mean. Only one part's activations are
held at a time, besides one sum of gradients.

Part p has the examples p, N + p, 2 N + p, ... of the batch. A device that holds B / D rows in
sequence holds B / (D N) of each part, so that nothing is sent, and which examples make a part does
not depend on the number of devices.

On a GPU or a TPU the parts are the turns of a loop. XLA's convolutions on a CPU are tens of times
slower inside of a loop, so there the parts are written out, each of which waits for the one before.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..types import at_least_float32
from .sharding import batch_sharding
from .step import LossFn

Losses = Callable[[Any, jax.Array, Any], jax.Array]  # (params, key, batch) -> `[batch]`


def mean_in_parts(losses: Losses, num_parts: int, mesh: Mesh) -> LossFn:
    """The mean of `losses` as a `LossFn` whose gradient is accumulated over parts of the batch.

    Sums are taken in at least float32. Its derivative is that with respect to the parameters, in
    reverse mode, once.

    Args:
      losses: `(params, key, batch) -> [batch]`, each of one example; `batch` is a pytree of arrays
        `[batch, ...]`. Each part has a key of its own, for dropout.
      num_parts: N.
      mesh: from `make_mesh`; each of its devices has its share of every part.

    Returns:
      `loss_fn(params, key, batch) -> []`, as `make_train_step` takes it.

    Raises:
      ValueError: by `loss_fn`, if the length of the batch is no multiple of N times the number of
        devices.

    Example:
      >>> from fmjax.training import sharding
      >>> mesh = sharding.make_mesh(jax.devices()[:1])
      >>> loss_fn = mean_in_parts(lambda params, key, x: (x - params) ** 2, 2, mesh)
      >>> x = jnp.arange(4.0)
      >>> loss, gradient = jax.value_and_grad(loss_fn)(jnp.zeros(()), jax.random.key(0), x)
      >>> float(loss), float(gradient)
      (3.5, -3.0)
    """

    def part_mean(params: Any, key: jax.Array, part: Any) -> jax.Array:
        return jnp.mean(losses(params, key, part))

    unrolled = _unrolled(mesh)

    def over_parts(function: Callable[..., Any], params: Any, key: jax.Array, batch: Any) -> Any:
        """The mean of `function(params, key, part)`, a pytree, over the parts."""

        def add(sums: Any, numbered: tuple[jax.Array, Any]) -> tuple[Any, None]:
            number, part = numbered
            waiting = _after(sums, params) if unrolled else params
            values = function(waiting, jax.random.fold_in(key, number), part)
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, values), None

        parts = jax.tree.map(lambda x: _split(x, num_parts, mesh), batch)
        numbered = (jnp.arange(num_parts), parts)
        first = jax.tree.map(lambda x: x[0], numbered)
        shapes = jax.eval_shape(lambda: function(params, key, first[1]))
        zeros = jax.tree.map(lambda x: at_least_float32(jnp.zeros(x.shape, x.dtype)), shapes)
        sums, _ = jax.lax.scan(add, zeros, numbered, unroll=unrolled)
        return jax.tree.map(lambda s, x: (s / num_parts).astype(x.dtype), sums, shapes)

    @jax.custom_vjp
    def loss_fn(params: Any, key: jax.Array, batch: Any) -> jax.Array:
        return over_parts(part_mean, params, key, batch)

    def forward(params: Any, key: jax.Array, batch: Any) -> tuple[jax.Array, Any]:
        return over_parts(jax.value_and_grad(part_mean), params, key, batch)

    def backward(gradients: Any, cotangent: jax.Array) -> tuple[Any, None, None]:
        return jax.tree.map(lambda g: (cotangent * g).astype(g.dtype), gradients), None, None

    loss_fn.defvjp(forward, backward)
    return loss_fn


def _unrolled(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def _after(sums: Any, params: Any) -> Any:
    """The parameters, once the sums are there; XLA drops a barrier before it orders a program."""
    nan = jnp.isnan(sum(jnp.ravel(s)[0] for s in jax.tree.leaves(sums) if s.size))
    return jax.tree.map(lambda p: jnp.where(nan, jnp.nan, p).astype(p.dtype), params)


def _split(x: jax.Array, num_parts: int, mesh: Mesh) -> jax.Array:
    """`[batch, ...]` as `[num_parts, batch / num_parts, ...]`, each part over all devices."""
    if len(x) % (num_parts * mesh.size):
        raise ValueError(
            "A batch in parts must be a multiple of parts x devices; got "
            f"{len(x)} examples for {num_parts} parts on {mesh.size} devices."
        )
    parts = jnp.swapaxes(x.reshape(-1, num_parts, *x.shape[1:]), 0, 1)
    return jax.lax.with_sharding_constraint(parts, batch_sharding(mesh, axis=1))
