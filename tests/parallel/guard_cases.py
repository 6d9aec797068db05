"""Faults for the guard to find: something on one rank, in one layer or expert, at one micro-batch, goes wrong."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from megamoe.training.build import Trainer
from tests.parallel.worlds import parallel

CONSTANT = ("optimizer.schedule=constant", "optimizer.min_lr=0", "optimizer.warmup_steps=0")
GUARD = (
    "guard.judge_after_steps=0", "guard.window_steps=16", "guard.min_window_steps=8", "guard.divergence_steps=16",
    "guard.grad_norm_factor=20", "guard.min_rise=0.5", "guard.guessing_margin=100", "guard.divergence_rise=100",
)  # fmt: skip
MIN_WINDOW = 8
BF16 = ("run.precision=bf16",)
DROPOUT = ("model.hidden_dropout=0.2", "model.attention_dropout=0.2")
BIAS = ("moe.score_function=sigmoid", "moe.balance_bias_update_rate=0.01", "moe.input_jitter=0.1")
# name -> ranks, settings
LAYOUTS = {
    "one": (1, parallel(zero=0)),
    "tensor": (2, parallel(tp=2, zero=0)),
    "stages": (2, (*parallel(pp=2, zero=2), *BF16)),
    "experts": (2, (*parallel(ep=2, zero=1), *BF16)),
    "stages_experts": (4, parallel(pp=2, ep=2, zero=1)),
    "interleaved": (4, (*parallel(pp=2, vp=2, zero=0), "run.global_batch_size=16")),
    "sequence": (4, (*parallel(tp=2, ep=4, sp=True, zero=2), *BF16)),
    "all": (8, parallel(tp=2, pp=2, ep=2, zero=1)),
}
KINDS = ("activation", "gradient", "large gradient", "loss")
NAMES = ("attention.out.weight", "experts.fc1.weight", "experts.fc2.weight", "router.weight", "norm")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and where. Whatever a rank has not is taken from what it has, by `draw`."""

    kind: str
    rank: int
    micro_batch: int
    value: float
    draw: float  # in [0, 1): which of a rank's layers or parameters, which of an expert's

    def __str__(self) -> str:
        return f"{self.kind} {self.value} on rank {self.rank}, micro-batch {self.micro_batch}, {self.draw:.2f}"


def faults_of(name: str, count: int) -> list[Fault]:
    """The same for everybody who asks; every kind in turn."""
    draw, world = random.Random(f"faults of {name}"), LAYOUTS[name][0]
    found = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        value = {"large gradient": 1e4, "loss": 60.0}.get(kind) or draw.choice((math.nan, math.inf, -math.inf))
        found.append(Fault(kind, draw.randrange(world), draw.randrange(2), value, draw.random()))
    return found


@contextmanager
def fault(trainer: Trainer, what: Fault | None) -> Iterator[None]:
    """Inside, one training step goes wrong as `what` says."""
    handles = list(_hooks(trainer, what)) if what is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(trainer: Trainer, what: Fault) -> Iterator[Any]:
    here = trainer.groups.coordinates
    if what.kind == "loss":
        last = next((chunk for chunk in trainer.chunks if chunk.post_process), None)
        # Tensor ranks compute one and the same loss: all of a data rank, or none.
        if last is not None and here.data == what.rank % trainer.groups.grid.data:
            yield last.register_forward_hook(_at(what, lambda output: output * what.value))
    elif torch.distributed.get_rank() == what.rank:
        if what.kind == "activation":
            layers = [layer for chunk in trainer.chunks for layer in chunk.decoder.layers]
            layer = layers[int(what.draw * len(layers))]
            yield layer.register_forward_hook(_at(what, lambda output: (output[0] * what.value, *output[1:])))
        else:
            yield _parameter(trainer, what).tensor.register_hook(_at_gradient(what))


def _parameter(trainer: Trainer, what: Fault) -> Any:
    found = [each for each in trainer.parameters if any(name in each.parameter.name for name in NAMES)]
    if what.kind == "large gradient":  # of copies on tensor ranks the norm counts the first
        found = [each for each in found if not trainer.engine.finalizer._is_tensor_copy(each)]
    return found[int(what.draw * len(found))]


def _at(what: Fault, change: Any) -> Any:
    calls = iter(range(1_000))
    return lambda _module, _inputs, output: change(output) if next(calls) == what.micro_batch else None


def _at_gradient(what: Fault) -> Any:
    calls = iter(range(1_000))

    def change(gradient: torch.Tensor) -> torch.Tensor | None:
        if next(calls) != what.micro_batch:
            return None
        broken = gradient.clone()
        broken[int(what.draw * len(broken))] += what.value
        return broken

    return change
