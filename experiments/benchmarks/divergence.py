"""Which estimator of the divergence is best at equal cost, on a trained network?

    python -m experiments.benchmarks.divergence --run runs/digits

The cost is the number of Jacobian products per evaluation; the figure is the root mean square error
of the log-density of held-out images against the exact trace, in bits/dim, over images and keys.
All estimators keep their random draws fixed during a solve, of the same equal steps as the exact
one, so that only the estimator differs.

- Rademacher, Gaussian: Hutchinson's, `fmjax.hutchinson_divergence`.
- orthogonal: Gaussian probes made orthonormal and scaled by the root of D.
- Hutch++ (Meyer et al. 2021, arXiv 2010.09649): a third of the products finds a basis Q of the
  range of J, a third takes the trace on it, tr(Q^T J Q), and a third estimates the remainder with
  probes from which Q has been projected out.
"""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax.data import pixels
from fmjax.harness import command
from fmjax.harness.read import read
from fmjax.harness.records import environment, write_json
from fmjax.tasks import images


@dataclasses.dataclass(frozen=True)
class Config:
    """Estimators of the divergence side by side."""

    run: pathlib.Path = pathlib.Path("runs/digits")
    """A finished image run."""
    num_images: int = 16
    """Held-out images."""
    num_keys: int = 8
    """Independent draws of every estimator."""
    products: tuple[int, ...] = (3, 6, 12, 24)
    """Jacobian products per evaluation, multiples of three."""
    num_steps: int = 8
    """Equal steps of Tsit5."""
    output: pathlib.Path | None = None
    """A JSON file for the figures."""


def orthogonal(key: jax.Array, num_probes: int) -> fm.Divergence:
    """Hutchinson's estimate with probes that are orthogonal to one another."""

    def divergence(velocity: fm.Velocity, t: jax.Array, x: jax.Array):
        u, product = jax.linearize(lambda x: velocity(t, x), x)
        size = math.prod(x.shape[1:])
        basis, _ = jnp.linalg.qr(jax.random.normal(key, (x.shape[0], size, num_probes)))
        probes = math.sqrt(size) * basis.transpose(2, 0, 1).reshape(-1, *x.shape)
        return u, jnp.mean(_quadratic_forms(product, probes), axis=0)

    return divergence


def hutch_plus_plus(key: jax.Array, num_products: int) -> fm.Divergence:
    """Hutch++ with `num_products` Jacobian products, a multiple of three."""
    key_range, key_rest = jax.random.split(key)
    num = num_products // 3

    def divergence(velocity: fm.Velocity, t: jax.Array, x: jax.Array):
        u, product = jax.linearize(lambda x: velocity(t, x), x)
        sketch = jax.vmap(product)(jax.random.rademacher(key_range, (num, *x.shape), x.dtype))
        basis, _ = jnp.linalg.qr(sketch.reshape(num, x.shape[0], -1).transpose(1, 2, 0))
        columns = basis.transpose(2, 0, 1).reshape(num, *x.shape)
        on_basis = jnp.sum(_quadratic_forms(product, columns), axis=0)
        rest = jax.random.rademacher(key_rest, (num, *x.shape), x.dtype).reshape(num, len(x), -1)
        inside = jnp.einsum("bdk,bek,nbe->nbd", basis, basis, rest)
        probes = (rest - inside).reshape(num, *x.shape)
        return u, on_basis + jnp.mean(_quadratic_forms(product, probes), axis=0)

    return divergence


def _quadratic_forms(product: Callable[[jax.Array], jax.Array], probes: jax.Array) -> jax.Array:
    """e . (J e) of each probe: `[num, batch, *event]` -> `[num, batch]`."""
    return jax.vmap(lambda e: jnp.sum(e * product(e), axis=range(1, e.ndim)))(probes)


ESTIMATORS: dict[str, Callable[[jax.Array, int], fm.Divergence]] = {
    "Rademacher": fm.hutchinson_divergence,
    "Gaussian": lambda key, n: fm.hutchinson_divergence(key, n, probe=jax.random.normal),
    "orthogonal": orthogonal,
    "Hutch++": hutch_plus_plus,
}


def main(config: Config) -> dict[str, dict[str, float]]:
    if any(n < 3 or n % 3 for n in config.products):
        raise ValueError(f"--products must be multiples of three; got {config.products}.")
    model = read(config.run)
    dataset = images.Pictures(model.config).held_out
    chosen = jnp.asarray(dataset.images[: config.num_images])
    x = pixels.dequantize(jax.random.key(0), chosen, dataset.num_levels)
    velocity, scale = model.velocity(model.params, None), x[0].size * math.log(2)

    def log_prob(divergence: fm.Divergence) -> jax.Array:
        return fm.log_prob(velocity, x, divergence=divergence, num_steps=config.num_steps)

    exact = np.asarray(jax.jit(lambda: log_prob(fm.exact_divergence()))()) / scale
    keys = jax.random.split(jax.random.key(1), config.num_keys)
    errors: dict[str, dict[str, float]] = {name: {} for name in ESTIMATORS}
    for products in config.products:
        for name, make in ESTIMATORS.items():
            solve = jax.jit(lambda key, make=make, n=products: log_prob(make(key, n)))
            began = time.perf_counter()
            got = np.stack([np.asarray(solve(key)) for key in keys]) / scale
            errors[name][str(products)] = float(np.sqrt(np.mean(np.square(got - exact))))
            print(f"{name}, {products} products: {time.perf_counter() - began:.0f} s", flush=True)
    print(_table(errors, config))
    if config.output is not None:
        record = {"config": json.loads(json.dumps(dataclasses.asdict(config), default=str))}
        write_json(config.output, record | {"rmse_bits_per_dim": errors} | environment())
    return errors


def _table(errors: dict[str, dict[str, float]], config: Config) -> str:
    head = "| error in bits/dim (rms) | " + " | ".join(f"{n} products" for n in config.products)
    lines = [head + " |", "|---" * (1 + len(config.products)) + "|"]
    for name, row in errors.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in row.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main, Config, name="experiments.benchmarks.divergence", doc=__doc__)
