"""bf16 over fp32 master weights, and fp16 with a dynamic loss scale, in several layouts.

Tolerances are several times what was measured here over the layouts below, as losses and norms relative to the fp32
run of the plain reference: bf16 4e-4 and 2e-3 (the reference itself, in bf16: 3e-4), fp16 5e-5 and 4e-4.
"""

from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megamoe.errors import ConfigError, TrainingStopped
from megamoe.training.build import Trainer
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
    steps,
    trainer_of,
    weights,
)
from tests.parity.initial import initial_weights
from tests.parity.reference import ReferenceRun, global_batch

NUM_STEPS = 5
BF16_LOSS, BF16_NORM = 2e-3, 1e-2
FP16_LOSS, FP16_NORM = 2e-4, 1e-3

LAYOUTS = {  # ranks -> layout
    1: parallel(zero=2),
    2: parallel(tp=2, ep=2, sp=True, zero=1),
    4: parallel(pp=2, ep=2, zero=2),
    8: parallel(tp=2, pp=2, ep=2, zero=1),
}
BF16, FP16 = ("run.precision=bf16",), ("run.precision=fp16",)
STILL = ("optimizer.lr=0", "optimizer.min_lr=0", "optimizer.warmup_steps=0")
MANY = 32  # micro-batches; a power of two, so that their gradients are scaled exactly
FP16_WORLD = 4

# The scale starts where everything overflows, comes down to where nothing does, and goes up again.
DYNAMIC = (*FP16, "optimizer.initial_loss_scale=16777216", "optimizer.loss_scale_window_steps=2")
NUM_DYNAMIC_STEPS = 16
WINDOW = 2
STUCK = (*FP16, "optimizer.initial_loss_scale=33554432", "optimizer.min_loss_scale=16777216")


def on_rank(world: int) -> dict[str, Any]:
    """All scenarios of one world size."""
    found: dict[str, Any] = {"bf16": train(world, BF16), "sums": sums_of_many(world), "refusal": refusal(world)}
    if world == 2:
        found["bf16_residual"] = train(world, BF16, "residual")
    if world == FP16_WORLD:
        get_accelerator().is_fp16_supported = lambda: True
        found |= {"fp16": train(world, FP16), "dynamic": dynamic_scale(world), "stuck": stuck_scale(world)}
    return found


def train(world: int, precision: tuple[str, ...], model: str = "paper") -> dict[str, Any]:
    settings = config(model, (*LAYOUTS[world], *precision))
    with trainer_of(settings) as trainer:
        rows = steps(trainer, samples(settings, NUM_STEPS))
        return {"rows": rows, **master_facts(trainer)}


def master_facts(trainer: Trainer) -> dict[str, Any]:
    """How this rank's fp32 partitions relate to its weights."""
    zero, differing, finer, total = trainer.engine.optimizer, 0, 0, 0
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        partition = torch.distributed.get_rank(zero.real_dp_process_group[index])
        low = zero.parallel_partitioned_bit16_groups[index][partition]
        differing += int((master.to(low.dtype) != low).sum())
        finer += int((master != low.float()).sum())
        total += int(master.count_nonzero())
    dtypes = {str(value.dtype) for value in optimizer_state(trainer).values()}
    return {"differing": differing, "finer": finer / total, "dtypes": dtypes, "low": str(low.dtype)}


def sums_of_many(world: int) -> tuple[float, float]:
    """Gradient norms of one micro-batch per rank, and of the same micro-batch many times over."""
    settings = config("paper", (*LAYOUTS[world], *BF16, *STILL), optimizer="sgd")
    with trainer_of(settings) as trainer:
        num_data = trainer.groups.grid.data
        rows = samples(settings, 1)[0, : settings.run.micro_batch_size]
        once = step(trainer, np.tile(rows, (num_data, 1)))
        many = step(trainer, np.tile(rows, (num_data * MANY, 1)))
        return once["grad_norm"], many["grad_norm"]


def refusal(world: int) -> str:
    from megamoe.training.engine import create_engine

    settings = config("paper", (*LAYOUTS[world], *FP16))
    unable = patch.object(type(get_accelerator()), "is_fp16_supported", lambda self: False)  # some CPUs are able
    with unable, pytest.raises(ConfigError) as error:  # nothing of the arguments is looked at before
        create_engine([], [], None, settings, None)
    return str(error.value)


def dynamic_scale(world: int) -> list[dict[str, Any]]:
    settings = config("paper", (*LAYOUTS[world], *DYNAMIC))
    rows = []
    with trainer_of(settings) as trainer:
        for batch in samples(settings, NUM_DYNAMIC_STEPS):
            before = weights(trainer), optimizer_state(trainer)
            scale = trainer.engine.current_loss_scale
            row = step(trainer, batch)
            after = weights(trainer), optimizer_state(trainer)
            row |= {"before": scale, "after": trainer.engine.current_loss_scale}
            row["same_weights"] = all(np.array_equal(after[0][name], value) for name, value in before[0].items())
            if not row["was_applied"]:
                for old, new in zip(before, after, strict=True):
                    assert_same_arrays(new, old)
            rows.append(row)
    return rows


def stuck_scale(world: int) -> tuple[list[float], str]:
    settings = config("paper", (*LAYOUTS[world], *STUCK))
    scales: list[float] = []
    with trainer_of(settings) as trainer:
        start = weights(trainer)
        with pytest.raises(TrainingStopped) as error:
            note_scales(trainer, samples(settings, 4), scales)
        assert_same_arrays(weights(trainer), start)
    return scales, str(error.value)


