"""The MoE layer of the plain reference: one process, full weights, a loop over experts, gradients from autograd.

`router_reference.py` holds the rules token by token; `test_reference.py` holds this file against it. Shapes: T tokens
with the position slowest, b sequences, d hidden, E experts, k choices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.schema import MoEConfig
from tests.parity.router_reference import kept_by_position, kept_by_probability


class Mixed(NamedTuple):
    """What one MoE layer makes of one micro-batch."""

    output: Tensor  # [T, d]
    balance_loss: Tensor
    z_loss: Tensor
    num_dropped: int
    load: Tensor  # [E] choices of each expert, dropped ones too


def within_groups(scores: Tensor, moe: MoEConfig) -> Tensor:
    """scores [T, E], -inf outside the best groups: those with the best expert (softmax) or pair of experts."""
    if moe.num_expert_groups is None:
        return scores
    best_of = 2 if moe.score_function == "sigmoid" else 1
    by_group = scores.unflatten(1, (moe.num_expert_groups, -1))
    group_score = by_group.sort(dim=-1, descending=True).values[..., :best_of].sum(-1)
    out = group_score.sort(dim=-1, descending=True, stable=True).indices[:, moe.num_selected_groups :]
    is_out = torch.zeros_like(group_score).scatter(1, out, 1.0).bool()
    return by_group.masked_fill(is_out[..., None], -math.inf).flatten(1)


def choose(logits: Tensor, moe: MoEConfig, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choices [T, k], raw weights [T, k], probabilities [T, E] of logits [T, E]."""
    scores = logits.sigmoid() if moe.score_function == "sigmoid" else logits.softmax(-1)
    wanted = scores if bias is None else scores + bias
    choices = within_groups(wanted, moe).sort(dim=-1, descending=True, stable=True).indices[:, : moe.top_k]
    weights = scores.gather(1, choices)
    if moe.gate_order == "select_then_softmax":
        weights = logits.gather(1, choices).softmax(-1)
    return choices, weights, scores / scores.sum(-1, keepdim=True)


def balance(probabilities: Tensor, choices: Tensor, moe: MoEConfig) -> Tensor:
    counted, num_experts = choices[:, :1] if moe.balance_loss == "first_choice" else choices, probabilities.shape[1]
    share = torch.bincount(counted.flatten(), minlength=num_experts) / counted.numel()
    return num_experts * (probabilities.mean(0) * share).sum()


def keep(choices: Tensor, weights: Tensor, moe: MoEConfig, num_experts: int, num_slices: int) -> Tensor:
    """[T, k]: which choices find room, each of `num_slices` ranks filling its experts' places on its own."""
    if moe.dropless:
        return torch.ones_like(choices, dtype=torch.bool)
    routed = len(choices) // num_slices
    capacity = moe.top_k * math.ceil(moe.capacity_factor * routed / num_experts)
    kept = []
    for chosen, weight in zip(choices.split(routed), weights.split(routed), strict=True):
        if moe.drop_policy == "position":
            kept += kept_by_position(chosen.tolist(), num_experts, capacity)
        else:
            kept += kept_by_probability(chosen.tolist(), weight.tolist(), num_experts, capacity)
    return torch.tensor(kept)


def beside(x: Tensor, routed: Tensor, shared: Tensor, weights: dict[str, Tensor], layer: str, moe: MoEConfig) -> Tensor:
    """Join what the experts and the shared expert make of tokens x, all [T, d]."""
    if moe.shared_expert_mix == "add":
        return routed + shared
    name = f"{layer}.shared_expert_mix"
    if moe.shared_expert_mix == "sigmoid_gate":
        return routed + shared / (1 + torch.exp(-(x @ weights[f"{name}.weight"][0])))[:, None]
    w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
    e0, e1 = ((x @ w[i] + b[i]).exp()[:, None] for i in (0, 1))
    return (e0 * routed + e1 * shared) / (e0 + e1)


def mixture(
    x: Tensor, weights: dict[str, Tensor], layer: str, moe: MoEConfig, feed_forward: Callable[..., Tensor], *,
    num_slices: int = 1, num_sequences: int = 1, bias: Tensor | None = None,
) -> Mixed:  # fmt: skip
    """The MoE layer on tokens x [T, d], of `num_sequences` sequences by turns, that `num_slices` ranks route a slice
    each; `feed_forward(x, weights, name, expert=e)` is one expert. The router's rows say how many there are."""
    num_experts = len(weights[f"{layer}.router.weight"])
    logits = F.linear(x.float(), weights[f"{layer}.router.weight"].float())
    choices, raw, probabilities = choose(logits, moe, bias)
    by_scope = num_sequences if moe.balance_loss_scope == "sequence" else 1
    losses = [balance(probabilities[i::by_scope], choices[i::by_scope], moe) for i in range(by_scope)]
    kept = keep(choices, raw, moe, num_experts, num_slices)
    gates = raw * kept
    if moe.normalize_gates:
        counted = raw if moe.normalize_when == "before_drops" else gates
        gates = gates / counted.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    gates = gates * moe.routed_scaling_factor

    output = torch.zeros(x.shape)
    for e in range(num_experts):
        token, j = ((choices == e) & kept).nonzero(as_tuple=True)
        answer = feed_forward(x[token], weights, f"{layer}.experts", expert=e)
        output = output.index_add(0, token, gates[token, j][:, None] * answer.float())
    output = output.to(x.dtype)
    if moe.shared_expert_ffn_hidden_size is not None:
        output = beside(x, output, feed_forward(x, weights, f"{layer}.shared_expert"), weights, layer, moe)
    load = torch.bincount(choices.flatten(), minlength=num_experts)
    z_loss = torch.logsumexp(logits, -1).square().mean()
    return Mixed(output, sum(losses) / by_scope, z_loss, int((~kept).sum()), load)


def next_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Below the mean load the bias rises, above it falls, at it stays."""
    return bias + rate * torch.sign(load.double().sum() - load.double() * len(load)).float()
