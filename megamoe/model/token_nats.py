"""Nats of tokens without gradients: logits are made and summed up piece by piece, never all at once.

    b texts   n results of each   h hidden   V rows of the vocabulary   t tensor ranks

log sum exp over the vocabulary is put together from the ranks' slices: with m the largest logit of all and s_i the sum
of exp(logit - m_i) in slice i, it is m + log(sum_i s_i exp(m_i - m)).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

LOGIT_BYTES = 64 << 20  # of the logits that are there at once; so many rows make a product that is worth its weights
FEWEST_ROWS = 256
CACHE_BYTES = 1 << 20  # what a core works through without going back to memory


def token_nats(
    hidden: Tensor, labels: Tensor, logits_of: Callable[[Tensor], Tensor], *, num_local_rows: int, first_row: int,
    num_tokens_known: int, group: dist.ProcessGroup,
) -> Tensor:  # fmt: skip
    """hidden [n, b, h], labels int64 [b, n] -> fp32 [b, n]. Collective over the tensor group.

    logits_of: hidden [r, h] -> this rank's slice of the logits, [r, V/t]: rows `first_row` ... of the vocabulary, of
    which those from `num_tokens_known` on are no tokens.
    """
    num_results, num_texts, _ = hidden.shape
    flat, wanted = hidden.flatten(0, 1), labels.transpose(0, 1).flatten() - first_row
    num_valid = min(max(0, num_tokens_known - first_row), num_local_rows)
    largest = torch.full(flat.shape[:1], -torch.inf, dtype=torch.float32, device=flat.device)
    sums, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    step = max(FEWEST_ROWS, LOGIT_BYTES // (4 * num_local_rows))
    for first in range(0, len(flat), step):
        rows = slice(first, first + step)
        logits = logits_of(flat[rows])[:, :num_valid]
        if num_valid:
            _sum_up(logits, wanted[rows], largest[rows], sums[rows], chosen[rows])
    if dist.get_world_size(group) > 1:
        common = largest.clone()
        dist.all_reduce(common, op=dist.ReduceOp.MAX, group=group)
        both = torch.stack([sums * (largest - common).exp(), chosen])
        dist.all_reduce(both, group=group)
        largest, (sums, chosen) = common, both
    return (sums.log() + largest - chosen).view(num_results, num_texts).transpose(0, 1).contiguous()


def _sum_up(logits: Tensor, wanted: Tensor, largest: Tensor, sums: Tensor, chosen: Tensor) -> None:
    """logits [r, v], wanted [r] -> the last three, fp32 [r]. A logit that is not in this slice counts as 0."""
    num_rows, num_columns = logits.shape
    is_here = (wanted >= 0) & (wanted < num_columns)
    picked = logits.gather(1, wanted.clamp(0, num_columns - 1)[:, None])[:, 0].float()
    chosen.copy_(picked * is_here)
    step = num_rows if logits.is_cuda else max(1, CACHE_BYTES // (4 * num_columns))
    for first in range(0, num_rows, step):
        part = slice(first, first + step)
        values = logits[part].float()
        torch.amax(values, dim=1, out=largest[part])
        sums[part] = (values - largest[part, None]).exp_().sum(dim=1)
