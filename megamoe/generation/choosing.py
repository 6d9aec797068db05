"""Which token comes next: the likeliest, or a draw from what temperature, top-k and top-p leave.

    b texts   V tokens of the vocabulary
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megamoe.generation.settings import Sampling

NO_TOKEN = -1  # in place of an id


def choose(logits: Tensor, sampling: Sampling, texts: Sequence[int], step: int) -> Tensor:
    """logits [b, V] -> ids int64 [b]. Text number and step alone decide the draw: not who else is in the batch.

    NO_TOKEN where logits are no distribution: one is NaN or infinite, or all are minus infinity.
    """
    is_distribution = logits.amax(dim=-1).isfinite()  # NaN is the largest of any row that holds it
    return torch.where(is_distribution, _chosen(logits, sampling, texts, step), NO_TOKEN)


def _chosen(logits: Tensor, sampling: Sampling, texts: Sequence[int], step: int) -> Tensor:
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    values, ids = _likeliest_first(logits, sampling.top_k)
    probabilities = (values.double() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1.0:
        before = probabilities.cumsum(dim=-1) - probabilities  # of the likelier ones; the first always stays
        probabilities[before >= sampling.top_p * probabilities.sum(dim=-1, keepdim=True)] = 0.0
    sums = probabilities.cumsum(dim=-1)
    drawn = torch.tensor([uniform(sampling.seed, text, step) for text in texts], dtype=torch.float64)
    wanted = drawn.to(sums.device).unsqueeze(1) * sums[:, -1:]
    place = torch.searchsorted(sums, wanted, right=True)
    last = (probabilities > 0.0).sum(dim=-1, keepdim=True) - 1  # rounding must not reach what was cut off
    return ids.gather(1, torch.minimum(place, last).clamp(min=0)).squeeze(1)  # NaN is above no number: last is -1


def _likeliest_first(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """[b, V] -> values and ids [b, k], of equal ones the lower id first; top_k 0: all."""
    if not 0 < top_k < logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    ids = logits.topk(top_k, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def uniform(seed: int, text: int, step: int) -> float:
    """A number in [0, 1) that depends on these three alone."""
    return float(np.random.Generator(np.random.Philox(key=np.array([seed, text], np.uint64), counter=step)).random())
