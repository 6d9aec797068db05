"""The paper's gate, rule by rule, in Python loops over tokens and double precision.

Source: "Efficient Large Scale Language Modeling with Mixtures of Experts" (arXiv 2112.10684) and its released code:
GShard top-2 over the softmax of all E logits, the second choice the plain argmax of the rest, capacity per rank,
positions in the batch as the only priority, all first choices before any second one, gates renormalised only after
the drops, balance loss of the first choices before the drops. S tokens, E experts.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Row = Sequence[float]


class PaperGate(NamedTuple):
    """What the gate decides for S tokens; the paper's k is 2."""

    choices: list[tuple[int, ...]]  # [S][k], first, second, ... expert
    gates: list[tuple[float, ...]]  # [S][k], weight of each expert's answer; 0 where dropped
    kept: list[tuple[bool, ...]]  # [S][k]
    balance_loss: float


def paper_capacity(num_tokens: int, num_experts: int) -> int:
    """Tokens one expert takes from one rank's micro-batch: 2 * ceil(S / E)."""
    return 2 * math.ceil(num_tokens / num_experts)


def softmax(row: Row) -> list[float]:
    largest = max(row)
    exponentials = [math.exp(logit - largest) for logit in row]
    total = sum(exponentials)
    return [value / total for value in exponentials]


def argmax(row: Row, without: Sequence[int] = ()) -> int:
    """Index of the largest value that is not in `without`; of equal values the lowest index."""
    best = -1
    for index, value in enumerate(row):
        if index in without:
            continue
        if best < 0 or value > row[best]:
            best = index
    return best


def paper_gate(logits: Sequence[Row], capacity: int) -> PaperGate:
    """Route the tokens whose gate logits are `logits` [S][E]; each expert holds `capacity` of them."""
    num_tokens, num_experts = len(logits), len(logits[0])

    probabilities = []
    for row in logits:
        probabilities.append(softmax(row))

    # Each token's two experts.
    first, second = [], []
    for token in range(num_tokens):
        first.append(argmax(probabilities[token]))
        second.append(argmax(probabilities[token], without=[first[token]]))

    # A token's place in its expert's queue: first choices in the order of the batch ...
    queue_length = [0] * num_experts
    first_place = []
    for token in range(num_tokens):
        first_place.append(queue_length[first[token]])
        queue_length[first[token]] += 1
    # ... and behind all of them the second choices, in the same order.
    second_place = []
    for token in range(num_tokens):
        second_place.append(queue_length[second[token]])
        queue_length[second[token]] += 1

    kept, gates = [], []
    for token in range(num_tokens):
        first_fits = first_place[token] < capacity
        second_fits = second_place[token] < capacity
        first_gate = probabilities[token][first[token]] if first_fits else 0.0
        second_gate = probabilities[token][second[token]] if second_fits else 0.0
        # Renormalise what is left: alone, a choice weighs 1; with none left, both weigh 0.
        total = first_gate + second_gate
        if total > 0.0:
            first_gate, second_gate = first_gate / total, second_gate / total
        kept.append((first_fits, second_fits))
        gates.append((first_gate, second_gate))

    # Balance: mean probability of an expert times the share of tokens that choose it first, dropped or not.
    balance_loss = 0.0
    for expert in range(num_experts):
        mean_probability = sum(probabilities[token][expert] for token in range(num_tokens)) / num_tokens
        share_of_first_choices = sum(1 for token in range(num_tokens) if first[token] == expert) / num_tokens
        balance_loss += mean_probability * share_of_first_choices
    balance_loss *= num_experts

    return PaperGate(list(zip(first, second, strict=True)), gates, kept, balance_loss)


def gate_of_k(logits: Sequence[Row], capacity: int | None, top_k: int, *, normalize: bool) -> PaperGate:
    """The same rules for any number of choices; `capacity` None drops nothing, balance counts first choices."""
    probabilities = [softmax(row) for row in logits]
    choices: list[list[int]] = [[] for _ in logits]
    for chosen, row in zip(choices, probabilities, strict=True):
        for _ in range(top_k):
            chosen.append(argmax(row, without=chosen))

    kept: list[list[bool]] = [[False] * top_k for _ in logits]
    queue_length = [0] * len(logits[0])
    for choice in range(top_k):
        for token in range(len(logits)):
            expert = choices[token][choice]
            kept[token][choice] = capacity is None or queue_length[expert] < capacity
            queue_length[expert] += 1

    gates = []
    for token, row in enumerate(probabilities):
        left = [row[e] if fits else 0.0 for e, fits in zip(choices[token], kept[token], strict=True)]
        total = sum(left) if normalize else 1.0
        gates.append(tuple(gate / total if total > 0.0 else 0.0 for gate in left))

    balance_loss = 0.0
    for expert in range(len(logits[0])):
        mean_probability = sum(row[expert] for row in probabilities) / len(logits)
        balance_loss += mean_probability * sum(row[0] == expert for row in choices) / len(logits)
    return PaperGate(
        [tuple(row) for row in choices], gates, [tuple(row) for row in kept], balance_loss * len(logits[0])
    )
