"""A solve that can't arrive: what is said of it, and how a running program says it."""

from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np

from ..types import is_concrete


def stopped(max_steps: int, reached: Any, ran_out: Any) -> str:
    """What can be said of a solve that stopped at the time `reached`."""
    why = (
        f"max_steps = {max_steps} were taken. Raise max_steps or loosen the tolerance."
        if ran_out
        else "the state, the velocity or an end of the interval is not finite there, or the step "
        "shrank to nothing. Check the velocity at that time; a path that is singular at an end "
        "needs t0 or t1 moved inwards."
    )
    return f"The solve stopped at t = {reached:.6g}: {why}"


def raise_if(failed: jax.Array, y: Any, message: Callable[..., str], *numbers: jax.Array) -> Any:
    """`y`, or where `failed` holds a RuntimeError of `message(*numbers)`, at run time under jit.

    Where a platform's programs can't raise, y becomes NaN. Of a batch under `jax.vmap` the largest
    of each number is named.
    """
    failed, numbers = jax.lax.stop_gradient((failed, numbers))
    if is_concrete(failed, *numbers):
        if failed:
            raise RuntimeError(message(*(number.item() for number in numbers)))
        return y

    def fail(*numbers: Any) -> np.ndarray:
        raise RuntimeError(message(*(np.asarray(number).item() for number in numbers)))

    numbers = tuple(eqxi.unvmap_max(_where_failed(failed, number)) for number in numbers)
    failed = eqxi.unvmap_any(failed)
    raised = jax.lax.cond(
        failed,
        lambda: jax.pure_callback(fail, jax.ShapeDtypeStruct((), bool), *numbers),
        lambda: jnp.zeros((), bool),
    )
    failed |= raised  # what comes back depends on the callback, which is not left out then

    def poisoned(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.where(failed, jnp.nan if floating else leaf, leaf)

    return jax.tree.map(poisoned, y)


def _where_failed(failed: jax.Array, number: jax.Array) -> jax.Array:
    """`number`, but below all others where nothing failed."""
    if number.dtype == bool:
        return number & failed
    info = jnp.finfo if jnp.issubdtype(number.dtype, jnp.floating) else jnp.iinfo
    return jnp.where(failed, number, info(number.dtype).min)
