"""Reflow: a trained flow's own network trained again, on the pairs that its flow makes.

    python -m experiments.reflow --teacher runs/digits

The teacher carries noise x0 to x1 = phi(0, 1, x0); flow matching on these pairs instead of
independent ones keeps the distribution of x1 and straightens the paths, so that few steps do. The
network begins with the teacher's parameters. Times have the density that is proportional to
e^(4 t) + e^(4 (1 - t)), most at both ends (Lee et al. 2024, arXiv 2405.20320). Any run folder whose
path is `cond_ot` can be the teacher.

`summary.json` holds the mean straightness of both flows over unseen noise, the integral of
|u - (x1 - x0)|^2 / D along a path (0 where it is a straight line passed at a constant speed), the
mean cost of transport |x1 - x0|^2 / D, and how far one Euler step ends from the flow's own end, in
root mean square.
"""

import dataclasses
import functools
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import flow_maps, harness
from fmjax.harness.share import put
from fmjax.tasks import pairs

NUM_UNSEEN = 256


@dataclasses.dataclass(frozen=True)
class Config(pairs.PairsConfig):
    """Flow matching on the pairs of a trained flow."""

    num_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 5e-4
    warmup_steps: int = 100
    ema_decay: float = 0.99
    checkpoint_every: int = 400


def draw(key: jax.Array, batch: pairs.PairBatch) -> tuple[fm.PathSample, Any]:
    """All that is random in a step: the times. Noise came with its pair."""
    t = fm.u_shaped(4.0)(key, batch.x0.shape[:1])
    return fm.sample_path(fm.cond_ot(), batch.x0, batch.x1, t), batch.condition


def make_task(config: Config) -> harness.Task:
    teacher = pairs.TeacherPairs(config)
    task = teacher.task

    def loss(params, key, drawn):
        del key  # the network is trained as it is drawn from, without dropout
        path_sample, condition = drawn
        return fm.cfm_loss(task.velocity(params, condition), path_sample)

    def jump(params, key, x0, condition, num_steps):
        del key
        velocity = task.velocity(params, condition)
        return fm.sample(velocity, x0, solver=diffrax.Euler(), num_steps=num_steps)

    init, step = harness.from_loss(
        draw,
        loss,
        harness.optimizer(config),
        lambda key: task.init(key).params,
        ema_decay=config.ema_decay,
    )
    return task._replace(
        num_examples=config.num_pairs,
        batch=teacher.batch,
        init=init,
        step=step,
        finish=functools.partial(finish, teacher),
        evaluate=_as_teacher(teacher, task.evaluate),
        preview=_as_teacher(teacher, task.preview),
        # The pairs are of known conditions: what the network makes of none is not trained, nor
        # what a teacher with a horizon makes of one.
        samples=None if task.samples is None else task.samples._replace(null=None, jump=jump),
        num_held_out=0,
        held_out=None,
        about="XLA's kernels, float32",  # the teacher's are for its own training
        data=teacher.describe,
    )


def _as_teacher(teacher: pairs.TeacherPairs, act: Any) -> Any:
    """What the teacher's task does with a run, done with a student."""
    if act is None:
        return None
    return lambda trained, *others: act(teacher.as_teacher(trained), *others)


def finish(
    teacher: pairs.TeacherPairs, trained: harness.Trained, folder: Any, key: jax.Array
) -> dict[str, Any]:
    """How straight the paths were and are; then what the teacher's task does at its end."""
    key_x0, key_task = jax.random.split(key)
    x0 = np.asarray(trained.source.sample(key_x0, NUM_UNSEEN))
    condition = trained.condition(np.arange(NUM_UNSEEN))
    tolerance = trained.config.pair_tolerance

    @jax.jit
    def measure(params: Any, x0: jax.Array, condition: Any) -> dict[str, jax.Array]:
        velocity = trained.velocity(params, condition)
        exact = diffrax.PIDController(rtol=tolerance, atol=tolerance)
        straight = flow_maps.straightness(velocity, x0, stepsize_controller=exact)
        x1 = fm.sample(velocity, x0, stepsize_controller=exact)
        one_step = fm.sample(velocity, x0, solver=diffrax.Euler(), num_steps=1)
        return {
            "straightness": jnp.mean(straight),
            "transport_cost": jnp.mean(flow_maps.transport_cost(x0, x1)),
            "one_step_rms": jnp.sqrt(jnp.mean(jnp.square(one_step - x1))),
        }

    figures: dict[str, Any] = {}
    for when, params in (("before", teacher.trained().params), ("after", trained.params)):
        measured = jax.device_get(measure(params, *put((x0, condition))))
        figures |= {f"{name}_{when}": float(value) for name, value in measured.items()}
    if teacher.task.finish is not None:
        figures |= teacher.task.finish(teacher.as_teacher(trained), folder, key_task)
    return figures


if __name__ == "__main__":
    harness.main(Config, make_task, __doc__)
