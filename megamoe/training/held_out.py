"""Loss on samples that nobody trains on, as a whole and by corpus."""

import math

import torch
import torch.distributed as dist

from megamoe.data.batches import BatchPlan
from megamoe.data.datasets import BlendedDataset
from megamoe.training.build import Trainer
from megamoe.training.loop import local_batch


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token; not a number where the loss is none, and bounded where exp overflows."""
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan


@torch.no_grad()
def held_out(trainer: Trainer, dataset: BlendedDataset, num_batches: int, split: str) -> dict[str, float]:
    """Loss and perplexity over the first `num_batches` global batches, and of each named corpus that has samples there.

    Keys are as in metrics: valid_loss, valid_perplexity, valid_loss/NAME, … Collective over all ranks.
    """
    names, device = dataset.corpus_names, trainer.schedule.device
    batch_size, micro_batch_size = trainer.config.run.global_batch_size, trainer.config.run.micro_batch_size
    plan = BatchPlan(micro_batch_size, trainer.groups.grid.data)
    rows = range(plan.num_micro_batches(batch_size))
    speaks = trainer.groups.coordinates.tensor == 0
    sums = torch.zeros((2, 1 + len(names)), dtype=torch.float64, device=device)  # losses and sequences: all, by corpus
    for first in range(0, num_batches * batch_size, batch_size):
        losses = trainer.evaluate(local_batch(trainer, dataset, first, batch_size))
        if losses is None or not speaks:
            continue
        values = losses.double().flatten()
        pairs = torch.stack([values, torch.ones_like(values)])
        sums[:, 0] += pairs.sum(dim=1)
        if names:
            mine = trainer.groups.coordinates.data
            corpora = [dataset.locate(index)[0] for row in rows for index in plan.sample_indices(first, row, mine)]
            sums[:, 1:].index_add_(1, torch.tensor(corpora, device=device), pairs)
    dist.all_reduce(sums, group=trainer.groups.world)
    return _metrics(sums.tolist(), names, split)


def _metrics(sums: list[list[float]], names: tuple[str, ...], split: str) -> dict[str, float]:
    found = {}
    for name, total, count in zip(("", *(f"/{name}" for name in names)), *sums, strict=True):
        if count or not name:
            loss = total / count if count else math.nan
            found |= {f"{split}_loss{name}": loss, f"{split}_perplexity{name}": perplexity(loss)}
    return found
