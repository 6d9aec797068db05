"""Saving: training waits for a copy of the state into host memory; a thread of each rank writes it, rank 0's commits.

The writing threads use no collectives: they meet in the checkpoint's folder (`megamoe.checkpoint`), each wait bounded
by checkpoint.save_timeout_seconds. Only while a save is under way do the ranks ask each other, once a step and with one
small all-reduce, whether it is done or has failed, so that all of them go on, or stop, together.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist

from megamoe.checkpoint.commit import begin, commit, report_failure
from megamoe.checkpoint.layouts import layout_of
from megamoe.checkpoint.slices import Slice
from megamoe.checkpoint.writer import write_rank
from megamoe.errors import CheckpointError, MegamoeError
from megamoe.phases import phase
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from megamoe.training.agreement import agreed_nonce, any_of, first_message
from megamoe.training.host_copy import HostCopy, live_arrays
from megamoe.training.optimizer_state import num_optimizer_steps
from megamoe.training.state import owned

if TYPE_CHECKING:
    from megamoe.training.build import Trainer

POLL_SECONDS = 0.2
OVERDUE_SECONDS = 30.0  # beyond the writers' own limit: what is not back then hangs in the file system
SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

Say = Callable[[str], None]
Note = Callable[..., None]  # (kind, message, **details) of an event: see `megamoe.runs.events`


@dataclass
class _Save:
    """One save under way on this rank."""

    step: int
    save_id: str
    started: float
    deadline: float
    keep_best: tuple[int, ...] = ()  # steps of the best validations so far, the best last
    thread: threading.Thread | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    error: str | None = None
    is_reported: bool = False

    @property
    def is_running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class CheckpointSaver:
    """Writes checkpoints of one trainer into its run's folder, at most one at a time.

    Every method but `save_memory_bytes` is collective over all ranks. `say` prints a line on rank 0; `note` does so and
    keeps it as an event of the run.
    """

    def __init__(self, trainer: "Trainer", run_dir: str, say: Say, note: Note | None = None) -> None:
        self.trainer, self.root, self.say = trainer, checkpoints_path(run_dir), say
        self.note: Note = note if note is not None else lambda kind, message, **_: say(message)
        self.settings = trainer.config.checkpoint
        self.last_step = trainer.step  # of the newest save that was begun: the trainer stands there, or was loaded so
        self.last_failure: str | None = None
        self.own_steps: set[int] = set()  # whose checkpoints this run has written, or came from: not another run's
        self.stall_seconds = 0.0  # how long training stood still for the last copy
        self._nonce, self._num_saves = agreed_nonce(**self._on()), 0
        self._copy: HostCopy | None = None
        self._save: _Save | None = None
        self._stuck: threading.Thread | None = None

    def prepare(self) -> None:
        """Allocate the host memory of an asynchronous save now, so that no save waits for it."""
        if self.settings.async_save and self._copy is None:
            self._copy = HostCopy(owned(self.trainer))

    def save(self, *, wait: bool = False) -> None:
        """Begin a checkpoint of the trainer's state as it is now; with `wait`, or if saves are synchronous, end it.

        A save that is still under way is waited for first. Raises CheckpointError as `poll` does.
        """
        if self._save is not None:
            began = time.monotonic()
            self.wait()
            self.say(f"waited {time.monotonic() - began:.1f} s for the checkpoint before to be written")
        if self._fails_because_stuck():
            return
        wait = wait or not self.settings.async_save
        began = time.monotonic()
        pieces = owned(self.trainer)
        arrays = live_arrays(pieces) if wait and self._copy is None else None
        if arrays is None:
            if self._copy is None:
                self._copy = HostCopy(pieces)
            arrays = self._copy.take(pieces)
        self.stall_seconds = time.monotonic() - began
        self._start(arrays)
        if wait:
            self.wait()

    def poll(self) -> None:
        """Has the save under way ended, or failed on some rank? Called after every step; nothing where none is.

        Raises CheckpointError, the same on every rank, if it failed and checkpoint.on_save_failure is "stop".
        """
        save = self._save
        if save is None:
            return
        is_overdue = save.is_running and time.monotonic() > save.deadline
        runs, failed, overdue = any_of(save.is_running, save.error is not None, is_overdue, **self._on())
        if failed or overdue:
            save.cancelled.set()
        if runs and not overdue:
            if failed:
                self._report(save)
            return
        if save.is_running:  # overdue, here or elsewhere: nobody can end a thread, its memory is left to it
            save.error = f"its writer did not come back within {self.settings.save_timeout_seconds:g} s"
            self._stuck, self._copy = save.thread, None
        self._save = None
        if failed or overdue:
            self._report(save)
        elif not save.is_reported:
            self.last_failure = None
            self.own_steps.add(save.step)
            seconds = time.monotonic() - save.started
            text = f"saved {self.root / checkpoint_name(save.step)} in {seconds:.1f} s"
            self.note("save", text, step=save.step, seconds=seconds)

    def wait(self) -> None:
        """Wait until no save is under way, at most until it is overdue. Raises as `poll` does."""
        while (save := self._save) is not None:
            with phase("save"):  # a sign of life each time: this wait has a limit of its own
                if save.thread is not None:
                    save.thread.join(POLL_SECONDS)
                self.poll()

    def forget_after(self, step: int) -> None:
        """The trainer was taken back to `step`: what it saved later is no state of this run any more."""
        self.own_steps = {each for each in self.own_steps if each <= step}
        self.last_step = step

    def _on(self) -> dict[str, Any]:
        return {"groups": self.trainer.groups, "device": self.trainer.schedule.device}

    def _start(self, arrays: Sequence[tuple[Slice, np.ndarray]]) -> None:
        self._num_saves += 1
        now = time.monotonic()
        save = _Save(
            self.trainer.step, f"{self._nonce}-{self._num_saves}", now,
            now + self.settings.save_timeout_seconds + OVERDUE_SECONDS,
            keep_best=() if self.trainer.best is None else tuple(self.trainer.best.steps),
        )  # fmt: skip
        self.last_step, self._save = save.step, save
        details = {} if dist.get_rank() else commit_details(self.trainer)
        save.thread = threading.Thread(target=self._write, args=(save, arrays, details), daemon=True)
        save.thread.start()

    def _write(self, save: _Save, arrays: Sequence[tuple[Slice, np.ndarray]], details: dict[str, Any]) -> None:
        """The writing thread. Whatever goes wrong is kept for `poll`, and told to the rank that commits."""
        rank, partial = dist.get_rank(), None
        try:
            partial = begin(self.root, save.step, save.save_id)
            write_rank(partial, rank=rank, save_id=save.save_id, step=save.step, slices=arrays)
            if rank == 0:
                commit(
                    self.root, partial, step=save.step, save_id=save.save_id, is_cancelled=save.cancelled.is_set,
                    keep_last=self.settings.keep_last, keep_every_steps=self.settings.keep_every_steps,
                    timeout_seconds=self.settings.save_timeout_seconds, keep_best=save.keep_best, **details,
                )  # fmt: skip
        except Exception as error:  # a defect of ours, too, must reach the training thread
            save.error = str(error) if isinstance(error, MegamoeError) else f"{type(error).__name__}: {error}"
            if partial is not None:
                report_failure(partial, rank, save.error)

    def _report(self, save: _Save) -> None:
        """Tell of a failed save once. Raises CheckpointError if the run is to stop for it."""
        found = first_message(save.error, **self._on())
        if save.is_reported or found is None:
            return
        save.is_reported = True
        self._fail(save.step, f"rank {found[0]}: {found[1]}")

    def _fail(self, step: int, reason: str) -> None:
        self.last_failure = f"the checkpoint of step {step} could not be saved: {reason}"
        if self.settings.on_save_failure == "stop":
            self.note("save_failed", self.last_failure, step=step)
            raise CheckpointError(f"{self.last_failure} (checkpoint.on_save_failure is stop)")
        text = f"{self.last_failure}; training goes on, earlier checkpoints are whole"
        self.note("save_failed", text, step=step)

    def _fails_because_stuck(self) -> bool:
        is_stuck = self._stuck is not None and self._stuck.is_alive()
        if not any_of(is_stuck, **self._on())[0]:
            self._stuck = None
            return False
        self._fail(self.trainer.step, "the writer of an earlier one still hangs in the file system")
        return True


def commit_details(trainer: "Trainer") -> dict[str, Any]:
    """What rank 0 writes into the manifest besides the tensors."""
    return {
        "num_ranks": trainer.groups.grid.world,
        "state": trainer_state(trainer),
        "config": trainer.config.model_dump(mode="json"),
        "layout": layout_here(trainer),
    }


def layout_here(trainer: "Trainer") -> dict[str, Any]:
    """The layout of this run as its checkpoints tell it."""
    return layout_of(trainer.config, trainer.groups.grid.world) | {"device": trainer.schedule.device.type}


def trainer_state(trainer: "Trainer") -> dict[str, Any]:
    """Plain numbers of the run. Raises MegamoeError where the optimizer's step counts differ."""
    scaler = getattr(trainer.engine.optimizer, "loss_scaler", None)
    best = {} if trainer.best is None else {"best_validation": trainer.best.state()}
    return {
        "step": trainer.step,
        "samples": trainer.samples,  # the data cursor, too: the order of samples follows from the seed
        "tokens": trainer.samples * trainer.config.model.seq_length,
        "skipped_steps": trainer.skipped_steps,
        "optimizer_steps": num_optimizer_steps(trainer.engine.basic_optimizer),
        "guard": trainer.judge.state() if trainer.judge is not None else None,
        "loss_scaler": scaler and {name: vars(scaler)[name] for name in SCALER_STATE if name in vars(scaler)},
        "monitoring_run_id": trainer.monitoring_run_id,
        **best,
    }


def save_checkpoint(trainer: "Trainer", run_dir: str | Path) -> Path:
    """Write a checkpoint and wait for it. Collective over all ranks. Raises CheckpointError where it fails."""
    saver = CheckpointSaver(trainer, str(run_dir), say=lambda text: None)
    saver.save(wait=True)
    if saver.last_failure is not None:
        raise CheckpointError(saver.last_failure)
    return saver.root / checkpoint_name(trainer.step)
