"""Fine-tuning in plain PyTorch: losses of every kind are summed where they count and divided by their number in the
global batch, whoever works on them; frozen weights ask for no gradient."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megamoe.config.schema import Config
from tests.parity.reference import ReferenceRun, Weights, forward, learning_rate

END, FIRST_BYTE = 2, 4  # of the byte tokenizer


@dataclass(frozen=True)
class Example:
    """tokens [s], labels [s], mask [s], by the rules of docs/finetune.md done by hand."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor


def write_examples(path: Path, task: str, num_examples: int, seed: int = 3) -> list[dict]:
    """Examples of uneven lengths that fit 16 positions: some completions have one letter, some nine."""
    draw = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(1, longest)))

    trees = [
        {"text": word(16), "label": draw.randrange(3)}
        if task == "classify"
        else {"prompt": word(6), "completion": word(9)}
        for _ in range(num_examples)
    ]
    path.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
    return trees


def by_hand(tree: dict, seq_length: int) -> Example:
    tokens, labels = torch.full((seq_length,), END), torch.zeros(seq_length, dtype=torch.int64)
    mask = torch.zeros(seq_length, dtype=torch.bool)
    if "label" in tree:
        ids = [FIRST_BYTE + byte for byte in tree["text"].encode()]
        tokens[: len(ids)] = torch.tensor(ids)
        labels[len(ids) - 1], mask[len(ids) - 1] = tree["label"], True
        return Example(tokens, labels, mask)
    prompt, completion = (tree[key].encode() for key in ("prompt", "completion"))
    ids = [*(FIRST_BYTE + byte for byte in prompt + completion), END]
    tokens[: len(ids) - 1], labels[: len(ids) - 1] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    mask[len(prompt) - 1 : len(ids) - 1] = True
    return Example(tokens, labels, mask)


class FinetuneReference(ReferenceRun):
    """`frozen`: the names of weights that do not change."""

    def __init__(self, config: Config, weights: Weights, frozen: Sequence[str]) -> None:
        super().__init__(config, weights)
        for name in frozen:
            self.weights[name].requires_grad_(False)

    def finetune_step(self, examples: Sequence[Example]) -> tuple[float, float]:
        """One step on a global batch, in the order of its samples; (loss, gradient norm)."""
        moe, size = self.config.moe, self.config.run.micro_batch_size
        groups = [examples[first : first + size] for first in range(0, len(examples), size)]
        num_losses = sum(int(example.mask.sum()) for example in examples)
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for group in groups:
            tokens, labels, mask = (torch.stack([getattr(e, k) for e in group]) for k in ("tokens", "labels", "mask"))
            logits, mixed = forward(self.config, self.weights, tokens, self.num_slices)
            loss = F.cross_entropy(logits[mask], labels[mask], reduction="sum") / num_losses
            routing = sum((moe.balance_loss_coeff * m.balance_loss for m in mixed.values()), torch.zeros(()))
            (loss + routing / len(groups)).backward()
            total += loss.item()
        grads = [w.grad for w in self.weights.values() if w.grad is not None]
        norm = float(np.sqrt(sum(g.double().square().sum().item() for g in grads)))
        clip = self.config.optimizer.clip_grad
        if 0 < clip < norm:
            for grad in grads:
                grad *= clip / (norm + 1e-6)
        self.num_steps += 1
        rate = learning_rate(self.config, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.step()
        return total, norm

    @torch.no_grad()
    def validate(self, examples: Sequence[Example]) -> tuple[float, float]:
        """(mean loss, share of right answers) of all that counts in `examples`; drops are off in these models."""
        tokens, labels, mask = (torch.stack([getattr(e, k) for e in examples]) for k in ("tokens", "labels", "mask"))
        logits, _ = forward(self.config, self.weights, tokens, self.num_slices)
        right = (logits[mask].argmax(-1) == labels[mask]).double().mean()
        return F.cross_entropy(logits[mask], labels[mask]).item(), right.item()
