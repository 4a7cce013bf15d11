"""fmjax's side of the pairing: `fmjax.minibatch_ot`, jitted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments.benchmarks.compare import points
from experiments.benchmarks.compare.workers import Case, Options, timed
from fmjax import data


def pairing(options: Options) -> dict[str, Case]:
    if points.has_cifar():
        np.save(options.folder / "cifar.npy", data.load("cifar10", points.CHOSEN).images)
    return {str(num): _case(num, options) for num in points.PAIRING}


def _case(num: int, options: Options) -> Case:
    x0, x1 = (jnp.asarray(x) for x in points.pairing_batch(num, options.folder))
    pair, key = jax.jit(fm.minibatch_ot), jax.random.key(0)
    calls = max(1, 1024 // num)

    def run() -> None:
        for _ in range(calls):
            jax.block_until_ready(pair(key, x0, x1))

    def facts() -> dict[str, Any]:
        difference = np.asarray(pair(key, x0, x1), np.float64) - np.asarray(x1, np.float64)
        what = "CIFAR-10" if points.has_cifar() else "noise"
        return {"mean cost": float(np.mean(np.sum(difference**2, axis=1))), "data": what}

    return timed(run, calls, facts=facts)
