"""One flipped bit in one copy of a weight stops the run on all ranks, which name the rank and the tensor."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megamoe.errors import TrainingStopped
from megamoe.training.build import Trainer
from megamoe.training.replicas import ReplicaCheck, check_replicas, fingerprint
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, config, parallel, samples, steps, trainer_of

# model, layout, and what is flipped: (rank, name, last stage's copy of the tied embedding)
RUNS = {
    "data": ("paper_all", parallel(tp=2, ep=2, sp=True, zero=1), (2, "layers.1.attention.qkv.weight", False)),
    "experts": ("paper_all", parallel(ep=2, zero=2), (3, "layers.0.experts.fc2.weight", False)),
    "tied": ("paper_all", parallel(tp=2, pp=2, zero=0), (2, "embedding.weight", True)),
    "bf16": ("bias", (*parallel(zero=1), "run.precision=bf16"), (1, "layers.3.router.weight", False)),
}


def flip(trainer: Trainer, name: str, *, tied_copy: bool, element: int, bit: int) -> None:
    (local,) = (p for p in trainer.parameters if p.parameter.name == name and p.tied_copy == tied_copy)
    values = local.tensor.detach().view(-1)
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
    mask = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit)
    bits[element] = (bits[element].long() ^ mask).to(bits.dtype)


def verdict(trainer: Trainer) -> str:
    try:
        check_replicas(trainer)
    except TrainingStopped as error:
        return str(error)
    return ""


def flipped() -> dict[str, Any]:
    found = {}
    for name, (model, layout, (where, tensor, tied_copy)) in RUNS.items():
        with trainer_of(config(model, layout)) as trainer:
            rank = dist.get_rank()
            steps(trainer, samples(trainer.config, 2))
            said = [verdict(trainer)]
            for element, bit in ((0, 0), (-1, 3), (7, 14)):
                if rank == where:
                    flip(trainer, tensor, tied_copy=tied_copy, element=element, bit=bit)
                said.append(verdict(trainer))
                if rank == where:
                    flip(trainer, tensor, tied_copy=tied_copy, element=element, bit=bit)
            said.append(verdict(trainer))
            trainer.step += rank == 1
            said.append(verdict(trainer))
            trainer.step -= rank == 1
            usual = trainer.config
            if rank == 0:
                trainer.config = usual.model_copy(update={"run": usual.run.model_copy(update={"seed": 77})})
            said.append(verdict(trainer))
            trainer.config = usual
            hook = ReplicaCheck(interval_steps=3)
            if rank == where:
                flip(trainer, tensor, tied_copy=tied_copy, element=1, bit=1)
            hook.after_step(trainer, None)  # step 2: not yet
            trainer.step = 3
            with pytest.raises(TrainingStopped):
                hook.after_step(trainer, None)
            found[name] = said
    return found


def test_a_flipped_bit_is_found_and_named_on_all_ranks():
    by_rank = run_ranks(flipped, 4, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)
    assert all(found == by_rank[0] for found in by_rank)
    for name, (_, _, (where, tensor, _)) in RUNS.items():
        sound, *flips, again, step, settings = by_rank[0][name]
        assert sound == again == ""
        for message in flips:
            assert tensor in message and message.startswith("after step 2 "), (name, message)
            assert f"rank {where}" in message or f"{where}" in message.split(" on ranks ")[1].split(" differ")[0]
        assert "the step is not the same on all ranks" in step
        assert "the configuration is not the same on all ranks" in settings
    assert "differs on rank 1 from its copies on the other ranks of [0, 1, 2, 3]" in by_rank[0]["bf16"][1]


def test_any_single_bit_changes_the_fingerprint():
    draw = np.random.default_rng(3)
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16)):
        values = torch.randn(5000).to(dtype)
        usual = int(fingerprint(values))
        width = 8 * values.element_size()
        for _ in range(300):
            changed = values.clone()
            element, bit = int(draw.integers(5000)), int(draw.integers(width))
            pattern = np.array([1 << bit], dtype=np.uint64).astype(f"uint{width}").view(f"int{width}")[0]
            changed.view(bits)[element] ^= int(pattern)
            assert int(fingerprint(changed)) != usual
        swapped = values.clone()
        swapped[[3, 4]] = values[[4, 3]]
        assert int(fingerprint(swapped)) != usual, "places count"
