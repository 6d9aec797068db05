"""Which experts a token wants, and with what raw weight: one small class per rule, from logits to choices.

    S tokens   E experts   k choices per token   z = logits [S, E] fp32   Top_k(v): indices of the k largest v

Everything is fp32 and deterministic; of equal experts the one of lower number is chosen. All rules are causal: what a
token gets depends on no later token but through capacity. Expert choice (Zhou et al., 2022), where experts pick
tokens, is left out on purpose: a token's route would depend on the tokens after it, which a language model must not
see in training and does not have when it generates.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megamoe.config.schema import MoEConfig
from megamoe.moe.routing import top_k_choices

JITTER_STATE = "router-jitter"  # the random state, in Megatron's tracker, that jitters router inputs


@dataclass(frozen=True)
class Choice:
    """What a router wants for S tokens, before any capacity."""

    expert_index: Tensor  # [S, k] int64, best choice first
    gate: Tensor  # [S, k] fp32 raw weights, differentiable in the logits
    probabilities: Tensor  # [S, E] fp32, rows sum to 1: what balance losses push on


class RouterRule(Protocol):
    """logits [S, E] fp32 (and, where the rule knows one, a selection bias [E]) -> choices."""

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> Choice: ...


@dataclass(frozen=True)
class GroupLimit:
    """Experts come from the best `num_selected` of `num_groups` equal groups of neighbours.

    The score of a group is the sum of the best `best_of` scores in it: 1 in DeepSeek-V2 (2024, section 2.1.2,
    device-limited routing), 2 in DeepSeek-V3 (2024, section 2.1.2, node-limited routing).
    """

    num_groups: int
    num_selected: int
    best_of: int

    def apply(self, scores: Tensor) -> Tensor:
        """scores [S, E] -> the same, -inf in groups that are not selected."""
        by_group = scores.unflatten(1, (self.num_groups, scores.shape[1] // self.num_groups))
        best = by_group.topk(min(self.best_of, by_group.shape[2]), dim=-1).values  # values alone: ties do not matter
        selected = top_k_choices(best.sum(dim=-1), self.num_selected)
        is_out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, selected, False)
        return by_group.masked_fill(is_out.unsqueeze(-1), float("-inf")).view_as(scores)


def _select(scores: Tensor, top_k: int, groups: GroupLimit | None) -> Tensor:
    scores = scores.detach()
    return top_k_choices(scores if groups is None else groups.apply(scores), top_k)


@dataclass(frozen=True)
class SoftmaxRouter:
    """p = softmax(z); experts Top_k(p), gates p of the chosen.

    k = 1 is Switch (Fedus et al., 2021, eq. 1-2), gates left as they are; k = 2 with normalised gates is GShard
    (Lepikhin et al., 2020, algorithm 1) in the version of Artetxe et al. (2021): the second choice is the plain second
    best, not drawn. OLMoE is k = 8 without normalisation, Qwen3-MoE k = 8 with it.
    """

    top_k: int
    groups: GroupLimit | None = None

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> Choice:
        probabilities = logits.softmax(dim=-1)
        expert_index = _select(probabilities, self.top_k, self.groups)
        return Choice(expert_index, probabilities.gather(1, expert_index), probabilities)


@dataclass(frozen=True)
class SelectedSoftmaxRouter:
    """Experts Top_k(z); gates softmax(z of the chosen): Mixtral (Jiang et al., 2024, section 2.1), Shazeer et al.
    (2017, eq. 3-5, without noise). Without drops it equals SoftmaxRouter with normalised gates."""

    top_k: int
    groups: GroupLimit | None = None

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> Choice:
        expert_index = _select(logits, self.top_k, self.groups)
        return Choice(expert_index, logits.gather(1, expert_index).softmax(dim=-1), logits.softmax(dim=-1))


@dataclass(frozen=True)
class SigmoidRouter:
    """s = sigmoid(z); experts Top_k(s + b), gates s of the chosen: DeepSeek-V3 (2024, eq. 12-16).

    The bias b balances the load without a loss (Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy"): it
    takes part in selection only, never in the gates. Balance losses see s / sum_e s_e (DeepSeek-V3, eq. 19).
    """

    top_k: int
    groups: GroupLimit | None = None

    def __call__(self, logits: Tensor, bias: Tensor | None = None) -> Choice:
        scores = logits.sigmoid()
        expert_index = _select(scores if bias is None else scores + bias, self.top_k, self.groups)
        probabilities = scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
        return Choice(expert_index, scores.gather(1, expert_index), probabilities)


def build_router(config: MoEConfig) -> RouterRule:
    """The rule that `config` asks for; `megamoe.config.validation` has refused what does not go together."""
    is_sigmoid = config.score_function == "sigmoid"
    groups = None
    if config.num_expert_groups is not None and config.num_selected_groups is not None:
        groups = GroupLimit(config.num_expert_groups, config.num_selected_groups, best_of=2 if is_sigmoid else 1)
    if is_sigmoid:
        return SigmoidRouter(config.top_k, groups)
    if config.gate_order == "select_then_softmax":
        return SelectedSoftmaxRouter(config.top_k, groups)
    return SoftmaxRouter(config.top_k, groups)
