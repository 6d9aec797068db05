"""Log-probabilities of texts by a model that computes, with what texts share computed once.

    m families of a batch   r texts of a batch   s tokens   n scored tokens
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megamoe.inference.model import ForwardModel
from megamoe.inference.rows import TokenRows
from megamoe.model.decoding import KeyValueCache
from megamoe.priming.batching import Family, batches

BATCHES_A_STAGE = 4  # in flight per pipeline stage: the last stage idles for a fifth of the time


def log_probabilities(
    model: ForwardModel, of: Sequence[Family], *, batch_size: int, on_done: Callable[[int], None] = lambda count: None
) -> list[list[float]]:
    """The sum over each text's scored tokens, in nats; a list for each family, in order.

    batch_size: families of a micro-batch. on_done: called with how many families more are done. Collective over all
    ranks, which are given the same.
    """
    stages = model.groups.grid.pipeline
    at_once = model.num_data_ranks * (1 if stages == 1 else stages * BATCHES_A_STAGE)
    planned = batches(of, batch_size)
    found: list[list[float]] = [[] for _ in of]
    for start in range(0, len(planned), at_once):
        numbers = planned[start : start + at_once]
        for batch, sums in zip(numbers, _score(model, [[of[i] for i in batch] for batch in numbers]), strict=True):
            for number, values in zip(batch, sums, strict=True):
                found[number] = values
            on_done(len(batch))
    return found


def _score(model: ForwardModel, many: Sequence[Sequence[Family]]) -> list[list[list[float]]]:
    """Micro-batches that go through the model together: sums by batch, family and text."""
    caches = _fill(model, many)
    num_rows = max(sum(len(family.texts) for family in batch) for batch in many)
    longest = max(family.longest_ending for batch in many for family in batch)
    num_scored = max(text.num_scored for batch in many for family in batch for text in family.texts)
    rows = []
    for batch, cache in zip(many, caches, strict=True):
        tokens, labels, kept, owners = _endings(batch, num_rows, longest, num_scored)
        if cache is not None:
            cache = cache.rows(owners, int(cache.starts.max()) + longest)
        rows.append(TokenRows(tokens, labels, kept, cache))
    sums = []
    for batch, losses in zip(many, model.losses(rows), strict=True):
        remaining = iter(losses.double())
        sums.append([[-float(next(remaining)[: text.num_scored].sum()) for text in each.texts] for each in batch])
    return sums


def _fill(model: ForwardModel, many: Sequence[Sequence[Family]]) -> list[KeyValueCache | None]:
    """A cache of each batch's beginnings; none where nothing is shared."""
    longest = max(family.shared for batch in many for family in batch)
    if longest == 0:
        return [None] * len(many)
    num_texts = max(len(batch) for batch in many)
    rows, caches = [], []
    for batch in many:
        cache = model.new_cache(num_texts, longest)
        beginnings = [family.texts[0].tokens[: family.shared] for family in batch]
        counts = [len(each) for each in beginnings] + [0] * (num_texts - len(batch))
        caches.append(cache)
        rows.append(TokenRows(_padded(beginnings, num_texts, longest), cache=cache, num_new=torch.tensor(counts)))
    model.fill(rows)
    return list(caches)


def _endings(
    batch: Sequence[Family], num_rows: int, length: int, num_scored: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens [r, s], labels and kept [r, n], and whose beginning each row goes on from [r]; rows that fill up are 0."""
    inputs, labels, kept, owners = [], [], [], []
    for number, family in enumerate(batch):
        for text in family.texts:
            inputs.append(text.tokens[family.shared : text.end - 1])
            labels.append(text.tokens[text.start : text.end])
            kept.append(range(text.start - 1 - family.shared, text.end - 1 - family.shared))
            owners.append(number)
    owners += [0] * (num_rows - len(owners))
    return (
        _padded(inputs, num_rows, length), _padded(labels, num_rows, num_scored),
        _padded(kept, num_rows, num_scored), torch.tensor(owners),
    )  # fmt: skip


def _padded(rows: Sequence[Sequence[int]], num_rows: int, length: int) -> Tensor:
    """int64 [num_rows, length], zeros behind each row and below the last."""
    found = torch.zeros((num_rows, length), dtype=torch.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return found
