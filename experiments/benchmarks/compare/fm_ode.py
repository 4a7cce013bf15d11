"""fmjax's side of the solves: samples and exact log-densities at tolerance 1e-5.

The network is torchcfm's MLP with SiLU instead of SELU: SELU's slope jumps at zero, so that the
divergence is discontinuous and an adaptive solver of either library takes fifty times the steps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments.benchmarks.compare import fm_mlp, points
from experiments.benchmarks.compare.rows import EQUAL
from experiments.benchmarks.compare.workers import Case, Options, timed
from fmjax import data, models, training
from fmjax.models import cpu
from fmjax.training import sharding

TRAINING_STEPS = 2000
LAYER_NAMES = [f"Dense_{n}" for n in range(len(points.LAYERS) - 1)]
EQUAL_TOLERANCE = 2e-5  # at which the log-density's error is still below the peer's at 1e-5


def weights(options: Options) -> Any:
    """The flow from noise to moons that both sides solve: trained by the first side to come."""
    if not (options.folder / "weights.npz").exists():
        state, step = fm_mlp.make_step(fm_mlp.MLP(jax.nn.silu))
        train = functools.partial(fm_mlp.train, step=step, key=jax.random.key(1))
        params = jax.jit(lambda state: train(state, num=TRAINING_STEPS)[0].ema_params)(state)
        layers = [params["params"][name] for name in LAYER_NAMES]
        arrays = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]
        points.write_weights(options.folder, arrays)
    named = zip(LAYER_NAMES, points.read_weights(options.folder), strict=True)
    return {"params": {name: {"kernel": w, "bias": b} for name, (w, b) in named}}


def sampling(options: Options, sizes: tuple[int, ...] = (1024, 16)) -> dict[str, Case]:
    velocity = functools.partial(fm_mlp.MLP(jax.nn.silu).apply, weights(options))

    def case(num: int) -> Case:
        solve = jax.jit(lambda x0: fm.integrate(velocity, x0))
        name = options.folder / f"sampling_{num}_{options.side}.npy"
        return _case(solve, points.normal(num), 10 if num > 100 else 100, name)

    return {str(num): case(num) for num in sizes}


def log_density(options: Options) -> dict[str, Case]:
    velocity = functools.partial(fm_mlp.MLP(jax.nn.silu).apply, weights(options))

    def case(tolerance: float, side: str) -> Case:
        controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        solve = jax.jit(
            lambda x1: fm.integrate_log_prob(velocity, x1, stepsize_controller=controller)
        )
        return _case(solve, points.moons(1024), 5, options.folder / f"log_density_1024_{side}.npy")

    looser = case(EQUAL_TOLERANCE, f"{options.side} at {EQUAL_TOLERANCE:g}")
    return {"1024": case(1e-5, options.side), f"1024{EQUAL}": looser}


def sampling_over_devices(options: Options) -> dict[str, Case]:
    """The points split over as many devices as cores: XLA divides these small products badly."""
    jax.config.update("jax_num_cpu_devices", math.gcd(options.threads, 1024))
    return sampling(options, sizes=(1024,))


def log_density_over_devices(options: Options) -> dict[str, Case]:
    jax.config.update("jax_num_cpu_devices", math.gcd(options.threads, 1024))
    return log_density(options)


def image_log_density(options: Options) -> dict[str, Case]:
    """Digits under a small U-Net that has been trained for a moment."""
    del options
    images = data.load_digits("train").images.astype(np.float32) / 8 - 1
    model = models.UNet(
        channels=32,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        time_scale=30.0,
        kernels=cpu.KERNELS,
    )

    def loss_fn(params: Any, key: jax.Array, batch: None) -> jax.Array:
        key_x1, key_x0, key_t = jax.random.split(key, 3)
        x1 = jnp.asarray(images)[jax.random.randint(key_x1, (64,), 0, len(images))]
        x0, t = jax.random.normal(key_x0, x1.shape), fm.uniform(key_t, (64,))
        path_sample = fm.sample_path(fm.cond_ot(), x0, x1, t)
        return jnp.mean(fm.cfm_loss(functools.partial(model.apply, params), path_sample))

    tx = training.adam(1e-3)
    params = model.init(jax.random.key(0), jnp.zeros(()), jnp.zeros((1, 8, 8, 1)))
    step = jax.jit(training.make_train_step(loss_fn, tx), donate_argnums=0)
    state = training.init_train_state(params, tx)
    for _ in range(100):
        state, _ = step(state, jax.random.key(1), None)
    velocity = functools.partial(model.apply, state.ema_params)
    solve = jax.jit(lambda x1: fm.integrate_log_prob(velocity, x1))
    return {"16": _case(solve, images[:16], 1)}


def _case(solve: Callable[[jax.Array], Any], x: np.ndarray, num: int, result: Any = None) -> Case:
    """`num` solves of `x`, one after another; the result is left for comparison with the peer's."""
    start = sharding.shard_batch(x, sharding.make_mesh())

    def run() -> None:
        for _ in range(num):
            jax.block_until_ready(solve(start))

    def facts() -> dict[str, Any]:
        solved = solve(start)
        if result is not None:
            value = solved.x[-1] if isinstance(solved, fm.Trajectory) else solved.log_prob
            np.save(result, np.asarray(value))
        return {"evaluations": int(solved.num_evaluations), "solver": "Tsit5"}

    return timed(run, num, facts=facts)
