"""A run folder: what a run leaves there, and how it resumes from it.

A run folder holds

    config.json      what made the run (its task and class of flags, both importable), the flags,
                     versions, devices, global batch, what the data are
    checkpoints/     the latest three states, and milestones (Orbax)
    compiled/        programs (JAX's persistent cache, unless another is set). A restart runs them:
                     delete it in a folder that comes from others
    metrics.jsonl    loss and gradient norm, means over the steps since the line before, learning
                     rate, examples/s, and the held-out loss: a line every `log_every` steps
    window.json      what the next line's means are of, as far as the last checkpoints
    tensorboard/     the same as TensorBoard events, and the previews
    loss.png         the loss curve
    samples/         pictures, previews among them
    summary.json     the figures at the end
    lock             held by the process that runs here
    not_finite_*.npz batches whose loss or gradient was not finite

A run that is started again in its folder resumes from the last checkpoint. In a pod all processes
share the folder, which may be a bucket's (`places` says how); process 0 writes all but the
checkpoints.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fmjax import plotting, training
from fmjax.harness import command, places
from fmjax.harness.config import FREE, RunConfig, flags
from fmjax.harness.events import Events
from fmjax.harness.pods import cluster, peers
from fmjax.harness.records import (
    address,
    claim,
    compiled_in,
    disk_failure,
    environment,
    write_json,
    write_text,
    writing,
)
from fmjax.training import checkpoints


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In what two records of data differ, in words; empty where they don't."""
    now = json.loads(json.dumps(now))
    names = [name for name in before if before[name] != now.get(name)]
    return ", ".join(f"{name}: was {before[name]}, is {now.get(name)}" for name in names)


