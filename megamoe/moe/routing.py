"""Which expert takes which token: scores, choices, capacity, gates. Index-based: cost O(S * (E + k log kS)).

    S tokens of one rank's micro-batch   E experts   k choices per token   C capacity of one expert
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The decision for S tokens. An assignment is one (choice, token); assignment number = choice * S + token."""

    expert_index: Tensor  # [S, k] int64, best choice first
    gate: Tensor  # [S, k] fp32 weight of each choice; 0 where dropped
    kept: Tensor  # [S, k] bool
    by_expert: Tensor  # [T] int64: the T kept assignments sorted by expert, earlier choices and tokens first
    tokens_per_expert: Tensor  # [E] int64: kept assignments of each expert; sums to T


def count_experts(expert_index: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in an index tensor of any shape: [E] int64.

    Not torch.bincount: on a GPU that waits for the device to learn the largest index.
    """
    flat = expert_index.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    """Tokens one expert takes from one rank's micro-batch: top_k * ceil(capacity_factor * S / E).

    With factor 1 and two choices this is the 2 * ceil(S / E) of Artetxe et al. (2021), "C = 2".
    """
    # Integer arithmetic where the factor is whole: 0.1 + 0.2 must not add a slot.
    if float(capacity_factor).is_integer():
        return top_k * -(-num_tokens * int(capacity_factor) // num_experts)
    scaled = capacity_factor * num_tokens / num_experts
    nearest = round(scaled)
    return top_k * (nearest if abs(scaled - nearest) < 1e-9 * max(1.0, scaled) else int(scaled) + 1)


def top_k_choices(scores: Tensor, top_k: int) -> Tensor:
    """Indices [S, k] of the k largest scores [S, E], best first; the lower index wins a tie, on every device.

    torch.topk leaves ties open, and a tie resolved differently on two ranks of one tensor group is a silent fork.
    """
    choices = [scores.argmax(dim=-1)]
    remaining = scores
    for _ in range(top_k - 1):
        remaining = remaining.scatter(1, choices[-1].unsqueeze(1), float("-inf"))
        choices.append(remaining.argmax(dim=-1))
    return torch.stack(choices, dim=1)


def route(
    logits: Tensor, *, top_k: int, capacity: int | None, normalize: bool, probabilities: Tensor | None = None
) -> Routing:
    """Top-k routing by softmax probability, the GShard top-2 gate of Artetxe et al. (2021) at k = 2.

    `logits` is [S, E] fp32. Experts fill up with all first choices in token order, then all second choices, and so
    on; what exceeds `capacity` is dropped (`None`: dropless). With `normalize` the gates of a token are divided by
    their sum *after* dropping: a token whose second expert is full gives its whole weight to the first, and a token
    whose experts are all full gets none. `probabilities` may carry the softmax of the logits where it exists already.
    """
    if probabilities is None:
        probabilities = logits.softmax(dim=-1)
    num_tokens, num_experts = probabilities.shape
    with torch.no_grad():
        expert_index = top_k_choices(probabilities.detach(), top_k)
        flat_expert = expert_index.t().reshape(-1)  # [k * S], choice-major: the order in which experts fill up
        by_expert = flat_expert.argsort(stable=True)
        demand = count_experts(flat_expert, num_experts)
        if capacity is None:
            kept = torch.ones_like(expert_index, dtype=torch.bool)
            tokens_per_expert = demand
        else:
            sorted_expert = flat_expert[by_expert]
            queue_start = demand.cumsum(0) - demand
            place = torch.arange(flat_expert.numel(), device=logits.device) - queue_start[sorted_expert]
            in_time = place < capacity
            flat_kept = torch.empty_like(in_time)
            flat_kept[by_expert] = in_time
            kept = flat_kept.view(top_k, num_tokens).t()
            by_expert = by_expert[in_time]
            tokens_per_expert = demand.clamp(max=capacity)
    gate = probabilities.gather(1, expert_index) * kept
    if normalize:
        total = gate.sum(dim=-1, keepdim=True)
        # Zero over tiny is zero, but its gradient over tiny is infinite, and infinity times zero is not a number.
        gate = gate / total.masked_fill(total < torch.finfo(gate.dtype).tiny, 1.0)
    return Routing(expert_index, gate, kept, by_expert, tokens_per_expert)
