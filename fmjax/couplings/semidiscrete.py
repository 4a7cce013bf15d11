"""Semidiscrete optimal transport: from all of the source to a finite data set.

One number g_j for each of the N data points cuts the source's space into cells,

    x0 -> the j of the largest g_j - |x0 - y_j|^2,

and that map is optimal between the source and whatever weights the cells have. They are 1 / N each
at the maximum of the dual

    F(g) = mean_j g_j + E_x0 min_j (|x0 - y_j|^2 - g_j),    dF/dg_j = 1 / N - P(x0 in cell j),

which is concave and climbed with fresh noise once, before training; epsilon > 0 softens the minimum
and the cells. In training a fresh x0 then finds its partner in one product with the data, with no
batch to be optimal in: the coupling is that of an infinite batch. It moves x1, not x0, so it is no
`Coupling` but its mirror, an `Assignment`.

Source: Genevay et al. 2016, arXiv 1605.08527; Mousavi-Hosseini et al. 2025, arXiv 2509.25519.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from ..types import as_array, as_batch, at_least_float32, kind, known_number
from .points import draw_source


class Assignment(Protocol):
    """`assignment(key, x0) -> rows1 [batch]`: each noise's row of the data, int32."""

    def __call__(self, key: jax.Array, x0: jax.Array, /) -> jax.Array: ...


def semidiscrete_potential(
    key: jax.Array,
    data: jax.Array,
    source: Any,
    *,
    epsilon: float = 0.0,
    num_steps: int = 2000,
    batch_size: int = 1024,
    learning_rate: float = 0.03,
) -> jax.Array:
    """The potential g of the data, by stochastic ascent of the dual.

    Adam under a cosine decay to zero, and the mean over the last tenth of the steps. Whether that
    was long enough is seen in how often `semidiscrete` chooses each row: chi^2 = mean_j (N p_j -
    1)^2 is zero for equal weights. Time and memory of a step: one product `[batch_size, N]`. The
    caller jits it.

    Args:
      key: random key.
      data: `[N, *event]`, floating.
      source: the `fmjax.Source` that x0 is drawn from in training too, `standard_normal((2,))` say.
      epsilon: as in `semidiscrete`.
      num_steps: of the ascent; more for more data.
      batch_size: noise drawn in a step.
      learning_rate: of Adam, as a share of the standard deviation of the costs.

    Returns:
      g, `[N]`, in at least float32, of mean zero. NaN where the data hold a NaN or an infinity.

    Raises:
      ValueError: if the data are empty or not floating, a number is out of its range, or the source
        has another event shape.

    Example:
      >>> from fmjax import standard_normal
      >>> data = jnp.array([[-1.0], [3.0]])
      >>> g = semidiscrete_potential(jax.random.key(0), data, standard_normal((1,)))
      >>> bool(abs(g[1] - g[0] - 8) < 0.1)  # the cells meet at 0, where (0 - 3)^2 - (0 + 1)^2 = 8
      True

    Source: arXiv 1605.08527, algorithm 2; arXiv 2509.25519.
    """
    data = _as_data(data)
    _check_epsilon(epsilon)
    for name, value in (
        ("num_steps", num_steps),
        ("batch_size", batch_size),
        ("learning_rate", learning_rate),
    ):
        whole = name == "learning_rate" or isinstance(value, int)
        if not whole or not 0 < value < math.inf:
            raise ValueError(
                f"{name} must be {'a positive number' if whole else 'a whole number'}; got {value}."
            )
    num, kept = len(data), max(1, num_steps // 10)
    key_scale, key_steps = jax.random.split(key)
    scale = jnp.std(_scores(_draw(source, key_scale, batch_size, data), data))
    tx = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps), b2=0.99)

    def step(carry: Any, k: jax.Array) -> tuple[Any, None]:
        g, state, mean = carry
        x0 = _draw(source, jax.random.fold_in(key_steps, k), batch_size, data)
        scores = g[None] + _scores(x0, data)
        if epsilon > 0:
            share = jnp.mean(jax.nn.softmax(scores / epsilon, axis=1), axis=0)
        else:
            hits = jnp.zeros_like(g).at[jnp.argmax(scores, axis=1)].add(1.0)
            share = hits / batch_size
        updates, state = tx.update(num * share - 1, state)
        g = g + scale * jnp.asarray(updates)
        nth = jnp.maximum(k - (num_steps - kept) + 1, 1).astype(g.dtype)
        return (g, state, mean + (g - mean) / nth), None

    g = jnp.zeros(num, data.dtype)
    with jax.numpy_dtype_promotion("standard"):  # Optax's steps, whatever the caller's are
        carry, _ = jax.lax.scan(step, (g, tx.init(g), g), jnp.arange(num_steps))
    return carry[-1] - jnp.mean(carry[-1])