class Run:
    """An open run folder. Use it as a context manager: leaving it finishes what is being written.

    A start that fails before its first step leaves no folder where there was none.

    Args:
      name: of the experiment.
      config: its flags.
      data: what the data are, as JSON can hold it: shapes, numbers, a hash. A run resumes on the
        same alone.
      make_task: what made its task, a function that can be imported.

    Raises:
      ValueError: if the folder can't be written, holds a run with other flags or other data, which
        are listed, or one that is further than `num_steps`, or if another process is running there.
      DiskError: on leaving, if one of the folder's files could not be written.
    """

    def __init__(
        self,
        name: str,
        config: RunConfig,
        data: dict[str, Any] | None = None,
        make_task: Callable[..., Any] | None = None,
    ):
        self.address = config.folder
        self._place = places.place(self.address, config.bucket_patience)
        self.folder = self._place.folder
        self.config = config
        self._made = [parent for parent in self.folder.parents if not parent.exists()]
        self._place.reach()
        self.begun = True  # whether there is anything to keep
        self._flags = flags(config)
        self._ends, self._failed = contextlib.ExitStack(), False  # the last begun ends first
        try:
            self._ends.callback(lambda: self._place.close(forget=self._forgets()))
            self.begun = self.address.exists()
            if lock := cluster.main_first(lambda: claim(self.folder)):
                self._ends.enter_context(lock)
            self._ends.callback(self._forget)
            places.check_shared(self.address)
            with writing(self.folder, lambda: "nothing was begun"):
                self._manager = checkpoints.open_manager(
                    self.address / "checkpoints", keep_every=config.keep_every
                )
            self._ends.callback(self._manager.close)
            self._place.watch(self._manager.is_saving_in_progress, self._kept)
            self._check_config()
            self._check_data(data)
            self._check_num_steps()
            if places.in_bucket(self.address):
                self._place.open()
                self._manager.reload()  # whoever had it may have completed one since
        except (ValueError, OSError):
            self._close(failed=True)
            raise
        self._record = {"experiment": name, "config": self._flags} | environment()
        # Whoever reads it imports these.
        self._record |= {"config_class": address(type(config))}
        self._record |= {} if make_task is None else {"make_task": address(make_task)}
        self._record |= {"global_batch": config.batch_size}
        self._record |= {} if data is None else {"data": data}
        self.seconds = 0.0  # of training, earlier starts included
        self._events = None
        self._saving: int | None = None  # the step of the last save

    def __enter__(self) -> "Run":
        self._compiled = contextlib.ExitStack()
        self._compiled.enter_context(compiled_in(self.folder / "compiled"))
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        peers.end_if_one_is_gone(error)  # before anything waits for it
        with writing(self.folder, self._kept):
            try:
                self._compiled.close()
                if self._events is not None:
                    self._events.close()
                self._close(failed=error is not None)
            except Exception:
                if error is None:  # else it is the same failure once more
                    raise
            if error is not None and disk_failure(self.folder, error):
                raise error

    def _kept(self) -> str:
        """What a run that can't go on leaves to the next start."""
        if places.in_bucket(self.address):  # without asking it
            last = self._saving if self._manager.is_saving_in_progress() else None
            steps = [step for step in self._manager.all_steps() if step != last]
        else:
            steps = checkpoints.steps_in(self.address / "checkpoints")
        return f"the last good checkpoint is step {max(steps)}" if steps else "no step is saved"

    def _close(self, *, failed: bool) -> None:
        self._failed = failed
        self._ends.close()

    def _forgets(self) -> bool:
        """Whether this start failed before there was anything to keep."""
        return self._failed and not self.begun

    def _forget(self) -> None:
        """Removes what a start that failed has made, where nothing was there before.

        Of the folder only what is the harness's own: a file of somebody else's keeps it.
        """
        if not self._forgets() or not cluster.is_main():
            return
        for name in ("checkpoints", "compiled", "tensorboard"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("config.json", "metrics.jsonl", "window.json", "lock", "scratch.lock"):
            (self.folder / name).unlink(missing_ok=True)
        for folder in (self.folder / "samples", self.folder, *self._made):
            with contextlib.suppress(OSError):  # one that holds anything else
                folder.rmdir()

    def _check_config(self, tries: int = 3) -> None:
        try:
            checkpoints.check_config(self._manager, self._flags, free=FREE | self._unknown())
        except FileNotFoundError:  # a run that is still there has made room for a later one
            if tries == 1:
                raise
            self._manager.reload()
            self._check_config(tries - 1)
        except checkpoints.DamagedCheckpointError:
            raise
        except ValueError as error:
            raise ValueError(f"{error} {self._elsewhere()}") from None

    def _elsewhere(self) -> str:
        """The command that would work: the same one in a folder of its own."""
        names = (self.address.with_name(f"{self.address.name}-{k}") for k in itertools.count(2))
        free = next(path for path in names if not path.exists())
        return f"A run of its own: {command.again('--workdir', str(free))}"

    def _check_data(self, data: dict[str, Any] | None) -> None:
        path = self.address / "config.json"
        if data is None or checkpoints.latest_step(self._manager) is None or not path.is_file():
            return
        try:
            before = json.loads(path.read_text()).get("data", data)
        except (ValueError, AttributeError):  # torn: it is written anew
            return
        if lines := differences(before, data):
            raise ValueError(
                f"A run must resume on its own data; that of {self.address} differs in {lines}. "
                f"Bring the data back. {self._elsewhere()}"
            )

    def _unknown(self) -> set[str]:
        """Flags that the run did not know when it began, and that have their default."""
        stored = checkpoints.restore_config(self._manager) or self._flags
        fields = dataclasses.fields(self.config)
        return {
            field.name
            for field in fields
            if field.name not in stored and getattr(self.config, field.name) == field.default
        }

    def _check_num_steps(self) -> None:
        step = checkpoints.latest_step(self._manager) or 0
        if step > self.config.num_steps:
            raise ValueError(
                f"--num-steps must be at least the {step} steps that {self.address} has done; got "
                f"{self.config.num_steps}. {self._elsewhere()}"
            )

    def restore(self, state: training.TrainState) -> training.TrainState:
        """The latest checkpoint, or `state` where there is none; metrics after it are dropped."""
        damaged = ()
        if checkpoints.latest_step(self._manager) is not None:
            state, damaged = checkpoints.restore_latest_good(self._manager, state)
        step = int(state.step)
        if cluster.is_main():
            for bad, reason in damaged:
                print(
                    f"The checkpoint of step {bad} in {self.address} is damaged and was put aside: "
                    f"{reason}. The run resumes from step {step}.",
                    file=sys.stderr,
                )
        cluster.main_first(lambda: self._go_on(step))
        return state

    def _go_on(self, step: int) -> None:
        write_json(self.folder / "config.json", self._record)  # not before a checkpoint was good
        kept = [row for row in self.metrics() if row["step"] <= step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        lines = "".join(json.dumps(row) + "\n" for row in kept)
        write_text(self.folder / "metrics.jsonl", lines)
        self._open_events(step)

    def _open_events(self, step: int) -> None:
        """A new file for what follows this step; the one before is whole, and may be sent."""
        if self._events is not None:
            self._events.close()
        self._events = Events(self.folder / "tensorboard", step + 1)
        self._place.hold(self._events.path)

    def begin(self) -> None:
        """From here on the folder is worth keeping."""
        self.begun = True
        self._place.send()

    @property
    def saved_step(self) -> int | None:
        """The step of the last complete checkpoint; one that is being written is waited for."""
        self._manager.wait_until_finished()
        return checkpoints.latest_step(self._manager)

    def save(self, state: training.TrainState, *, wait: bool = False) -> None:
        if self._manager.is_saving_in_progress() and cluster.is_main():
            print(f"The checkpoint of step {int(state.step)} waits until the last one is written.")
        if places.in_bucket(self.address):
            cluster.main_first(self._place.check)
            if self._events is not None:
                self._open_events(int(state.step))
        self._saving = int(state.step)
        checkpoints.save(self._manager, state, self._flags, wait=wait)

    def log(self, step: int, row: dict[str, float]) -> None:
        """A line in metrics.jsonl, and the same for TensorBoard; by process 0."""
        if self._events is None:
            return
        row = row | {"seconds": round(self.seconds, 3)}
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | plain) + "\n")
        self._events.scalars(step, {f"train/{name}": value for name, value in row.items()})

    def window(self, step: int) -> list[list[float]]:
        """Loss and gradient norm of each step since the line before the checkpoint of this one."""
        return self._windows().get(str(step), [])

    def _windows(self) -> dict[str, list[list[float]]]:
        path = self.folder / "window.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def keep_window(self, step: int, window: list[list[float]]) -> None:
        """Keeps what `window` reads, for the latest checkpoints; by process 0."""
        if self._events is None:
            return
        path = self.folder / "window.json"
        if window or path.exists():
            known = {name: row for name, row in self._windows().items() if int(name) < step}
            write_json(
                path, dict(list(known.items())[-3:]) | ({str(step): window} if window else {})
            )

    def preview(self, step: int, picture: np.ndarray) -> None:
        """Keeps a picture of this step in samples/ and for TensorBoard; by process 0."""
        if self._events is None:
            return
        path = self.folder / "samples" / f"preview_{step:08d}.png"
        plotting.save(path, picture)
        self._events.image(step, "preview", picture.shape, path.read_bytes())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, None for what was not finite.

        A last line that a kill cut short is left out.
        """
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes summary.json and says where everything is; by process 0."""
        if not cluster.is_main():
            return
        path = self.folder / "summary.json"
        rows = self.metrics()
        summary |= {"loss": rows[-1]["loss"]}
        if held_out := [row["held_out_loss"] for row in rows if "held_out_loss" in row]:
            summary |= {"held_out_loss": held_out[-1]}
        if summary["examples_per_second"] is None and path.exists():  # no step was taken this time
            old = json.loads(path.read_text())
            summary |= {"examples_per_second": old.get("examples_per_second")}
        plotting.save(self.folder / "loss.png", plotting.loss_curve(rows))
        write_json(path, summary)
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        print(f"\nRun folder  {self.address}")
        for name in ("samples", "loss.png", "summary.json", "metrics.jsonl", "checkpoints"):
            print(f"  {self.address / name}")
        print(
            f"  {self.address / 'tensorboard'}  (pip install tensorboard; tensorboard --logdir ...)"
        )
