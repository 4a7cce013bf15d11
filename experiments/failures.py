"""Steps whose loss or gradient is not finite: counted, written down, and the end of a run."""

from typing import Any

import jax
import numpy as np
import optax

from experiments import cluster
from experiments.run import Run
from fmjax import training


class NotFinite:
    """Counts them; one more than `max_skipped_steps` stops the run.

    Args:
      run: the open run folder.
      state: the state that the run goes on from, whose optimiser has counted those before.
    """

    def __init__(self, run: Run, state: training.TrainState):
        self._run = run
        before: Any = optax.tree.get(state.opt_state, "total_notfinite", default=0)
        self._count = int(before)

    def note(self, step: int, metrics: training.Metrics, rows: np.ndarray, x1: np.ndarray) -> None:
        """Writes the step's batch down; returns if it may be skipped.

        Args:
          step: counted from 1.
          metrics: of the step, floats.
          rows: the examples' numbers in the data set, `[local_batch]`.
          x1: the examples, `[local_batch, *event]`.

        Raises:
          FloatingPointError: if there have been too many.
        """
        self._count += 1
        try:
            dump = f"in {self._dump(step, metrics, rows, x1)}"
        except OSError as error:
            dump = f"not kept: {error.strerror}"
        most = self._run.config.max_skipped_steps
        what = (
            f"The loss of step {step} is {metrics.loss}, its gradient's norm "
            f"{metrics.gradient_norm}; its batch is {dump}."
        )
        if self._count <= most:
            if cluster.is_main():
                print(f"\n{what} The step is left out, {self._count} of {most}.", flush=True)
            return
        saved = self._run.saved_step
        good = "there is no checkpoint" if saved is None else f"the last good one is step {saved}"
        raise FloatingPointError(
            f"{what} The run stops; of the checkpoints in {self._run.folder} {good}. A lower "
            "--learning-rate is the usual mend; --max-skipped-steps, in another folder, leaves "
            "such steps out."
        )

    def _dump(self, step: int, metrics: training.Metrics, rows: np.ndarray, x1: np.ndarray) -> Any:
        """The batch of this process: with the checkpoint before and the run's flags, all of it."""
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._run.folder / f"not_finite_step_{step:08d}{process}.npz"
        np.savez(
            path,
            step=step,
            seed=self._run.config.seed,
            loss=metrics.loss,
            gradient_norm=metrics.gradient_norm,
            rows=rows,
            x1=x1,
            checkpoint=-1 if self._run.saved_step is None else self._run.saved_step,
        )
        return path
