"""NaN and spikes at random ranks, layers, experts, micro-batches: all ranks take the same decision at the same step."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from deepspeed.accelerator import get_accelerator

from tests.harness import run_ranks
from tests.parallel.guard_cases import CONSTANT, GUARD, KINDS, LAYOUTS, MIN_WINDOW, Fault, fault, faults_of
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    config,
    optimizer_state,
    parallel,
    samples,
    step,
    trainer_of,
    weights,
)

NUM_FAULTS = 5  # of each layout
NAMES = ("one", "tensor", "experts", "stages_experts", "sequence", "all")  # ZeRO 0, 0, 1, 1, 2, 1


def settings_of(name: str):
    return config("paper", (*LAYOUTS[name][1], *CONSTANT, *GUARD, "guard.action=skip", "optimizer.clip_grad=0.5"))


def on_rank(names: list[str]) -> dict[str, Any]:
    return {name: {"faulty": with_faults(name), "clean": without_faults(name)} for name in names}


def with_faults(name: str) -> dict[str, Any]:
    """Good steps until the window is there, then a faulty and a good one in turn."""
    settings, found = settings_of(name), {"verdicts": [], "applied": []}
    batches = samples(settings, MIN_WINDOW + NUM_FAULTS)
    with trainer_of(settings) as trainer:
        for number, batch in enumerate(batches):
            if number >= MIN_WINDOW:
                before = weights(trainer) | optimizer_state(trainer)
                with fault(trainer, faults_of(name, NUM_FAULTS)[number - MIN_WINDOW]):
                    row = step(trainer, batches[0])
                found["applied"].append(row["was_applied"])
                found["verdicts"].append(trainer.judge.verdict)
                assert_same_arrays(weights(trainer) | optimizer_state(trainer), before)
            row = step(trainer, batch)
            assert trainer.judge.verdict is None, trainer.judge.verdict
            assert trainer.engine.finalizer.loss == pytest.approx(row["lm_loss"], rel=1e-12)
        counts = (trainer.step, trainer.samples, trainer.judge.num_spikes)
        return found | {"state": weights(trainer) | optimizer_state(trainer), "counts": counts}


def without_faults(name: str) -> dict[str, Any]:
    settings = settings_of(name)
    with trainer_of(settings) as trainer:
        for batch in samples(settings, MIN_WINDOW + NUM_FAULTS):
            step(trainer, batch)
        return {"state": weights(trainer) | optimizer_state(trainer)}


def loss_scales() -> list[tuple[bool, float, int, int]]:
    """In fp16, at a scale that grows after every good step: good steps, a refused one, an overflow, a good one."""
    get_accelerator().is_fp16_supported = lambda: True
    settings = config("paper", (
        *parallel(zero=1), *CONSTANT, *GUARD, "guard.action=skip", "run.precision=fp16",
        "optimizer.initial_loss_scale=8", "optimizer.loss_scale_window_steps=1",
    ))  # fmt: skip
    large, overflow = Fault("loss", 0, 0, 60.0, 0.0), Fault("gradient", 0, 0, np.inf, 0.5)
    rows, batches = [], samples(settings, MIN_WINDOW)
    with trainer_of(settings) as trainer:
        for what in (*[None] * MIN_WINDOW, large, overflow, None):
            with fault(trainer, what):
                row = step(trainer, batches[0])
            scaler = trainer.engine.optimizer.loss_scaler
            rows.append((row["was_applied"], scaler.cur_scale, scaler.cur_iter, trainer.judge.num_spikes))
    return rows


def test_a_refused_step_says_nothing_about_the_loss_scale_and_an_overflow_is_no_spike():
    ((*_, before, refused, overflow, after),) = run_ranks(loss_scales, 1, init=False)
    assert before[0] and refused == (False, *before[1:3], 1)
    assert overflow == (False, before[1] / 2, before[2] + 1, 1)
    assert after[0] and after[3] == 1


@cache
def launch(world: int) -> list[dict[str, Any]]:
    names = [name for name in NAMES if LAYOUTS[name][0] == world]
    return run_ranks(on_rank, world, names, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def of_layout(name: str) -> list[dict[str, Any]]:
    return [rank[name] for rank in launch(LAYOUTS[name][0])]


@pytest.mark.parametrize("name", NAMES)
def test_every_fault_is_found_and_no_rank_steps(name):
    """That weights and optimizer stay equal to the bit through each faulty step is asserted on the ranks."""
    for rank in of_layout(name):
        found, said = rank["faulty"], faults_of(name, NUM_FAULTS)
        assert found["applied"] == [False] * NUM_FAULTS, [
            str(each) for each, applied in zip(said, found["applied"], strict=True) if applied
        ]
        assert [verdict and (verdict.kind, verdict.is_refused) for verdict in found["verdicts"]] == [
            ("spike", True)
        ] * NUM_FAULTS


@pytest.mark.parametrize("name", NAMES)
def test_all_ranks_say_the_same(name):
    """The same numbers, to the bit, so the same verdict: not the same decision by chance."""
    first, *others = (rank["faulty"] for rank in of_layout(name))
    for other in others:
        assert str(other["verdicts"]) == str(first["verdicts"])  # NaN is not equal to itself, its name is
        assert other["counts"] == first["counts"]


@pytest.mark.parametrize("name", NAMES)
def test_reasons_tell_what_was_wrong(name):
    (verdicts, *_), kinds = (rank["faulty"]["verdicts"] for rank in of_layout(name)), faults_of(name, NUM_FAULTS)
    for verdict, what in zip(verdicts, kinds, strict=True):
        if what.kind == "large gradient":
            assert verdict.reason.startswith("the gradient norm is "), what
        elif what.kind == "loss":
            assert verdict.loss > verdict.expected + 5 and verdict.reason.startswith("the loss is "), what
        else:
            assert verdict.reason.endswith("is not finite"), (what, verdict.reason)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_as_if_the_faulty_steps_had_not_been(name):
    for rank in of_layout(name):
        assert_same_arrays(rank["faulty"]["state"], rank["clean"]["state"])
        batch = settings_of(name).run.global_batch_size
        num_steps = MIN_WINDOW + 2 * NUM_FAULTS
        assert rank["faulty"]["counts"] == (num_steps, num_steps * batch, NUM_FAULTS)


def test_the_faults_are_many_and_of_every_kind_and_rank():
    every = [(name, each) for name in NAMES for each in faults_of(name, NUM_FAULTS)]
    assert len(every) >= 30 and {LAYOUTS[name][0] for name in NAMES} == {1, 2, 4, 8}
    assert len({each.rank for name, each in every if name == "all"}) >= 4
    assert {each.kind for _, each in every} == set(KINDS)
    assert len({(each.kind, each.micro_batch, np.isfinite(each.value)) for _, each in every}) >= 7
