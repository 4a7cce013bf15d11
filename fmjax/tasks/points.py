"""What experiments on points share: their MLP, and what is done with a trained one."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import models, plotting, training
from fmjax.evaluation import points as evaluation
from fmjax.evaluation.errors import standard_error
from fmjax.evaluation.points import Points as Points
from fmjax.harness.config import RunConfig, mesh
from fmjax.harness.pods import cluster
from fmjax.harness.start import say
from fmjax.harness.task import Init, Samples, Task, Trained
from fmjax.training import digests, sharding


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """The MLP."""

    features: tuple[int, ...] = (128, 128, 128)
    """Widths of the hidden layers."""


@dataclasses.dataclass(frozen=True)
class PointConfig(RunConfig):
    """The flags of an experiment on points."""

    model: MLPConfig = MLPConfig()
    """The network's size."""
    num_samples: int = 2000
    """Points to draw at the end; 0 for none."""
    eval_examples: int = 4096
    """Held-out points for the log-likelihood, the first; 0 for none."""
    side: int = 160
    """Cells on a side of the density that is drawn; the animation's has half as many."""
    frames: int = 16
    """Pictures of the animation, evenly in t; 0 for none."""
    cpu_threads: int | None = 1
    """Threads of XLA on a CPU; one per core without it. Small networks are faster on one."""


class Data(NamedTuple):
    """Points to train on, and others.

    Attributes:
      x1: to train on, `[num, D]`.
      held_out: not to train on, `[num, D]`.
      evaluated: makes what an evaluation compares with, independent of both if it can be.
      facts: what a run folder keeps of the data, as JSON can hold it.
      batch: `rows -> batch` of the training data; None for `x1[rows]`.
      held_out_batch: the same of the held-out ones.
      held_out_conditions: of the held-out points; None for none.
      log_scale: as in `Points`.
      given: as in `Points`.
    """

    x1: np.ndarray
    held_out: np.ndarray
    evaluated: Callable[[], Points]
    facts: dict[str, Any]
    batch: Callable[[np.ndarray], Any] | None = None
    held_out_batch: Callable[[np.ndarray], Any] | None = None
    held_out_conditions: Any = None
    log_scale: float = 0.0
    given: str = ""


def describe(x1: np.ndarray) -> dict[str, Any]:
    """What a run folder keeps of points, enough to know them again."""
    return {
        "num_examples": len(x1),
        "event_shape": list(x1.shape[1:]),
        "sha256": digests.hash_array(x1),
    }


def make_mlp(config: PointConfig) -> models.MLP:
    """The MLP that the flags describe."""
    return models.MLP(**dataclasses.asdict(config.model))


def make_task(
    config: PointConfig,
    facts: dict[str, Any],
    load: Callable[[], Data],
    init: Init,
    step: training.TrainStep,
    velocity: Callable[[Any, Any], fm.Velocity],
    samples: Samples | None = None,
) -> Task:
    """The task of an experiment on points, from what differs between them.

    Args:
      config: its flags.
      facts: "num_examples" and "event_shape" of the data.
      load: makes the data, once and only where they are needed: not to draw samples.
      init: `key -> TrainState`.
      step: `(state, key, batch) -> (state, metrics)`.
      velocity: `(params, condition) -> Velocity`.
      samples: how they are drawn and shown; None for a flow in the plane.
    """
    shape = tuple(facts["event_shape"])
    if samples is None:
        samples = Samples(fm.standard_normal(shape), lambda x1: {"x": x1}, picture=_picture)
    training_now = config.known is None

    def batch(rows: np.ndarray) -> Any:
        data = load()
        return data.x1[rows] if data.batch is None else data.batch(rows)

    def held_out(rows: np.ndarray) -> Any:
        data = load()
        return data.held_out[rows] if data.held_out_batch is None else data.held_out_batch(rows)

    def evaluate(trained: Trained, folder: pathlib.Path, flags: Any) -> dict[str, Any]:
        return evaluation.evaluate(load().evaluated(), trained, folder, flags)

    return Task(
        num_examples=facts["num_examples"],
        batch=batch,
        init=init,
        step=step,
        velocity=velocity,
        finish=functools.partial(finish, load),
        evaluate=evaluate,
        preview=preview if samples.picture is not None else None,
        samples=samples,
        num_held_out=len(load().held_out) if training_now else 0,
        held_out=held_out,
        data=lambda: load().facts,
    )


def _picture(arrays: dict[str, np.ndarray], condition: Any) -> np.ndarray:
    return plotting.trajectories(np.stack([arrays["x"], arrays["x"]]))


def preview(trained: Trained, key: jax.Array) -> np.ndarray:
    """500 samples in ten steps of Heun's: of a flow in the plane the ways that they come."""
    samples, rows = trained.task.samples, np.arange(500)
    assert samples is not None and samples.picture is not None  # else there is no preview
    condition = trained.condition(rows)
    x0 = np.asarray(samples.source.sample(key, len(rows)))
    given = _spread(trained.config, (x0, condition))
    x = sharding.gathered(
        _flow(trained.task.velocity, trained.params, *given, diffrax.Heun(), 10, 11)
    ).x
    if samples.picture is _picture:
        return plotting.trajectories(x)
    return samples.picture(samples.arrays(x[-1]), condition)