def semidiscrete(g: jax.Array, data: jax.Array, epsilon: float = 0.0) -> Assignment:
    """Sends each noise to its row of the data: `x1 = data[assignment(key, x0)]`.

    x0 stays as it is drawn, so that its law is exactly the source's; the rows are drawn as evenly
    as g is good. Pair in training by

        x0 = source.sample(key_x0, batch_size)
        rows = semidiscrete(g, data)(key_pair, x0)
        path_sample = sample_path(path, x0, data[rows], t)

    Args:
      g: from `semidiscrete_potential`, `[N]`.
      data: the same data, `[N, *event]`.
      epsilon: 0 for the nearest cell; above, in units of |x0 - x1|^2, rows are drawn in proportion
        to exp((g_j - |x0 - y_j|^2) / epsilon), and g must be that of the same epsilon.

    Returns:
      An assignment `(key, x0) -> rows1`, `[batch]`, int32; its key is used for epsilon > 0 alone.

    Raises:
      ValueError: if g is not `[N]`, or epsilon is negative or not finite; by the assignment, if x0
        has another event shape than the data.

    Example:
      >>> data = jnp.array([[-1.0], [3.0]])
      >>> assignment = semidiscrete(jnp.array([-4.0, 4.0]), data)
      >>> assignment(jax.random.key(0), jnp.array([[-0.1], [0.1]]))
      Array([0, 1], dtype=int32)

    Source: arXiv 2509.25519.
    """
    data, g = _as_data(data), as_array("g", g)
    _check_epsilon(epsilon)
    if g.shape != data.shape[:1]:
        raise ValueError(
            f"g must be [N], one number for each row of the data; got {g.shape} for data "
            f"{data.shape}. semidiscrete_potential makes it."
        )

    def assignment(key: jax.Array, x0: jax.Array) -> jax.Array:
        x0 = _check_event(as_batch("x0", x0), data)
        scores = g[None] + _scores(x0.astype(data.dtype), data)
        if epsilon > 0:
            return jax.random.categorical(key, scores / epsilon, axis=1).astype(jnp.int32)
        return jnp.argmax(scores, axis=1).astype(jnp.int32)

    return assignment


def _scores(x0: jax.Array, data: jax.Array) -> jax.Array:
    """-|x0_i - y_j|^2 but for what is the same for all j, `[batch, N]`."""
    flat1 = data.reshape(len(data), -1)
    origin = jnp.mean(flat1, axis=0)[None]  # products far from it would round
    flat0, flat1 = x0.reshape(len(x0), -1) - origin, flat1 - origin
    product = jnp.matmul(flat0, flat1.T, precision=jax.lax.Precision.HIGHEST)
    return 2 * product - jnp.sum(flat1**2, axis=1)[None]


def _draw(source: Any, key: jax.Array, num: int, data: jax.Array) -> jax.Array:
    return _check_event(draw_source(source, key, num), data).astype(data.dtype)


def _check_event(x0: jax.Array, data: jax.Array) -> jax.Array:
    if x0.shape[1:] != data.shape[1:]:
        raise ValueError(
            f"x0 and the data must have one event shape; got {x0.shape[1:]} and {data.shape[1:]}."
        )
    return x0


def _as_data(data: Any) -> jax.Array:
    data = at_least_float32(as_batch("data", data))
    if not data.size:
        raise ValueError(f"data must hold at least one row; got shape {data.shape}.")
    return jax.lax.stop_gradient(data)


def _check_epsilon(epsilon: Any) -> None:
    number = known_number(epsilon)
    if number is None or not 0 <= number < math.inf:
        raise ValueError(f"epsilon must be a finite number, 0 or more; got {kind(epsilon)}.")
