"""What follows from a judge's verdict: it is told, and training goes on, ends, or goes back to a checkpoint.

A roll back happens in the running processes. Weights, optimizer, learning-rate schedule, random state, balance biases,
loss scale and the judge's window are the checkpoint's, and so is the number of steps: `trainer.step` goes back. The
samples do not: training goes on behind those of the step that was judged, and those between are skipped. The new state
is saved at once in the place of that checkpoint, so that a later resume skips them, too.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megamoe.checkpoint.manifest import MANIFEST
from megamoe.errors import TrainingStopped
from megamoe.runs.run_folder import checkpoint_name
from megamoe.training.agreement import first_ranks_numbers
from megamoe.training.hooks import BaseHook
from megamoe.training.loop import RolledBack
from megamoe.training.restore import load_newest
from megamoe.training.saving import CheckpointSaver
from megamoe.training.spikes import RollBack, Verdict
from megamoe.training.step import StepResult

if TYPE_CHECKING:
    from megamoe.training.build import Trainer


class Note(Protocol):
    """Prints a sentence and keeps it as an event of the run, on rank 0."""

    def __call__(self, kind: str, message: str, **details: Any) -> None: ...


class LossGuard(BaseHook):
    """Stands first among the hooks: what it undoes must not be reported or saved by others."""

    def __init__(self, saver: CheckpointSaver, note: Note, *, after_roll_back: Callable[[int], None]) -> None:
        """`after_roll_back`: called with the step that training goes on from, before other hooks hear of it."""
        self.saver, self.note, self.after_roll_back = saver, note, after_roll_back

    def after_step(self, trainer: "Trainer", result: StepResult) -> None:
        verdict = trainer.judge.verdict if trainer.judge is not None else None
        if verdict is None:
            return
        where, wanted = f"step {trainer.step}: {verdict.reason}", verdict.action
        if wanted == "roll_back":
            folders = self._checkpoints_before(trainer, verdict)
            if folders and not self._is_allowed(trainer):
                self._tell(verdict, where)
                raise TrainingStopped(
                    f"{where}, and training has gone back {trainer.config.guard.max_roll_backs} times within "
                    f"{trainer.config.guard.roll_back_window_steps} steps (guard.max_roll_backs): lower optimizer.lr, "
                    "or go on from an earlier checkpoint with other data"
                )
            if folders:
                self._tell(verdict, where)
                self._roll_back(trainer, verdict, folders)
            where += "; there is no checkpoint to go back to"
            wanted = "skip" if verdict.kind == "spike" else "stop"
        if wanted == "stop":
            self._tell(verdict, where)
            raise TrainingStopped(
                f"{where} (guard.{'action' if verdict.kind == 'spike' else 'divergence_action'}): its update was not "
                f"applied, look at the data up to sample {trainer.samples}, or lower optimizer.lr"
            )
        self._tell(verdict, f"{where}; {'the step is skipped' if verdict.is_refused else 'training goes on'}")

    def _tell(self, verdict: Verdict, message: str) -> None:
        loss = math.nan if verdict.loss is None else verdict.loss
        self.note(
            verdict.kind, message, step=verdict.step, loss=loss, expected=verdict.expected,
            grad_norm=verdict.grad_norm, action=verdict.action,
        )  # fmt: skip

    def _checkpoints_before(self, trainer: "Trainer", verdict: Verdict) -> list[Path]:
        """This run's own, newest first, that hold nothing of what was judged. The same on all ranks; collective."""
        self.saver.wait()
        guard, root = trainer.config.guard, self.saver.root
        # A level that is too high was so in more than half of its steps, so perhaps in all of them.
        distance = max(1, guard.min_roll_back_steps, guard.divergence_steps if verdict.kind == "divergence" else 0)
        steps = sorted((step for step in self.saver.own_steps if step <= trainer.step - distance), reverse=True)
        there = [step for step in steps if (root / checkpoint_name(step) / MANIFEST).exists()]  # old ones are removed
        there = first_ranks_numbers(there, device=trainer.schedule.device)
        return [root / checkpoint_name(step) for step in there]

    def _is_allowed(self, trainer: "Trainer") -> bool:
        guard, history = trainer.config.guard, trainer.judge.roll_backs
        recent = [each for each in history if each.step > trainer.step - guard.roll_back_window_steps]
        return len(recent) < guard.max_roll_backs

    def _roll_back(self, trainer: "Trainer", verdict: Verdict, folders: list[Path]) -> None:
        """Does not return: raises RolledBack, or CheckpointError where no checkpoint is whole."""
        judge, step, samples = trainer.judge, trainer.step, trainer.samples
        num_spikes, history, run_id = judge.num_spikes, judge.roll_backs, trainer.monitoring_run_id
        loaded = load_newest(trainer, folders, on_damage=trainer.config.checkpoint.on_damage)
        trainer.statistics.take()  # of the steps that are undone
        skipped = samples - trainer.samples
        judge.num_spikes, judge.roll_backs = num_spikes, [*history, RollBack(step, trainer.step, skipped)]
        trainer.samples, trainer.monitoring_run_id = samples, run_id
        self.saver.forget_after(trainer.step)
        self.note(
            "roll_back",
            f"went back from step {step} to {loaded.folder}; {skipped} samples are skipped, training goes on behind "
            f"sample {samples}" + "".join(f"; {note}" for note in loaded.notes),
            step=step, to_step=trainer.step, skipped_samples=skipped,
        )  # fmt: skip
        self.after_roll_back(trainer.step)
        self.saver.save()
        raise RolledBack
