"""A pool of pairs larger than the batch: paired once, trained on for many steps.

The pairs of n points are nearer to the optimal transport of the distributions the larger n is,
while a network learns as well from batches of a usual size. So n rows of the data are paired with n
rows of a bank of noise in one go, and cut into batches. Pool number p takes the key
`fold_in(key, p)`: any pool can be made again, and a run that resumes makes the one it was in.

Source: Zhang et al. 2025, arXiv 2506.05526 (large n).
"""

from typing import Any

import jax

from ..types import Coupling, as_batch, check_same_shape, kind
from .points import draw_source


def pair_pool(
    key: jax.Array,
    coupling: Coupling,
    source: Any,
    x1: jax.Array,
    batch_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Pairs a pool and cuts it into batches, which a `jax.lax.scan` of steps can take.

    Args:
      key: random key of this pool.
      coupling: `(key, x0, x1) -> x0`.
      source: the `fmjax.Source` of the noise, `standard_normal((2,))` say.
      x1: data, `[num_batches * batch_size, *event]`, in random order: batches are consecutive
        rows. Labels are cut as x1 is, by `labels.reshape(-1, batch_size)`.
      batch_size: pairs in a batch.

    Returns:
      `(x0, x1)`, each `[num_batches, batch_size, *event]`.

    Raises:
      ValueError: if `batch_size` doesn't divide the pool or the source is none; as the coupling
        does.

    Example:
      >>> from fmjax import minibatch_ot, standard_normal
      >>> key_data, key_pool = jax.random.split(jax.random.key(0))
      >>> x1 = 3 + jax.random.normal(key_data, (12, 2))
      >>> x0, x1 = pair_pool(key_pool, minibatch_ot, standard_normal((2,)), x1, batch_size=4)
      >>> x0.shape
      (3, 4, 2)
    """
    x1 = as_batch("x1", x1)
    whole = isinstance(batch_size, int) and batch_size >= 1
    if not (whole and len(x1) and len(x1) % batch_size == 0):
        raise ValueError(
            f"batch_size must divide the pool; got {batch_size} for a pool of {len(x1)}."
        )
    key_source, key_pair = jax.random.split(key)
    x0 = coupling(key_pair, draw_source(source, key_source, len(x1)), x1)
    if isinstance(x0, tuple):
        raise ValueError(
            f"coupling must return x0; got {kind(x0)}, a Pairing's rows. Take them of x0 and x1."
        )
    check_same_shape("What the coupling returns and x1", x0, x1)
    batches = (-1, batch_size, *x1.shape[1:])
    return x0.reshape(batches), x1.reshape(batches)
