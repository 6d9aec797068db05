"""A gradient that is not finite on one rank: no rank steps, nothing changes, and a run without progress ends."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.errors import TrainingStopped
from megamoe.training.build import Trainer
from megamoe.training.hooks import SkipGuard
from megamoe.training.step import StepResult
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    column,
    config,
    optimizer_state,
    parallel,
    samples,
    step,
    trainer_of,
    weights,
)

WORLD = 4  # two stages of two ranks, the experts shared between them
CONSTANT = ("optimizer.schedule=constant", "optimizer.min_lr=0", "optimizer.warmup_steps=0")
ZERO_STAGES = (0, 1, 2)
# What becomes NaN or infinite, and on which rank alone: a dense and an expert weight's gradient on the last stage,
# a router's on the first, and the hidden states that one rank of the first stage hands on.
FAULTS = {
    "attention.out.weight": (3, math.nan),
    "experts.fc2.weight": (2, math.inf),
    "router.weight": (1, -math.inf),
    "hidden states": (0, math.nan),
}


@contextmanager
def fault(trainer: Trainer, where: str) -> Iterator[None]:
    rank, value = FAULTS[where]
    if torch.distributed.get_rank() != rank:
        yield
        return
    if where == "hidden states":
        handle = trainer.chunks[0].decoder.layers[0].register_forward_hook(
            lambda _module, _inputs, output: (output[0] * value, *output[1:])
        )
    else:
        found = next(local for local in trainer.parameters if local.parameter.name.endswith(where))
        handle = found.tensor.register_hook(lambda gradient: gradient.clone().index_fill_(0, torch.tensor([0]), value))
    try:
        yield
    finally:
        handle.remove()


def on_rank() -> dict[int, Any]:
    return {stage: {"faulty": with_faults(stage), "clean": without_faults(stage)} for stage in ZERO_STAGES}


def settings_of(zero_stage: int):
    return config("paper", (*parallel(pp=2, ep=2, zero=zero_stage), *CONSTANT, "optimizer.clip_grad=0.5"))


def with_faults(zero_stage: int) -> dict[str, Any]:
    """Good steps, with a faulty one after the first, the second, ...; and SkipGuard's word about three in a row."""
    settings = settings_of(zero_stage)
    batches, guard, faulty_rows = samples(settings, len(FAULTS) + 1), SkipGuard(3), []
    with trainer_of(settings) as trainer:
        step(trainer, batches[0])
        for batch, where in zip(batches[1:], FAULTS, strict=True):
            before = weights(trainer), optimizer_state(trainer)
            with fault(trainer, where):
                faulty_rows.append(step(trainer, batches[0]))
            assert_same_arrays(weights(trainer), before[0])
            assert_same_arrays(optimizer_state(trainer), before[1])
            guard.after_step(trainer, StepResult(None, math.inf, was_applied=False))
            row = step(trainer, batch)
            guard.after_step(trainer, StepResult(None, row["grad_norm"], was_applied=row["was_applied"]))
        found = {"rows": faulty_rows, "weights": weights(trainer), "state": optimizer_state(trainer)}
        found |= {"step": trainer.step, "skipped": trainer.skipped_steps, "samples": trainer.samples}
        with pytest.raises(TrainingStopped) as error:
            fail_forever(trainer, guard, batches[0])
        return found | {"text": str(error.value), "skipped_at_end": trainer.skipped_steps}


def fail_forever(trainer: Trainer, guard: SkipGuard, batch: np.ndarray) -> None:
    for _ in range(4):
        with fault(trainer, "experts.fc2.weight"):
            row = step(trainer, batch)
        guard.after_step(trainer, StepResult(None, row["grad_norm"], was_applied=row["was_applied"]))


def without_faults(zero_stage: int) -> dict[str, Any]:
    settings = settings_of(zero_stage)
    with trainer_of(settings) as trainer:
        for batch in samples(settings, len(FAULTS) + 1):
            step(trainer, batch)
        return {"weights": weights(trainer), "state": optimizer_state(trainer)}


@cache
def launch() -> list[dict[int, Any]]:
    return run_ranks(on_rank, WORLD, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_faulty_step_is_skipped_on_all_ranks(zero_stage):
    """That weights and state stay equal to the bit through each faulty step is asserted on the ranks."""
    for rank in (rank[zero_stage]["faulty"] for rank in launch()):
        assert column(rank["rows"], "was_applied") == [False] * len(FAULTS)
        assert not np.isfinite(column(rank["rows"], "grad_norm")).any()


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_training_goes_on_as_if_the_faulty_steps_had_not_been(zero_stage):
    for rank in (rank[zero_stage] for rank in launch()):
        assert_same_arrays(rank["faulty"]["weights"], rank["clean"]["weights"])
        assert_same_arrays(rank["faulty"]["state"], rank["clean"]["state"])


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_skips_are_counted_and_end_the_run_at_the_limit(zero_stage):
    for rank in (rank[zero_stage]["faulty"] for rank in launch()):
        num_steps = 1 + 2 * len(FAULTS)
        assert (rank["step"], rank["samples"], rank["skipped"]) == (num_steps, 8 * num_steps, len(FAULTS))
        assert rank["skipped_at_end"] == len(FAULTS) + 3  # single skips between good steps did not add up to the limit
        assert rank["text"] == (
            f"the gradient was not finite in 3 steps in a row, up to step {num_steps + 3} (run.max_skipped_steps): "
            f"lower optimizer.lr, set optimizer.clip_grad, or look at the data around sample {8 * (num_steps + 3)}"
        )
