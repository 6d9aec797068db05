"""Micro-batches through the pipeline's stages, forward only, by Megatron-core's schedule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megamoe.inference.rows import TokenRows
from megamoe.model.decoding import Decoding
from megamoe.model.gpt import GPT
from megamoe.model.parallel import ParallelGroups


def forward_passes(
    chunk: GPT,
    groups: ParallelGroups,
    decoding: Decoding,
    rows: Sequence[TokenRows],
    device: torch.device,
    after: Callable[[int], None] = lambda number: None,
) -> list[Tensor] | None:
    """Losses [b, n] or this rank's slice of logits [b, n, V/t] of each of `rows`, in order; None but on the last stage.

    All of `rows` have one shape [b, s]. `after` is called on every stage when it has computed a micro-batch, with the
    micro-batch's number among `rows`. Collective over the pipeline (and over expert groups, as the model is).
    """

    def step(data: Any, model: GPT) -> tuple[Tensor, Any]:
        number, row = next(data)
        tokens = row.tokens.to(device) if model.pre_process else None
        decoding.cache, decoding.kept = row.cache, None if row.kept is None else row.kept.to(device)
        if row.cache is not None:
            row.cache.begin(row.tokens.shape[1])
        labels = row.labels.to(device) if model.post_process and row.labels is not None else None
        try:
            output = model(tokens, None, None, labels=labels)
        finally:
            decoding.cache = decoding.kept = None
        after(number)
        return output, lambda result: (result.new_zeros(()), result)

    num_texts, length = rows[0].tokens.shape
    found = get_forward_backward_func(groups.grid.pipeline, None)(
        forward_step_func=step,
        data_iterator=iter(enumerate(rows)),
        model=[chunk],
        num_microbatches=len(rows),
        seq_length=length,
        micro_batch_size=num_texts,
        forward_only=True,
    )
    return found if chunk.post_process else None
