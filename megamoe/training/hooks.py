"""What happens around training steps: guarding, reporting, validating, saving, sampling."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megamoe.data.batches import SampleSource
from megamoe.errors import CheckpointError, TrainingInterrupted, TrainingStopped
from megamoe.training.build import Trainer
from megamoe.training.loop import local_batch
from megamoe.training.lr_schedule import learning_rate
from megamoe.training.report import (
    LossMeter,
    load_loss,
    load_metrics,
    load_report,
    peak_memory_bytes,
    state_bytes,
)
from megamoe.training.saving import CheckpointSaver, Say
from megamoe.training.step import StepResult

Record = Callable[[dict[str, Any]], None]  # takes metrics on rank 0, does nothing elsewhere


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; not a number where the loss is none, and bounded where exp overflows."""
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan


class BaseHook:
    """Does nothing at any point."""

    def on_start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        pass

    def on_end(self, trainer: Trainer) -> None:
        pass


class SkipGuard(BaseHook):
    """Counts steps skipped for a non-finite gradient and ends a run that makes no progress."""

    def __init__(self, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        self._consecutive = 0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.was_applied:
            self._consecutive = 0
            return
        trainer.skipped_steps += 1
        self._consecutive += 1
        if self._consecutive >= self.max_consecutive:
            raise TrainingStopped(
                f"the gradient was not finite in {self._consecutive} steps in a row, up to step {trainer.step} "
                "(run.max_skipped_steps): lower optimizer.lr, set optimizer.clip_grad, or look at the data around "
                f"sample {trainer.samples}"
            )


class Reporter(BaseHook):
    """One line of metrics an interval, reduced over all ranks."""

    def __init__(self, interval_steps: int, record: Record, show_step: Callable[[int], None]) -> None:
        self.interval_steps, self.record, self.show_step = interval_steps, record, show_step
        self._losses = LossMeter()
        self._seconds, self._steps = 0.0, 0
        self._last_samples = self._samples_before_step = 0
        self._batch_size = 0
        self._mark = 0.0

    def on_start(self, trainer: Trainer) -> None:
        self._mark, self._last_samples = time.monotonic(), trainer.samples
        self._samples_before_step = trainer.samples

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        now = time.monotonic()
        self._seconds += now - self._mark
        self._steps += 1
        self._batch_size = trainer.samples - self._samples_before_step
        self._samples_before_step = trainer.samples
        if result.was_applied:  # one loss that is no number would hide those of the whole interval
            self._losses.add(result.lm_losses)
        is_last = trainer.step >= trainer.config.run.num_steps
        if trainer.step % self.interval_steps == 0 or is_last or trainer.step == 1:
            self.record(self._metrics(trainer, result))
            self._seconds, self._steps, self._last_samples = 0.0, 0, trainer.samples
        self.show_step(trainer.step)
        self._mark = time.monotonic()  # what other hooks take is not training: see `resume_clock`

    def resume_clock(self) -> None:
        """Called when other hooks are done: their time is not the step's."""
        self._mark = time.monotonic()

    def _metrics(self, trainer: Trainer, result: StepResult) -> dict[str, Any]:
        config = trainer.config
        lm_loss, load = self._losses.mean(trainer.groups), load_report(trainer)
        samples = trainer.samples - self._last_samples
        metrics = {
            "step": trainer.step,
            "loss": lm_loss + load_loss(config.moe, load),
            "lm_loss": lm_loss,
            "perplexity": perplexity(lm_loss),
            "lr": learning_rate(config.optimizer, trainer.step, config.run.num_steps),
            "grad_norm": result.grad_norm,
            "tokens_per_second": samples * config.model.seq_length / max(self._seconds, 1e-9),
            "step_seconds": self._seconds / max(1, self._steps),
            "samples": trainer.samples,
            "tokens": trainer.samples * config.model.seq_length,
            "global_batch_size": self._batch_size,
            "skipped_steps": trainer.skipped_steps,
            "memory_bytes": peak_memory_bytes(trainer.groups),
        }
        if load:
            metrics |= load_metrics(config.moe, load)
        if config.run.precision == "fp16":
            metrics["loss_scale"] = trainer.engine.current_loss_scale
        return metrics


class Validator(BaseHook):
    """Language loss on held-out samples, at an interval and at the end."""

    def __init__(self, dataset: SampleSource, interval_steps: int, num_batches: int, record: Record) -> None:
        self.dataset, self.interval_steps, self.num_batches, self.record = dataset, interval_steps, num_batches, record
        self._last_step = -1

    def on_start(self, trainer: Trainer) -> None:
        self._last_step = trainer.step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.interval_steps and trainer.step % self.interval_steps == 0:
            self._validate(trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self._last_step != trainer.step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        self._last_step = trainer.step
        self.record({"step": trainer.step, **_held_out(trainer, self.dataset, self.num_batches, "valid")})


class FinalTest(BaseHook):
    """Language loss on the test samples, once, when training ends."""

    def __init__(self, dataset: SampleSource, num_batches: int, record: Record) -> None:
        self.dataset, self.num_batches, self.record = dataset, num_batches, record

    def on_end(self, trainer: Trainer) -> None:
        self.record({"step": trainer.step, **_held_out(trainer, self.dataset, self.num_batches, "test")})


def _held_out(trainer: Trainer, dataset: SampleSource, num_batches: int, split: str) -> dict[str, float]:
    """Loss and perplexity over the first `num_batches` global batches of a dataset. Collective over all ranks."""
    batch_size, meter = trainer.config.run.global_batch_size, LossMeter()
    for index in range(num_batches):
        meter.add(trainer.evaluate(local_batch(trainer, dataset, index * batch_size, batch_size)))
    loss = meter.mean(trainer.groups)
    return {f"{split}_loss": loss, f"{split}_perplexity": perplexity(loss)}


class Saver(BaseHook):
    """Checkpoints at an interval and at the end, and at once where a signal asks the run to stop."""

    def __init__(self, saver: CheckpointSaver, interval_steps: int, at_end: bool) -> None:
        self.saver, self.interval_steps, self.at_end = saver, interval_steps, at_end

    def on_start(self, trainer: Trainer) -> None:
        if self.interval_steps:
            self.saver.prepare()

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.saver.poll()
        if self.interval_steps and trainer.step % self.interval_steps == 0:
            self.saver.save()
        if trainer.engine.finalizer.stop_agreed and trainer.step < trainer.config.run.num_steps:
            self._save_last(trainer)
            raise TrainingInterrupted(
                f"stopped by a signal after step {trainer.step}, whose checkpoint is in "
                f"{self.saver.root}: the same command goes on from there"
            )

    def on_end(self, trainer: Trainer) -> None:
        if self.at_end:
            self._save_last(trainer)
        else:
            self.saver.wait()

    def _save_last(self, trainer: Trainer) -> None:
        """The state as it is now is safe afterwards, or CheckpointError is raised: nothing more would save it."""
        self.saver.wait()
        if self.saver.last_step != trainer.step or self.saver.last_failure is not None:
            self.saver.save(wait=True)
        if self.saver.last_failure is not None:
            raise CheckpointError(self.saver.last_failure)


class MemoryNote(BaseHook):
    """Says at the end what the ranks hold and what they needed at most."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_end(self, trainer: Trainer) -> None:
        peak = peak_memory_bytes(trainer.groups)
        held = state_bytes(trainer)
        kinds = ", ".join(f"{kind} {count / 2**20:.1f} MiB" for kind, count in held.items())
        self.say(f"rank {dist.get_rank()} holds {kinds}; peak memory of any rank {peak / 2**20:.0f} MiB")


class ClockRestart(BaseHook):
    """Stands last, so that the time of saving and validating is not counted as training."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.reporter.resume_clock()
