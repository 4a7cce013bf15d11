"""From a run folder to a table: likelihood, sample quality and true cost, each with its error.

    fmjax evaluate runs/digits

Writes evaluation.json, evaluation.md and pictures into RUN_FOLDER/evaluation. Started again, it
resumes where it was: batches of samples and log-densities that are on disk are not computed again.
What is measured is the task's own affair, `Task.evaluate`; a task without one has its held-out loss
measured. Of a pod all processes compute, with the flags `--cluster.*` of training and the run
folder on a disk that they share or in a bucket; process 0 merges, prints and draws.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from fmjax.evaluation import drawing, protocol, report
from fmjax.evaluation.errors import standard_error
from fmjax.evaluation.protocol import Config as Config
from fmjax.harness import keys, places
from fmjax.harness.pods import cluster
from fmjax.harness.read import read
from fmjax.harness.records import lock, writing
from fmjax.harness.run import differences
from fmjax.harness.task import Trained


def main(config: Config) -> dict[str, Any]:
    cluster.join(config.cluster)
    protocol.check(config)
    config = dataclasses.replace(config, run=places.as_path(config.run))
    trained = read(config.run, average=config.average, guidance=config.guidance)
    if config.curve_jumps != Config.curve_jumps:
        drawing.check_jumps(trained)
    check_data(trained)
    address = config.run / "evaluation"
    with places.at_hand(address) as folder, writing(folder, lambda: "what is computed stays"):
        with cluster.main_first(lambda: _claim(folder)) or contextlib.nullcontext():
            result = (trained.task.evaluate or held_out_loss)(trained, folder, config)
            cluster.main_first(lambda: report.write(folder, result))
    if cluster.is_main():
        _tell(address, result)
    return result


def _claim(folder: pathlib.Path) -> contextlib.ExitStack:
    folder.mkdir(exist_ok=True)
    return lock(folder)


def _tell(folder: places.Folder, result: dict[str, Any]) -> None:
    print(f"\n{report.table(result)}")
    for line in result.get("larger_budget", []):
        print(line)
    print(f"\nEvaluation folder  {folder}")


def check_data(trained: Trained) -> None:
    """Refuses data that are not those which the run was trained on.

    Else what it learnt by heart could be among what is held out.
    """
    if trained.config.known is None or trained.task.data is None:
        return
    if lines := differences(trained.config.known, trained.task.data()):
        raise ValueError(
            f"The data must be those that {trained.config.folder} was trained on; they differ in "
            f"{lines}. Bring them back."
        )


def held_out_loss(trained: Trained, folder: pathlib.Path, config: Config) -> dict[str, Any]:
    """The training loss of held-out examples, at the parameters that are evaluated.

    In a pod process 0 measures it alone.
    """
    return cluster.main_first(lambda: _held_out_loss(trained, config)) or {}


def _held_out_loss(trained: Trained, config: Config) -> dict[str, Any]:
    task = trained.task
    if task.held_out is None or not task.num_held_out:
        raise ValueError(
            f"An evaluation needs Task.evaluate, or held-out examples for a loss; the task of "
            f"{trained.config.folder} has neither. Give it held_out and num_held_out."
        )
    num = min(task.num_held_out, config.eval_examples)
    size = min(config.batch_size, num)
    state = jax.eval_shape(task.init, jax.random.key(0))
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    state = state._replace(params=trained.params)
    loss = jax.jit(lambda state, key, batch: task.step(state, key, batch)[1].loss)
    key = keys.key(config.seeds[0], "held out")
    values = [
        float(loss(state, jax.random.fold_in(key, k), task.held_out(k * size + np.arange(size))))
        for k in range(num // size)  # as in a run's previews
    ]
    error = standard_error(np.asarray(values))
    figure = f"{np.mean(values):.4f}" + ("" if error is None else f" ± {error:.4f}")
    how = f"{len(values) * size} held-out examples in batches of {size}"
    return {
        "protocol": protocol.record(config, trained),
        "held_out_loss": float(np.mean(values)),
        "held_out_loss_standard_error": error,
        "rows": [["held-out loss", figure, how]],
    }