def note_scales(trainer: Trainer, batches: np.ndarray, scales: list[float]) -> None:
    for batch in batches:
        scales.append(trainer.engine.current_loss_scale)
        step(trainer, batch)


@cache
def launch(world: int) -> list[dict[str, Any]]:
    return run_ranks(on_rank, world, world, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@cache
def reference(dtype: torch.dtype, model: str = "paper") -> tuple[np.ndarray, np.ndarray]:
    """Losses and norms of the plain reference. Dropless, so every layout of the model has the same."""
    settings = config(model)
    run = ReferenceRun(settings, initial_weights(settings), dtype=dtype)
    batches = torch.from_numpy(samples(settings, NUM_STEPS))
    found = [run.step(global_batch(batch, settings.run.micro_batch_size, 1)) for batch in batches]
    return np.array([s.lm_loss for s in found]), np.array([s.grad_norm for s in found])


@pytest.mark.parametrize("world", LAYOUTS)
def test_bf16_trains_as_fp32_does_within_its_tolerance(world):
    assert_close(world, "bf16", BF16_LOSS, BF16_NORM)


def test_a_shared_expert_in_bf16_trains_as_in_fp32_within_its_tolerance():
    assert_close(2, "bf16_residual", BF16_LOSS, BF16_NORM, "residual")


def test_fp16_trains_as_fp32_does_within_its_tolerance():
    assert_close(FP16_WORLD, "fp16", FP16_LOSS, FP16_NORM)


def assert_close(
    world: int, precision: str, loss_tolerance: float, norm_tolerance: float, model: str = "paper"
) -> None:
    losses, norms = reference(torch.float32, model)
    for rank in launch(world):
        rows = rank[precision]["rows"]
        assert column(rows, "was_applied") == [True] * NUM_STEPS
        loss_error = np.abs(column(rows, "lm_loss") / losses - 1)
        norm_error = np.abs(column(rows, "grad_norm") / norms - 1)
        print(f"{world} ranks, {precision}: loss {loss_error.max():.1e}, norm {norm_error.max():.1e}")
        assert loss_error.max() < loss_tolerance and norm_error.max() < norm_tolerance
        assert loss_error.max() > 1e-8  # it did compute in another precision


def test_reference_in_bf16_is_as_far_from_fp32():
    """The tolerance is that of the number format, not of our code."""
    losses, _ = reference(torch.float32)
    low_losses, _ = reference(torch.bfloat16)
    error = np.abs(low_losses / losses - 1).max()
    print(f"reference bf16: loss {error:.1e}")
    assert BF16_LOSS / 100 < error < BF16_LOSS


@pytest.mark.parametrize(
    ("world", "precision"), [*((world, "bf16") for world in LAYOUTS), (FP16_WORLD, "fp16")]
)
def test_master_weights_are_fp32(world, precision):
    for rank in launch(world):
        facts = rank[precision]
        assert facts["low"] == {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
        assert facts["dtypes"] == {"float32"}  # masters, moments, steps
        assert facts["differing"] == 0  # the weights are the masters, rounded
        assert facts["finer"] > 0.9  # and the masters hold what the weights cannot


@pytest.mark.parametrize("world", LAYOUTS)
def test_gradients_of_many_micro_batches_are_summed_in_fp32(world):
    """32 equal parts: a sum in bf16 would round at each of them."""
    for once, many in (rank["sums"] for rank in launch(world)):
        assert many == pytest.approx(once, rel=1e-5)


def test_fp16_is_refused_where_the_accelerator_has_none():
    for rank in launch(1):
        assert rank["refusal"] == (
            "run.precision fp16 is not supported by this machine's cpu accelerator: use bf16 or fp32"
        )


def test_loss_scale_falls_on_overflow_and_rises_after_the_window():
    ranks = [rank["dynamic"] for rank in launch(FP16_WORLD)]
    for rank in ranks:  # NaN losses would not compare equal, but losses never overflow here
        for key in ("was_applied", "before", "after"):
            assert column(rank, key) == column(ranks[0], key)
    applied = column(ranks[0], "was_applied")
    assert applied[0] is False and True in applied and applied.count(False) >= 2
    num_good, num_rises = 0, 0
    for row in ranks[0]:
        num_good = num_good + 1 if row["was_applied"] else 0
        expected = row["before"] if row["was_applied"] else row["before"] / 2
        if num_good > 1 and (num_good - 1) % WINDOW == 0:  # DeepSpeed counts from the step after the first good one
            expected, num_rises = row["before"] * 2, num_rises + 1
        assert row["after"] == expected
        assert np.isfinite(row["grad_norm"]) == row["was_applied"]
    assert num_rises >= 2
    for rank in ranks:
        assert [row["same_weights"] for row in rank] == [not row["was_applied"] for row in rank]


def test_running_out_of_loss_scale_stops_with_the_reason():
    for scales, text in (rank["stuck"] for rank in launch(FP16_WORLD)):
        assert scales == [2.0**25, 2.0**24]
        assert text == (
            "the fp16 loss scale fell to its minimum, optimizer.min_loss_scale 16777216.0, and gradients still "
            "overflow: lower optimizer.lr, or use run.precision=bf16"
        )