def finish(
    load: Callable[[], Data], trained: Trained, folder: pathlib.Path, key: jax.Array
) -> dict[str, Any]:
    """Samples, the log-likelihood of held-out points, and of a flow in the plane the density."""
    config, figures, data = trained.config, {}, load()
    if config.num_samples:
        figures |= draw_samples(data, trained, folder, key)
    if config.eval_examples:
        log_p = log_likelihood(data, trained)
        given = f", given {data.given}" if data.given else ""
        figures |= {
            "log_likelihood": float(log_p.mean()),
            "log_likelihood_standard_error": standard_error(log_p),
            "log_likelihood_method": (
                f"nats per point, {len(log_p)} held-out points{given}; exact divergence, Tsit5, "
                "tolerance 1e-5; EMA parameters"
            ),
        }
    return figures


def draw_samples(
    data: Data, trained: Trained, folder: pathlib.Path, key: jax.Array
) -> dict[str, Any]:
    """Draws samples over all devices; in the plane their ways, the density and an animation."""
    config, samples = trained.config, trained.task.samples
    rows = np.arange(config.num_samples)
    assert samples is not None  # make_task
    say(f"Drawing {len(rows)} samples ...")
    condition = trained.condition(rows)
    given = _spread(config, (np.asarray(samples.source.sample(key, len(rows))), condition))
    num_times = config.frames or 21
    trajectory = sharding.gathered(
        _flow(trained.task.velocity, trained.params, *given, diffrax.Tsit5(), None, num_times)
    )
    path = folder / "samples" / f"step_{trained.step:08d}.png"
    figures = {
        "num_evaluations": int(trajectory.num_evaluations),
        "sampler": "Tsit5, tolerance 1e-5, EMA parameters",
    }
    if samples.picture is not None and samples.picture is not _picture:
        if cluster.is_main():
            picture = samples.picture(samples.arrays(trajectory.x[-1]), condition)
            plotting.save(path, picture)
        return figures | {"samples": str(path.relative_to(folder))}
    if samples.picture is None:
        return figures
    near, far = plotting.limits(data.held_out, margin=0.1), plotting.limits(trajectory.x)
    density = _densities(trained, near, config.side, (1.0,))[0]
    densities = _densities(trained, far, config.side // 2, trajectory.t) if config.frames else []
    if cluster.is_main():
        plotting.save(path, plotting.plane(data.held_out[:4000], trajectory.x, density, near))
    if cluster.is_main() and config.frames:
        pictures = plotting.plane_frames(trajectory.x, densities, far, t=trajectory.t)
        plotting.animation(pictures, path.with_suffix(".gif"))
    return figures | {"samples": str(path.relative_to(folder))}


def log_likelihood(data: Data, trained: Trained) -> np.ndarray:
    """log p of the first held-out points in nats, in original units, `[num]`."""
    num = min(trained.config.eval_examples, len(data.held_out))
    say("Log-likelihood of held-out points ...")
    condition = jax.tree.map(lambda x: x[:num], data.held_out_conditions)
    given = _spread(trained.config, (data.held_out[:num], condition))
    return (
        sharding.gathered(_log_prob(trained.task.velocity, trained.params, *given)) - data.log_scale
    )


def _spread(config: Any, arrays: Any) -> Any:
    return jax.tree.map(lambda x: sharding.spread(np.asarray(x), mesh(config)), arrays)


# The parameters are arguments: other processes' parts of them can't be closed over.


@functools.partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _flow(
    velocity: Any,
    params: Any,
    x0: jax.Array,
    condition: Any,
    solver: Any,
    num_steps: int | None,
    num_times: int,
) -> fm.Trajectory:
    ts = jnp.linspace(0.0, 1.0, num_times)
    return fm.integrate(velocity(params, condition), x0, ts=ts, solver=solver, num_steps=num_steps)


@functools.partial(jax.jit, static_argnums=0)
def _log_prob(velocity: Any, params: Any, x: jax.Array, condition: Any) -> jax.Array:
    return fm.log_prob(velocity(params, condition), x)


def _densities(trained: Trained, extent: Any, side: int, ts: Sequence[float]) -> np.ndarray:
    """The density at several times on a square grid, `[num_times, side, side]`, for the eye."""
    grid = plotting.grid_points(extent, side)
    (x,) = _spread(trained.config, (grid,))
    found = [
        sharding.gathered(_density(trained.task.velocity, trained.params, x, t))
        if t > 0
        else np.exp(fm.standard_normal_log_prob(jnp.asarray(grid)))
        for t in ts
    ]
    return np.stack(found).reshape(-1, side, side)


@functools.partial(jax.jit, static_argnums=0)
def _density(velocity: Any, params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    # Equal steps: an untrained velocity may be stiff, and a picture is not worth minutes.
    return jnp.exp(
        fm.log_prob(velocity(params, None), x, t1=t, solver=diffrax.Heun(), num_steps=20)
    )
