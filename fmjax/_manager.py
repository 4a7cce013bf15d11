"""Orbax's manager, and the errors that say in words what became of a checkpoint."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import orbax.checkpoint as ocp


class Damaged(NamedTuple):
    """A checkpoint that is not what was saved.

    Attributes:
      step: its step.
      reason: what was found.
    """

    step: int
    reason: str


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved; `damaged` lists the steps with the reasons."""

    def __init__(self, folder: Any, damaged: Sequence[Damaged], mend: str):
        self.damaged = tuple(damaged)
        lines = "".join(f"  step {step}: {reason}\n" for step, reason in damaged)
        super().__init__(
            f"A checkpoint must be what was saved; damaged in {folder}:\n{lines}{mend}"
        )


class CheckpointSaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class Manager(ocp.CheckpointManager):
    """Orbax's manager; the error of a save in the background says what was not written.

    It is raised once, by whatever waits first: the next save, `wait_until_finished` or `close`.
    """

    _failed: CheckpointSaveError | None = None

    def wait_until_finished(self) -> None:
        step = self.latest_step()  # the one in progress, if any is
        try:
            super().wait_until_finished()
        except Exception as error:
            self._failed = save_error(self, step, error)
            raise self._failed from error

    def close(self) -> None:
        told, step = self._failed is not None, self.latest_step()
        for finish in (self.wait_until_finished, super().close):
            try:
                finish()
            except CheckpointSaveError:  # kept in _failed
                pass
            except Exception as error:  # Orbax's parts may raise one error twice
                self._failed = self._failed or save_error(self, step, error)
        if self._failed is not None and not told:
            raise self._failed


def save_error(manager: ocp.CheckpointManager, step: Any, error: Exception) -> CheckpointSaveError:
    """The error of a save, in words: the step, the reason, the last good step, the mend."""
    good = [n for n in ocp.utils.checkpoint_steps(manager.directory) if n != step]
    last = f"the last good one is step {max(good)}" if good else "there is no earlier one"
    return CheckpointSaveError(
        f"The checkpoint of step {step} was not written to {manager.directory}: "
        f"{_system_reason(error)}; {last}. Make room there, or mend the disk, and start again."
    )


def _system_reason(error: BaseException) -> str:
    """What the system says ("No space left on device"), where it is behind the error."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(code[1]) if code else None
    return reason_of(error) if number is None else os.strerror(number)


def reason_of(error: BaseException) -> str:
    """The first cause of an error in one short line, without TensorStore's specifications."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = re.sub(r" \[(tensorstore_spec|source locations|os_error_code)=?.*", "", str(error))
    first = (first.strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-190:]}"
