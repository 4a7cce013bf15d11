"""Steps whose loss or gradient is not finite: counted, written down, and the end of a run."""

from typing import Any

import jax
import numpy as np
import optax

from fmjax import training
from fmjax.harness.pods import cluster
from fmjax.harness.records import disk_failure, write_whole
from fmjax.harness.run import Run


class NotFinite:
    """Counts them; one more than `max_skipped_steps` stops the run.

    Args:
      run: the open run folder.
      state: the state that the run resumes from, whose optimiser has counted those before.
    """

    def __init__(self, run: Run, state: training.TrainState):
        self._run = run
        before: Any = optax.tree.get(state.opt_state, "total_notfinite", default=0)
        self._count = int(before)

    def note(self, step: int, metrics: training.Metrics, rows: np.ndarray, batch: Any) -> None:
        """Writes the step's batch down; returns if it may be skipped.

        Args:
          step: counted from 1.
          metrics: of the step, floats.
          rows: the examples' numbers in the data set, `[local_batch]`.
          batch: the examples, a pytree of arrays `[local_batch, ...]`.

        Raises:
          FloatingPointError: if there have been too many.
        """
        self._count += 1
        try:
            dump = f"in {self._dump(step, metrics, rows, batch)}"
        except Exception as error:
            reason = disk_failure(self._run.folder, error)
            if reason is None:
                raise
            dump = f"not kept: {reason}"
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
            f"{what} The run stops; of the checkpoints in {self._run.address} {good}. A lower "
            "--learning-rate is the usual fix; --max-skipped-steps, in another folder, leaves "
            "such steps out."
        )

    def _dump(self, step: int, metrics: training.Metrics, rows: np.ndarray, batch: Any) -> Any:
        """The batch of this process: with the checkpoint before and the run's flags, all of it."""
        process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._run.folder / f"not_finite_step_{step:08d}{process}.npz"
        arrays: dict[str, Any] = {"step": step, "seed": self._run.config.seed}
        arrays |= {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm}
        leaves = jax.tree.leaves_with_path(batch)
        arrays |= {"rows": rows}
        arrays |= {f"batch{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
        arrays["checkpoint"] = -1 if self._run.saved_step is None else self._run.saved_step
        write_whole(path, lambda file: np.savez(file, **arrays))
        return path
