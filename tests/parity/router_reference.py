"""Every router, drop policy and routing loss, rule by rule, in Python loops over tokens and double precision.

Written from the papers, beside the product and not from it; `gate_reference.py` is the paper's own gate. S tokens,
E experts, k choices. Everything takes and returns nested lists.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tests.parity.gate_reference import argmax, softmax

Row = Sequence[float]


class Wanted(NamedTuple):
    """What a router wants before any capacity."""

    choices: list[list[int]]  # [S][k], best first
    weights: list[list[float]]  # [S][k], before normalisation
    probabilities: list[list[float]]  # [S][E], what balance losses see


def sigmoid(value: float) -> float:
    return 1.0 / (1.0 + math.exp(-value))


def best(row: Row, count: int, allowed: Sequence[int] | None = None) -> list[int]:
    """The `count` largest of `allowed`, best first; of equal ones the lowest index first."""
    allowed = range(len(row)) if allowed is None else allowed
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(argmax(row, without=[*chosen, *(i for i in range(len(row)) if i not in allowed)]))
    return chosen


def allowed_experts(row: Row, num_groups: int, num_selected: int, best_of: int) -> list[int]:
    """DeepSeek: the experts of the groups whose `best_of` best scores have the largest sums."""
    size = len(row) // num_groups
    group_scores = []
    for group in range(num_groups):
        members = sorted(row[group * size : (group + 1) * size], reverse=True)
        group_scores.append(sum(members[:best_of]))
    return [expert for group in best(group_scores, num_selected) for expert in range(group * size, (group + 1) * size)]


def softmax_router(logits: Sequence[Row], top_k: int, groups: tuple[int, int] | None = None) -> Wanted:
    """Switch (k=1), GShard (k=2), OLMoE and Qwen (k=8), DeepSeek-V2 (with groups)."""
    choices, weights, probabilities = [], [], []
    for row in logits:
        p = softmax(row)
        chosen = best(p, top_k, None if groups is None else allowed_experts(p, *groups, best_of=1))
        choices.append(chosen)
        weights.append([p[e] for e in chosen])
        probabilities.append(p)
    return Wanted(choices, weights, probabilities)


def mixtral_router(logits: Sequence[Row], top_k: int, groups: tuple[int, int] | None = None) -> Wanted:
    """Select by logit, then softmax over the chosen ones alone."""
    choices, weights = [], []
    for row in logits:
        chosen = best(row, top_k, None if groups is None else allowed_experts(row, *groups, best_of=1))
        choices.append(chosen)
        weights.append(softmax([row[e] for e in chosen]))
    return Wanted(choices, weights, [softmax(row) for row in logits])


def sigmoid_router(
    logits: Sequence[Row], top_k: int, groups: tuple[int, int] | None = None, bias: Row | None = None
) -> Wanted:
    """DeepSeek-V3: the bias moves the choice, not the weight."""
    choices, weights, probabilities = [], [], []
    for row in logits:
        scores = [sigmoid(value) for value in row]
        biased = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
        chosen = best(biased, top_k, None if groups is None else allowed_experts(biased, *groups, best_of=2))
        choices.append(chosen)
        weights.append([scores[e] for e in chosen])
        probabilities.append([s / sum(scores) for s in scores])
    return Wanted(choices, weights, probabilities)


def kept_by_position(choices: list[list[int]], num_experts: int, capacity: int) -> list[list[bool]]:
    """Experts fill up with all first choices in the order of the batch, then all second choices, ..."""
    room = [capacity] * num_experts
    kept = [[False] * len(row) for row in choices]
    for j in range(len(choices[0])):
        for token, row in enumerate(choices):
            kept[token][j] = room[row[j]] > 0
            room[row[j]] -= 1
    return kept


def kept_by_probability(
    choices: list[list[int]], weights: list[list[float]], num_experts: int, capacity: int
) -> list[list[bool]]:
    """Each expert keeps the assignments of largest weight; of equal ones the earlier choice, then the earlier token."""
    kept = [[False] * len(row) for row in choices]
    for expert in range(num_experts):
        wanting = []
        for token, row in enumerate(choices):
            for j, wanted in enumerate(row):
                if wanted == expert:
                    wanting.append((-weights[token][j], j, token))
        for _, j, token in sorted(wanting)[:capacity]:
            kept[token][j] = True
    return kept


def gates(
    weights: list[list[float]], kept: list[list[bool]], normalization: str, scale: float = 1.0
) -> list[list[float]]:
    """What each expert's answer is multiplied by."""
    out = []
    for row, fits in zip(weights, kept, strict=True):
        left = [w if f else 0.0 for w, f in zip(row, fits, strict=True)]
        total = {"none": 1.0, "before_drops": sum(row), "after_drops": sum(left)}[normalization]
        out.append([scale * w / total if total > 0.0 else 0.0 for w in left])
    return out


def next_bias(bias: Row, load: Sequence[int], rate: float) -> list[float]:
    """Wang et al. (2024), algorithm 1: an expert above the mean load becomes less attractive, one below it more."""
    mean = sum(load) / len(load)
    moved = []
    for b, expert_load in zip(bias, load, strict=True):
        error = mean - expert_load
        moved.append(b + rate * ((error > 1e-9) - (error < -1e-9)))
    return moved


def z_loss(logits: Sequence[Row]) -> float:
    """ST-MoE (Zoph et al., 2022), eq. 5."""
    return sum(math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits) / len(logits)


def balance_loss(probabilities: Sequence[Row], choices: Sequence[Sequence[int]], *, first_only: bool) -> float:
    """E * sum_e (mean probability of e) * (share of choices that fell on e)."""
    num_experts, total = len(probabilities[0]), 0.0
    counted = [e for row in choices for e in (row[:1] if first_only else row)]
    for expert in range(num_experts):
        mean = sum(row[expert] for row in probabilities) / len(probabilities)
        total += mean * counted.count(expert) / len(counted)
    return num_experts * total
