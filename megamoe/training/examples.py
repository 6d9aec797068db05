"""Validating on all examples of a task, and keeping the checkpoint of the best validation."""

import json
import shlex
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.folders import FINETUNE_RECORD
from megamoe.data.batches import BatchPlan
from megamoe.data.examples import ExampleDataset
from megamoe.phases import phase
from megamoe.runs.run_folder import checkpoint_name, checkpoints_path
from megamoe.training.build import Trainer
from megamoe.training.held_out import perplexity
from megamoe.training.hooks import BaseHook, Record
from megamoe.training.loop import local_batch
from megamoe.training.saving import CheckpointSaver, Note
from megamoe.training.step import StepResult


@torch.no_grad()
def validate_examples(trainer: Trainer, dataset: ExampleDataset) -> dict[str, float]:
    """valid_loss, the mean over all that counts in all examples; of a classifier valid_accuracy, of a language model
    valid_perplexity. Collective over all ranks."""
    batch_size = trainer.config.run.global_batch_size
    sums = torch.zeros(3, dtype=torch.float64, device=trainer.schedule.device)  # losses, right answers, how many
    for first in range(0, dataset.num_samples, batch_size):
        if trainer.config.model.num_labels:
            _add_answers(trainer, dataset, first, sums)
        else:
            _add_losses(trainer, dataset, first, sums)
    dist.all_reduce(sums, group=trainer.groups.world)
    total, right, count = sums.tolist()
    loss = total / count
    if trainer.config.model.num_labels:
        return {"valid_loss": loss, "valid_accuracy": right / count}
    return {"valid_loss": loss, "valid_perplexity": perplexity(loss)}


def _add_losses(trainer: Trainer, dataset: ExampleDataset, first: int, sums: torch.Tensor) -> None:
    batch_size = trainer.config.run.global_batch_size
    losses = trainer.evaluate(local_batch(trainer, dataset, first, batch_size))
    if losses is None or trainer.groups.coordinates.tensor != 0:
        return
    num_data = trainer.groups.grid.data
    count = dataset.num_loss_tokens(range(first, first + batch_size))
    # Each micro-batch's loss is such that their mean over all ranks is the mean over the global batch.
    sums[0] += losses.double().sum() * count / (len(losses) * num_data)
    sums[2] += count / num_data


def _add_answers(trainer: Trainer, dataset: ExampleDataset, first: int, sums: torch.Tensor) -> None:
    run, at = trainer.config.run, trainer.groups.coordinates
    with trainer.evaluating():
        logits = trainer.schedule.logits(local_batch(trainer, dataset, first, run.global_batch_size))
    if logits is None or at.tensor != 0:
        return
    plan = BatchPlan(run.micro_batch_size, trainer.groups.grid.data)
    for number, each in enumerate(logits):  # [b, s, L]
        rows = [dataset.row(index) for index in plan.sample_indices(first, number, at.data)]
        mask = torch.stack([torch.from_numpy(row.mask) for row in rows]).to(each.device)
        labels = torch.stack([torch.from_numpy(row.labels) for row in rows]).to(each.device)[mask]
        answers = each[mask].float()
        sums[0] += F.cross_entropy(answers, labels, reduction="sum").double()
        sums[1] += (answers.argmax(dim=-1) == labels).sum()
        sums[2] += len(labels)


class ExampleValidator(BaseHook):
    """Validates at an interval and after the last step, and remembers which validation was the best."""

    def __init__(self, dataset: ExampleDataset, interval_steps: int, record: Record) -> None:
        self.dataset, self.interval_steps, self.record = dataset, interval_steps, record

    @phase("validate")
    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        is_last = trainer.step >= trainer.config.run.num_steps
        if is_last or (self.interval_steps and trainer.step % self.interval_steps == 0):
            metrics = validate_examples(trainer, self.dataset)
            self.record({"step": trainer.step, **metrics})
            if trainer.best is not None:
                trainer.best.judge(trainer.step, metrics)


class BestKeeper(BaseHook):
    """Saves the state of the best validation, if the run's saver has not, and names its checkpoint at the end.

    Stands after the saver, which spares the best checkpoint when it removes old ones.
    """

    def __init__(self, saver: CheckpointSaver, note: Note, *, is_first: bool) -> None:
        self.saver, self.note, self.is_first = saver, note, is_first

    @phase("save")
    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        best = trainer.best
        if best is not None and best.steps[-1:] == [trainer.step] and self.saver.last_step != trainer.step:
            self.saver.save()

    @phase("save")
    def on_end(self, trainer: Trainer) -> None:
        self.saver.wait()
        best = trainer.best
        if best is None or not best.steps or not self.is_first:
            return
        root, run_dir = checkpoints_path(trainer.config.run.dir), Path(trainer.config.run.dir)
        step = best.steps[-1]
        results = {
            "best_checkpoint": (root / checkpoint_name(step)).relative_to(run_dir).as_posix(), "best_step": step,
            best.metric: best.value, "last_step": trainer.step, "stopped_early": trainer.has_stopped_early,
        }  # fmt: skip
        replace_file(run_dir / FINETUNE_RECORD, (json.dumps(results, indent=2) + "\n").encode())
        why = f" after {best.num_since} validations without a better one" if trainer.has_stopped_early else ""
        export = shlex.join(["megamoe", "convert", "to-hf", str(run_dir), f"{run_dir}_hf", "--best"])
        self.note(
            "best", f"ended{why}; the best validation, {best.metric} {best.value:.6g}, was after step {step}: "
            f"{root / checkpoint_name(step)}, for Hugging Face by `{export}`", step=step, value=best.value,
        )  # fmt: skip
