"""Multilayer perceptrons over vectors, conditioned on time and perhaps on a class or on numbers.

    h_1 = act(W_1 x + V embedding(t) + C + b_1),  h_n = act(W_n h_{n-1} + b_n),  u = W h_N + b

with C = E[label] for a class, or a matrix times the numbers of a condition. A network with a
horizon, s - t of an average velocity, adds V' embedding(s - t), with V' = 0 at first.

Time enters through sines and cosines, as in Ho et al. (2020, arXiv 2006.11239), at angular
frequencies from 1 to 30 per unit of t. They tell hundredths of [0, 1] apart and leave the velocity
smooth in t; frequencies up to 1000 would cost an adaptive solver many more steps, and make the time
derivative of a flow map's loss all oscillation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fmjax.models.layers import Dtypes, class_indices, horizon_rows, time_embedding
from fmjax.types import as_array, broadcast_time, wider


class MLP(nn.Module):
    """A velocity over vectors: `model.apply(params, t, x, labels=None) -> u`.

    The activation should have continuous second derivatives, as SiLU, GELU and tanh have: the
    divergence in a log-density holds the activation's derivative, and where that has a kink an
    adaptive solver takes many times the steps.

    Attributes:
      features: widths of the hidden layers, at least one.
      activation: of the hidden layers.
      num_classes: None, or the number of classes; index num_classes is the null class, "no
        label", which a model trained for guidance sees instead of a dropped label.
      time_features: size of the embedding of time.
      time_scale: the highest angular frequency at which time enters, per unit of t; the lowest is a
        thirtieth of it. Flow maps, whose losses take the derivative in t, want less than 30.
      horizon: whether the network takes the horizon s - t, in a second embedding, which adds zero
        at first: parameters that were trained without it can be trained on.
      dropout: the rate after every hidden layer.
      dtype: of the computation; None means the wider of x's and the parameters'.
      param_dtype: of the parameters.

    Example:
      >>> model = MLP(features=(64, 64))
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 2)))
      >>> jax.jit(model.apply)(params, jnp.array(0.5), jnp.zeros((8, 2))).shape
      (8, 2)
    """

    features: Sequence[int] = (128, 128, 128)
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    num_classes: int | None = None
    time_features: int = 64
    time_scale: float = 30.0
    horizon: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        labels: jax.Array | None = None,
        *,
        horizon: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The velocity at time t and point x, or the average one from t to t + horizon.

        Args:
          t: times in [0, 1], `[]` or `[batch]`.
          x: `[batch, dim]`, floating.
          labels: integers in 0..num_classes, `[batch]`; None means the null class for all.
          horizon: s - t, not negative, `[]` or `[batch]`; None means 0.
          deterministic: False turns dropout on, and wants `rngs={"dropout": key}`.

        Returns:
          `[batch, dim]`, in the dtype of x. NaN where a traced label is out of range.

        Raises:
          ValueError: x, t, labels or horizon of a wrong shape or dtype; labels without
            num_classes, a horizon without `horizon=True`; a concrete label out of range or a
            negative horizon; no hidden layer.
        """
        _check(self, x)
        indices = class_indices(labels, x.shape[0], self.num_classes)
        emb, dtypes = _embedded_time(self, t, x, horizon)
        if self.num_classes is not None and indices is not None:
            table = nn.Embed(self.num_classes + 1, self.features[0], name="label", **dtypes)
            emb = emb + table(indices)
        return _layers(self, x, emb, dtypes, deterministic)


