"""What happens around training steps: guarding, reporting, validating, saving, sampling."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megamoe.data.datasets import BlendedDataset
from megamoe.errors import CheckpointError, TrainingInterrupted, TrainingStopped
from megamoe.phases import phase
from megamoe.training.build import Trainer
from megamoe.training.held_out import held_out, perplexity
from megamoe.training.lr_schedule import learning_rate
from megamoe.training.report import (
    LayerLoads,
    LoadMeter,
    LossMeter,
    load_loss,
    load_metrics,
    load_report,
    peak_memory_bytes,
    state_bytes,
)
from megamoe.training.saving import CheckpointSaver, Say
from megamoe.training.step import StepResult
from megamoe.training.throughput import begin_timing, metrics_of

Record = Callable[[dict[str, Any]], None]  # takes metrics on rank 0, does nothing elsewhere


class BaseHook:
    """Does nothing at any point."""

    def on_start(self, trainer: Trainer) -> None:
        pass

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        pass

    def on_roll_back(self, trainer: Trainer) -> None:
        pass

    def on_end(self, trainer: Trainer) -> None:
        pass


class SkipGuard(BaseHook):
    """Counts steps that were skipped, for a non-finite gradient or by the guard, and ends a run without progress."""

    def __init__(self, max_consecutive: int) -> None:
        self.max_consecutive = max_consecutive
        self._consecutive, self._any_refused = 0, False

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.was_applied:
            self._consecutive, self._any_refused = 0, False
            return
        trainer.skipped_steps += 1
        self._consecutive += 1
        self._any_refused |= math.isfinite(result.grad_norm)
        if self._consecutive >= self.max_consecutive:
            what = "not finite or refused by the guard" if self._any_refused else "not finite"
            raise TrainingStopped(
                f"the gradient was {what} in {self._consecutive} steps in a row, up to step {trainer.step} "
                "(run.max_skipped_steps): lower optimizer.lr, set optimizer.clip_grad, or look at the data around "
                f"sample {trainer.samples}"
            )

    def on_roll_back(self, trainer: Trainer) -> None:
        self._consecutive, self._any_refused = 0, False


class Reporter(BaseHook):
    """One line of metrics an interval, reduced over all ranks."""

    def __init__(
        self,
        interval_steps: int,
        record: Record,
        show_step: Callable[[int], None],
        *,
        load_interval_steps: int = 0,
        record_loads: Callable[[int, LayerLoads], None] = lambda step, loads: None,
    ) -> None:
        """`record_loads` takes a step and what each layer's experts were sent since its last call."""
        self.interval_steps, self.record, self.show_step = interval_steps, record, show_step
        self._losses = LossMeter()
        self._seconds, self._steps = 0.0, 0
        self._last_samples = self._samples_before_step = 0
        self._batch_size = 0
        self._mark = 0.0
        self._loads = LoadMeter(load_interval_steps, record_loads)

    def on_start(self, trainer: Trainer) -> None:
        begin_timing(trainer.schedule.device)
        self._loads.begin(trainer.step)
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

    def on_roll_back(self, trainer: Trainer) -> None:
        self.on_start(trainer)
        self._losses, self._seconds, self._steps = LossMeter(), 0.0, 0
        self.show_step(trainer.step)

    def resume_clock(self) -> None:
        """Called when other hooks are done: their time is not the step's."""
        self._mark = time.monotonic()

    def _metrics(self, trainer: Trainer, result: StepResult) -> dict[str, Any]:
        config = trainer.config
        lm_loss, load = self._losses.mean(trainer.groups), load_report(trainer)
        tokens = (trainer.samples - self._last_samples) * config.model.seq_length
        speed = metrics_of(config, trainer.groups, trainer.schedule.device, tokens=tokens, seconds=self._seconds,
                           num_steps=self._steps)  # fmt: skip
        metrics = {
            "step": trainer.step,
            "time": time.time(),
            "loss": lm_loss + load_loss(config.moe, load),
            "lm_loss": lm_loss,
            "perplexity": perplexity(lm_loss),
            "lr": learning_rate(config.optimizer, trainer.step, config.run.num_steps),
            "grad_norm": result.grad_norm,
            **speed,
            "samples": trainer.samples,
            "tokens": trainer.samples * config.model.seq_length,
            "global_batch_size": self._batch_size,
            "skipped_steps": trainer.skipped_steps,
            "memory_bytes": peak_memory_bytes(trainer.groups),
        }
        if load:
            metrics |= load_metrics(config.moe, load)
            metrics |= self._loads.add(trainer.step, load)
        if trainer.judge is not None:
            metrics["spikes"] = trainer.judge.num_spikes
            metrics["rolled_back_steps"] = trainer.judge.num_rolled_back_steps
        if config.run.precision == "fp16":
            metrics["loss_scale"] = trainer.engine.current_loss_scale
        return metrics


class Validator(BaseHook):
    """Language loss on held-out samples, at an interval and at the end."""

    def __init__(self, dataset: BlendedDataset, interval_steps: int, num_batches: int, record: Record) -> None:
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

    @phase("validate")
    def _validate(self, trainer: Trainer) -> None:
        self._last_step = trainer.step
        self.record({"step": trainer.step, **held_out(trainer, self.dataset, self.num_batches, "valid")})


class FinalTest(BaseHook):
    """Language loss on the test samples, once, when training ends."""

    def __init__(self, dataset: BlendedDataset, num_batches: int, record: Record) -> None:
        self.dataset, self.num_batches, self.record = dataset, num_batches, record

    @phase("validate")
    def on_end(self, trainer: Trainer) -> None:
        self.record({"step": trainer.step, **held_out(trainer, self.dataset, self.num_batches, "test")})


class Saver(BaseHook):
    """Checkpoints at an interval and at the end, and at once where a signal or a stop file asks the run to stop."""

    def __init__(self, saver: CheckpointSaver, interval_steps: int, at_end: bool) -> None:
        self.saver, self.interval_steps, self.at_end = saver, interval_steps, at_end

    def on_start(self, trainer: Trainer) -> None:
        if self.interval_steps:
            self.saver.prepare()

    @phase("save")
    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.saver.poll()
        if self.interval_steps and trainer.step % self.interval_steps == 0:
            self.saver.save()
        finalizer = trainer.engine.finalizer
        if finalizer.stop_agreed and trainer.step < trainer.config.run.num_steps:
            self._save_last(trainer)
            reason = "stop file" if finalizer.stop_file_agreed else "signal"
            raise TrainingInterrupted(
                f"stopped by a {reason} after step {trainer.step}, whose checkpoint is in "
                f"{self.saver.root}: the same command goes on from there",
                reason=reason,
            )

    @phase("save")
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
