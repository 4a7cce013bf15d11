"""The InceptionV3 that the Fréchet inception distance is defined by, in Flax.

It is the network of TensorFlow's graph of 2015-12-05 (Szegedy et al. 2015, arXiv 1512.00567; Heusel
et al. 2017, arXiv 1706.08500), not torchvision's: average pools leave the padding out of the mean,
the last block pools by the maximum, there are 1008 classes, and other weights. Images are
`[batch, 299, 299, 3]` in [-1, 1); the features ("pool3") are the last block's means over its 8 x 8
positions, `[batch, 2048]`.

A convolution here has no bias of its own but a batch normalisation after it, with eps = 1e-3. At
inference both are one affine map, which `params_from_state_dict` folds in float64:

    gain = weight / sqrt(running_var + eps)
    y = relu(conv(x, kernel gain) + bias - running_mean gain)

The network is a table: a step is a convolution, a pool or a concatenation of branches, each of
them steps in turn. The names are those of the PyTorch ports, pytorch-fid and torch-fidelity.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..weights import check_entries

SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
BATCH_NORM_EPS = 1e-3
_NETWORK = "the FID InceptionV3 (pytorch-fid, torch-fidelity)"
_HINT = "Torchvision's own network is another."


class InceptionOutput(NamedTuple):
    """What the network says of a batch.

    Attributes:
      features: pool3, `[batch, 2048]`.
      logits: features @ W without the bias ("unbiased"), `[batch, 1008]`.
    """

    features: jax.Array
    logits: jax.Array


class _Conv(NamedTuple):
    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


class _Branches(NamedTuple):
    """Branches of steps on one input, concatenated. `prefix` goes before the names in them."""

    prefix: str
    branches: tuple[tuple["_Step", ...], ...]


_Step = _Conv | _Branches | Callable[[jax.Array], jax.Array]

_max_pool = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_max_pool_same = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME")
_average_pool_same = functools.partial(
    nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
)


def _chain(name: str, *rows: tuple[int, int, int]) -> tuple[_Conv, ...]:
    """Convolutions name_1, name_2, ... of (features, height, width)."""
    return tuple(_Conv(f"{name}_{n}", c, (h, w)) for n, (c, h, w) in enumerate(rows, 1))


def _at_35(prefix: str, pooled: int) -> _Branches:
    one = (_Conv("branch1x1", 64),)
    five = _chain("branch5x5", (48, 1, 1), (64, 5, 5))
    three_twice = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3))
    pool = (_average_pool_same, _Conv("branch_pool", pooled))
    return _Branches(prefix, (one, five, three_twice, pool))


def _from_35_to_17(prefix: str) -> _Branches:
    three = (_Conv("branch3x3", 384, (3, 3), 2, "VALID"),)
    three_twice = _chain("branch3x3dbl", (64, 1, 1), (96, 3, 3))
    three_twice += (_Conv("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),)
    return _Branches(prefix, (three, three_twice, (_max_pool,)))


def _at_17(prefix: str, c: int) -> _Branches:
    one = (_Conv("branch1x1", 192),)
    seven = _chain("branch7x7", (c, 1, 1), (c, 1, 7), (192, 7, 1))
    rows = ((c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7))
    pool = (_average_pool_same, _Conv("branch_pool", 192))
    return _Branches(prefix, (one, seven, _chain("branch7x7dbl", *rows), pool))


def _from_17_to_8(prefix: str) -> _Branches:
    three = _chain("branch3x3", (192, 1, 1))
    three += (_Conv("branch3x3_2", 320, (3, 3), 2, "VALID"),)
    seven = _chain("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1))
    seven += (_Conv("branch7x7x3_4", 192, (3, 3), 2, "VALID"),)
    return _Branches(prefix, (three, seven, (_max_pool,)))


def _at_8(prefix: str, pool: Callable[[jax.Array], jax.Array]) -> _Branches:
    one = (_Conv("branch1x1", 320),)
    three = (*_chain("branch3x3", (384, 1, 1)), _fork("branch3x3_2"))
    three_twice = (*_chain("branch3x3dbl", (448, 1, 1), (384, 3, 3)), _fork("branch3x3dbl_3"))
    return _Branches(prefix, (one, three, three_twice, (pool, _Conv("branch_pool", 192))))


def _fork(name: str) -> _Branches:
    row, column = _Conv(f"{name}a", 384, (1, 3)), _Conv(f"{name}b", 384, (3, 1))
    return _Branches("", ((row,), (column,)))


_STEPS: tuple[_Step, ...] = (
    _Conv("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
    _Conv("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
    _Conv("Conv2d_2b_3x3", 64, (3, 3)),
    _max_pool,
    _Conv("Conv2d_3b_1x1", 80),
    _Conv("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
    _max_pool,
    _at_35("Mixed_5b.", 32),
    _at_35("Mixed_5c.", 64),
    _at_35("Mixed_5d.", 64),
    _from_35_to_17("Mixed_6a."),
    _at_17("Mixed_6b.", 128),
    _at_17("Mixed_6c.", 160),
    _at_17("Mixed_6d.", 160),
    _at_17("Mixed_6e.", 192),
    _from_17_to_8("Mixed_7a."),
    _at_8("Mixed_7b.", _average_pool_same),
    _at_8("Mixed_7c.", _max_pool_same),
)


class InceptionV3(nn.Module):
    """The FID network: `model.apply(params, x) -> InceptionOutput(features, logits)`.

    x is `[batch, 299, 299, 3]`, float32: (resized image - 128) / 128, see `fmjax.metrics.resize`.
    Its parameters come from `params_from_state_dict`. Products are of full float32 precision on
    every device.

    Example:
      >>> x = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
      >>> jax.eval_shape(InceptionV3().init_with_output, jax.random.key(0), x)[0].features.shape
      (2, 2048)
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> InceptionOutput:
        features = jnp.mean(_run(_STEPS, x, ""), axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision="highest", name="fc")(features)
        return InceptionOutput(features, logits)


