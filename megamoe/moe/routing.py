"""Who gets through: capacity, drops and gates of choices already made. Index-based: cost O(S * E + k S log kS).

    S tokens of one rank's micro-batch   E experts   k choices per token   C capacity of one expert

Which experts a token wants is the routers' business, see `megamoe.moe.routers`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DropPolicy = Literal["position", "probability"]
Normalization = Literal["none", "before_drops", "after_drops"]


@dataclass(frozen=True)
class Routing:
    """The decision for S tokens. An assignment is one (choice, token); assignment number = choice * S + token."""

    expert_index: Tensor  # [S, k] int64, best choice first
    gate: Tensor  # [S, k] fp32 weight of each choice; 0 where dropped
    kept: Tensor  # [S, k] bool
    by_expert: Tensor
    # [k * S] int64: the T kept assignments sorted by expert (or by its place, see `settle`), earlier choices and tokens
    # first; then the dropped ones. T itself is not read here: on a GPU the host would have to wait for it.
    tokens_per_expert: Tensor  # [E] int64, by number: kept assignments of each expert; sums to T


def count_experts(expert_index: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in an index tensor of any shape: [E] int64.

    Not torch.bincount: on a GPU that waits for the device to learn the largest index.
    """
    flat = expert_index.reshape(-1)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


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


def normalized(gate: Tensor) -> Tensor:
    """gate [S, k], each row divided by its sum; a row of zeros stays one."""
    total = gate.sum(dim=-1, keepdim=True)
    # Zero over tiny is zero, but its gradient over tiny is infinite, and infinity times zero is not a number.
    return gate / total.masked_fill(total < torch.finfo(gate.dtype).tiny, 1.0)


def settle(
    expert_index: Tensor,
    gate: Tensor,
    *,
    num_experts: int,
    capacity: int | None,
    normalization: Normalization,
    drop_policy: DropPolicy = "position",
    scale: float = 1.0,
    place_of_expert: Tensor | None = None,
) -> Routing:
    """Fill the experts up to `capacity` (`None`: dropless) and weigh what is kept.

    expert_index [S, k] are the wanted experts, best first; gate [S, k] their raw weights. An expert over capacity
    keeps, by "position", all first choices in token order, then all second choices, and so on (GShard); by
    "probability", the assignments of the largest raw weight, equal ones in that same order. Normalised "after_drops"
    the gates of a token are divided by the sum of what is left: a token whose second expert is full gives its whole
    weight to the first, one whose experts are all full gets none. Normalised "before_drops" what is dropped is lost.
    `scale` multiplies the gates at the end. `place_of_expert` [E], a permutation, is where each expert stands in
    `Routing.by_expert`; None: in the order of numbers.
    """
    kept = None
    with torch.no_grad():
        flat_expert = expert_index.t().reshape(-1)  # [k * S], choice-major: the order in which experts fill up
        place = flat_expert if place_of_expert is None else place_of_expert[flat_expert]
        by_expert = place.argsort(stable=True)
        count_at = count_experts(place, num_experts)
        if capacity is not None:
            order = by_expert
            if drop_policy == "probability":
                by_weight = gate.detach().t().reshape(-1).argsort(stable=True, descending=True)
                order = by_weight[place[by_weight].argsort(stable=True)]
            queue_start = count_at.cumsum(0) - count_at
            waiting = torch.arange(place.numel(), device=gate.device) - queue_start[place[order]]
            flat_kept = torch.empty_like(waiting, dtype=torch.bool)
            flat_kept[order] = waiting < capacity
            kept = flat_kept.view(expert_index.shape[1], -1).t()
            by_expert = _dropped_last(by_expert, flat_kept)
            count_at = count_at.clamp(max=capacity)
        tokens_per_expert = count_at if place_of_expert is None else count_at[place_of_expert]
    if normalization == "before_drops":
        gate = normalized(gate)
    if kept is None:
        kept = torch.ones_like(expert_index, dtype=torch.bool)
    else:
        gate = gate * kept
    if normalization == "after_drops":
        gate = normalized(gate)
    if scale != 1.0:
        gate = gate * scale
    return Routing(expert_index, gate, kept, by_expert, tokens_per_expert)


def _dropped_last(by_expert: Tensor, kept: Tensor) -> Tensor:
    """by_expert [k * S] with the kept assignments first, kept [k * S] by assignment, otherwise in the same order."""
    is_kept = kept[by_expert]
    num_kept_so_far = is_kept.cumsum(0)
    place = torch.arange(by_expert.numel(), device=by_expert.device)
    target = torch.where(is_kept, num_kept_so_far - 1, num_kept_so_far[-1:] + place - num_kept_so_far)
    parted = torch.empty_like(by_expert)
    parted[target] = by_expert
    return parted


def route(
    logits: Tensor, *, top_k: int, capacity: int | None, normalize: bool, probabilities: Tensor | None = None
) -> Routing:
    """Top-k routing by softmax probability, the GShard top-2 gate of Artetxe et al. (2021) at k = 2.

    `logits` is [S, E] fp32; see `settle` for capacity and `normalize` (after drops). `probabilities` may carry the
    softmax of the logits where it exists already.
    """
    if probabilities is None:
        probabilities = logits.softmax(dim=-1)
    expert_index = top_k_choices(probabilities.detach(), top_k)
    return settle(
        expert_index,
        probabilities.gather(1, expert_index),
        num_experts=probabilities.shape[1],
        capacity=capacity,
        normalization="after_drops" if normalize else "none",
    )