class ConditionalMLP(nn.Module):
    """A velocity over vectors under a condition: `model.apply(params, t, x, condition) -> u`.

    The condition is an array or any pytree of arrays, one row for each of x. For guidance train
    with `fm.drop_labels` on a null that no condition takes: zeros beside a leaf that says whether
    the condition is known, {"value": [batch, 3], "known": [batch]} say.

    Attributes:
      features: widths of the hidden layers, at least one.
      activation: of the hidden layers; see `MLP` on kinks.
      time_features: size of the embedding of time.
      time_scale: the highest angular frequency at which time enters, per unit of t; the lowest is a
        thirtieth of it. Flow maps, whose losses take the derivative in t, want less than 30.
      horizon: whether the network takes the horizon s - t, in a second embedding, which adds zero
        at first: parameters that were trained without it can be trained on.
      dropout: the rate after every hidden layer.
      dtype: of the computation; None means the wider of x's and the parameters'.
      param_dtype: of the parameters.

    Example:
      >>> model, mass = ConditionalMLP(features=(64, 64)), jnp.ones((1, 3))
      >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 2)), mass)
      >>> jax.jit(model.apply)(params, jnp.array(0.5), jnp.zeros((8, 2)), jnp.ones((8, 3))).shape
      (8, 2)
    """

    features: Sequence[int] = (128, 128, 128)
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    time_features: int = 64
    time_scale: float = 30.0
    horizon: bool = False
    dropout: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        condition: Any,
        *,
        horizon: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The velocity at t and x under a condition, or the average one from t to t + horizon.

        Args:
          t: times in [0, 1], `[]` or `[batch]`.
          x: `[batch, dim]`, floating.
          condition: floating, `[batch, ...]`, or a pytree of such arrays.
          horizon: s - t, not negative, `[]` or `[batch]`; None means 0.
          deterministic: False turns dropout on, and wants `rngs={"dropout": key}`.

        Returns:
          `[batch, dim]`, in the dtype of x.

        Raises:
          ValueError: x, t, horizon or a leaf of the condition of a wrong shape or dtype; no
            condition; a horizon without `horizon=True`, or a negative one; no hidden layer.
        """
        _check(self, x)
        emb, dtypes = _embedded_time(self, t, x, horizon)
        numbers = _flat(condition, x.shape[0]).astype(dtypes["dtype"])
        emb = emb + nn.Dense(self.features[0], use_bias=False, name="condition", **dtypes)(numbers)
        return _layers(self, x, emb, dtypes, deterministic)


def _check(model: MLP | ConditionalMLP, x: jax.Array) -> None:
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating) or not model.features:
        raise ValueError(
            f"{type(model).__name__} takes floating vectors [batch, dim] and has at least one "
            f"hidden layer; got x {x.dtype} {x.shape} and features={tuple(model.features)}. A "
            "single vector needs x[None], and an image x.reshape(batch, -1) or models.UNet."
        )
    if model.time_features < 2:
        raise ValueError(f"time_features must be at least 2; got {model.time_features}.")
    if not model.time_scale > 0:
        raise ValueError(f"time_scale must be positive; got {model.time_scale}. 30 is usual.")


def _flat(condition: Any, batch_size: int) -> jax.Array:
    """All numbers of a condition, `[batch, num]`, leaf after leaf."""
    leaves = [as_array("condition", leaf) for leaf in jax.tree.leaves(condition)]
    if wrong := [leaf.dtype for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)]:
        raise ValueError(
            f"condition must be floating; got {wrong[0]}. Numbers need .astype(float), and classes "
            "jax.nn.one_hot, or MLP(num_classes=...)."
        )
    if not leaves or any(leaf.shape[:1] != (batch_size,) for leaf in leaves):
        raise ValueError(
            f"condition must hold arrays [batch, ...] of {batch_size} rows, as x has; got "
            f"{[leaf.shape for leaf in leaves]}. One for all needs jnp.broadcast_to."
        )
    dtype = functools.reduce(wider, (leaf.dtype for leaf in leaves))
    return jnp.concatenate([leaf.reshape(batch_size, -1).astype(dtype) for leaf in leaves], axis=1)


def _embedded_time(
    model: MLP | ConditionalMLP, t: jax.Array, x: jax.Array, horizon: jax.Array | None
) -> tuple[jax.Array, Dtypes]:
    """What time and horizon add to the first hidden layer, and the dtypes of the layers."""
    dtype = model.dtype or jnp.promote_types(x.dtype, model.param_dtype)
    dtypes = Dtypes(dtype=dtype, param_dtype=model.param_dtype)
    dense = functools.partial(nn.Dense, model.features[0], use_bias=False, **dtypes)

    scale = model.time_scale

    def embed(t: jax.Array) -> jax.Array:
        return time_embedding(t, model.time_features, highest=scale, lowest=scale / 30).astype(
            dtype
        )

    # Apart from x, so that a scalar time is multiplied once and a Jacobian skips it.
    emb = dense(name="time")(embed(broadcast_time(t, x).reshape(-1)))
    rows = horizon_rows(horizon, model.horizon, x)
    if rows is not None:
        emb = emb + dense(name="horizon", kernel_init=nn.initializers.zeros)(embed(rows))
    return emb, dtypes


def _layers(
    model: MLP | ConditionalMLP,
    x: jax.Array,
    emb: jax.Array,
    dtypes: Dtypes,
    deterministic: bool,
) -> jax.Array:
    """The layers, `emb` added to the first."""
    h = x
    for layer, width in enumerate(model.features):
        h = nn.Dense(width, **dtypes)(h)
        h = model.activation(h + emb if layer == 0 else h)
        h = nn.Dropout(model.dropout)(h, deterministic=deterministic)
    return nn.Dense(x.shape[-1], **dtypes)(h).astype(x.dtype)