def _run(steps: tuple[_Step, ...], x: jax.Array, prefix: str) -> jax.Array:
    """Applies the steps in turn; called inside a compact Flax module, which owns the layers."""
    for step in steps:
        if isinstance(step, _Conv):
            x = nn.relu(_layer(step, prefix)(x))
        elif isinstance(step, _Branches):
            inside = prefix + step.prefix
            x = jnp.concatenate([_run(branch, x, inside) for branch in step.branches], axis=-1)
        else:
            x = step(x)
    return x


def _layer(conv: _Conv, prefix: str) -> nn.Conv:
    return nn.Conv(
        conv.features,
        conv.kernel,
        strides=conv.stride,
        padding=conv.padding,
        precision="highest",
        name=prefix + conv.name,
    )


def unbiased_logits(params: Mapping[str, Any], features: jax.Array) -> jax.Array:
    """The class scores of features: features @ W, `[n, 2048]` -> `[n, 1008]`, without the bias."""
    return jnp.matmul(features, params["params"]["fc"]["kernel"], precision="highest")


def params_from_state_dict(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The network's parameters from the tensors of a PyTorch port.

    Args:
      state_dict: `Mixed_5b.branch1x1.conv.weight` and so on, as `read_tensors` gives it. What ends
        with `num_batches_tracked` is not used, nor is `fc.bias`, which must be there all the same.

    Returns:
      `{"params": {layer: {"kernel": ..., "bias": ...}}}`, float32, for `InceptionV3().apply`.

    Raises:
      ValueError: if an entry is missing, unknown, of another shape, or holds no finite numbers.
    """
    used = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    check_entries(used, torch_shapes(), network=_NETWORK, hint=_HINT)
    layers = [k.removesuffix(".conv.weight") for k in used if k.endswith(".conv.weight")]
    params = {name: _folded(used, name) for name in layers}
    fc = np.asarray(used["fc.weight"], np.float32).T
    return jax.tree.map(jnp.asarray, {"params": params | {"fc": {"kernel": fc}}})


@functools.cache
def torch_shapes() -> dict[str, tuple[int, ...]]:
    """The entries of a PyTorch port's state dict and their shapes, from the network's own."""
    x = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    layers = jax.eval_shape(InceptionV3().init, jax.random.key(0), x)["params"]
    wanted: dict[str, tuple[int, ...]] = {"fc.bias": (NUM_CLASSES,)}
    wanted["fc.weight"] = layers["fc"]["kernel"].shape[::-1]
    for name in layers.keys() - {"fc"}:
        height, width, inputs, outputs = layers[name]["kernel"].shape
        wanted[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        for entry in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{name}.bn.{entry}"] = (outputs,)
    return dict(sorted(wanted.items()))


def _folded(state_dict: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """A convolution and its batch normalisation as one: kernel `[h, w, in, out]` and bias."""
    kernel = state_dict[f"{name}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0)
    weight, bias, mean, var = (
        state_dict[f"{name}.bn.{entry}"].astype(np.float64)
        for entry in ("weight", "bias", "running_mean", "running_var")
    )
    gain = weight / np.sqrt(var + BATCH_NORM_EPS)
    folded = {"kernel": kernel * gain, "bias": bias - mean * gain}
    return {key: value.astype(np.float32) for key, value in folded.items()}
