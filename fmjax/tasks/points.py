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
from fmjax.harness import cluster
from fmjax.harness.config import RunConfig, mesh
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
      batch: `rows -> batch` of the training data; None for `x1[rows]`.
      held_out_batch: the same of the held-out ones.
      arrays: `x1 [num, D] -> {name: array}`, what is kept of samples, in original units; None for
        the points as they are.
      condition: `rows -> [num, ...]`, the condition of the k-th sample; None for none.
      null: the condition that stands for none.
      given: `values -> condition` of one sample, in original units; None for none.
      held_out_conditions: of the held-out points; None for none.
      log_scale: as in `Points`.
      picture: `arrays -> picture`, of samples that are not drawn as a flow in the plane.
      facts: what else a run folder keeps of the data, as JSON can hold it.
    """

    x1: np.ndarray
    held_out: np.ndarray
    evaluated: Callable[[], Points]
    batch: Callable[[np.ndarray], Any] | None = None
    held_out_batch: Callable[[np.ndarray], Any] | None = None
    arrays: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    condition: Callable[[np.ndarray], Any] | None = None
    null: Any = None
    given: Callable[[tuple[float, ...]], Any] | None = None
    held_out_conditions: Any = None
    log_scale: float = 0.0
    picture: Callable[[dict[str, np.ndarray]], np.ndarray] | None = None
    facts: dict[str, Any] | None = None


def make_mlp(config: PointConfig) -> models.MLP:
    """The MLP that the flags describe."""
    return models.MLP(**dataclasses.asdict(config.model))


def make_task(
    config: PointConfig,
    data: Data,
    init: Init,
    step: training.TrainStep,
    velocity: Callable[[Any, Any], fm.Velocity],
) -> Task:
    """The task of an experiment on points, from what differs between them.

    Args:
      config: its flags.
      data: its points.
      init: `key -> TrainState`.
      step: `(state, key, batch) -> (state, metrics)`.
      velocity: `(params, condition) -> Velocity`.
    """
    in_the_plane = data.x1.shape[1] == 2
    return Task(
        num_examples=len(data.x1),
        batch=data.batch or (lambda rows: data.x1[rows]),
        init=init,
        step=step,
        velocity=velocity,
        finish=functools.partial(finish, data),
        evaluate=lambda trained, folder, flags: evaluation.evaluate(
            data.evaluated(), trained, folder, flags
        ),
        preview=functools.partial(preview, data) if in_the_plane or data.picture else None,
        samples=Samples(
            fm.standard_normal(data.x1.shape[1:]),
            functools.partial(_arrays, data),
            data.condition,
            data.null,
            picture=_picture_of(data),
            given=data.given,
        ),
        num_held_out=len(data.held_out),
        held_out=data.held_out_batch or (lambda rows: data.held_out[rows]),
        data=lambda: (
            {
                "num_examples": len(data.x1),
                "event_shape": list(data.x1.shape[1:]),
                "sha256": digests.hash_array(data.x1),
            }
            | (data.facts or {})
        ),
    )


def _arrays(data: Data, x1: np.ndarray) -> dict[str, np.ndarray]:
    return {"x": x1} if data.arrays is None else data.arrays(x1)


def _picture_of(data: Data) -> Any:
    """What draws samples: points in the plane, or the picture that the data bring."""
    draw = data.picture
    if draw is not None:
        return lambda arrays, condition: draw(arrays)
    if data.x1.shape[1] != 2:
        return None
    return lambda arrays, condition: plotting.trajectories(np.stack(2 * [*arrays.values()][:1]))


def preview(data: Data, trained: Trained, key: jax.Array) -> np.ndarray:
    """Ways of 500 points, or where they end, in ten steps of Heun's."""
    rows = np.arange(500)
    x0 = np.asarray(jax.random.normal(key, (len(rows), *data.x1.shape[1:])))
    condition = None if data.condition is None else data.condition(rows)
    given = _spread(trained.config, (x0, condition))
    x = sharding.gathered(
        _flow(trained.task.velocity, trained.params, *given, diffrax.Heun(), 10, 11)
    ).x
    return plotting.trajectories(x) if data.picture is None else data.picture(_arrays(data, x[-1]))


def finish(data: Data, trained: Trained, folder: pathlib.Path, key: jax.Array) -> dict[str, Any]:
    """Trajectories, the log-likelihood of held-out points, and in the plane the density."""
    config, figures = trained.config, {}
    if config.num_samples:
        figures |= draw_samples(data, trained, folder, key)
    if config.eval_examples:
        log_p = log_likelihood(data, trained)
        figures |= {
            "log_likelihood": float(log_p.mean()),
            "log_likelihood_standard_error": standard_error(log_p),
            "log_likelihood_method": (
                f"nats per point, {len(log_p)} held-out points; exact divergence, Tsit5, tolerance "
                "1e-5; EMA parameters"
            ),
        }
    return figures


def draw_samples(
    data: Data, trained: Trained, folder: pathlib.Path, key: jax.Array
) -> dict[str, Any]:
    """Draws samples over all devices; in the plane their ways, the density and an animation."""
    config, shape = trained.config, data.x1.shape[1:]
    rows = np.arange(config.num_samples)
    say(f"Drawing {len(rows)} samples ...")
    x0 = np.asarray(jax.random.normal(key, (len(rows), *shape)))
    condition = None if data.condition is None else data.condition(rows)
    given = _spread(config, (x0, condition))
    num_times = config.frames or 21
    trajectory = sharding.gathered(
        _flow(trained.task.velocity, trained.params, *given, diffrax.Tsit5(), None, num_times)
    )
    path = folder / "samples" / f"step_{trained.step:08d}.png"
    figures = {
        "num_evaluations": int(trajectory.num_evaluations),
        "sampler": "Tsit5, tolerance 1e-5, EMA parameters",
    }
    if shape != (2,) or condition is not None or data.picture is not None:
        if data.picture is None:
            return figures
        if cluster.is_main():
            plotting.save(path, data.picture(_arrays(data, trajectory.x[-1])))
        return figures | {"samples": str(path.relative_to(folder))}
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
