"""Experts without tokens, ranks all of whose experts have none, and both ways the experts' products are done."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.training.build import Trainer
from megamoe.training.report import load_report
from tests.harness import run_ranks
from tests.parallel.worlds import LAUNCH_TIMEOUT_SECONDS, config, parallel, samples, step, trainer_of
from tests.parity.initial import initial_weights
from tests.parity.ranks import pieces
from tests.parity.reference import ReferenceRun, StepResult, global_batch
from tests.parity.test_training import assemble

CONSTANT = ("optimizer.clip_grad=0.5", "moe.balance_loss_coeff=0")
# Router weights of zero give every expert the same score, and ties go to the lowest number: all tokens choose experts
# 0 and 1, which are the first rank's of 2 ranks with 4 experts, and of 4 ranks with 8.
CASES = {
    "ep2": (2, "paper", parallel(ep=2, zero=0)),
    "ep2_zero2": (2, "paper", parallel(ep=2, zero=2)),
    "ep2_tensor": (2, "modern_second", parallel(tp=2, ep=2, sp=True, zero=1)),
    "ep4": (4, "paper_all", parallel(ep=4, zero=1)),
    "ep4_capacity": (4, "paper_all_capacity", parallel(tp=2, ep=4, zero=2)),
    "ep4_recompute": (4, "modern", parallel(ep=4, zero=2, recompute="full")),
}
NUM_STEPS = 2


def settings_of(name: str):
    _, model, layout = CASES[name]
    return config(model, (*layout, *CONSTANT), optimizer="sgd")


def on_rank(world: int) -> dict[str, Any]:
    return {name: train(name) for name, (ranks, _, _) in CASES.items() if ranks == world}


def silence_routers(trainer: Trainer) -> None:
    """Set router weights to zero, in ZeRO's fp32 partitions too."""
    for local in trainer.parameters:
        if local.parameter.kind == "router":
            local.view.zero_()
    zero = trainer.engine.optimizer
    for index, master in enumerate(getattr(zero, "single_partition_of_fp32_groups", ())):
        partition = torch.distributed.get_rank(zero.real_dp_process_group[index])
        master.data.copy_(zero.parallel_partitioned_bit16_groups[index][partition])


def train(name: str) -> dict[str, Any]:
    settings = settings_of(name)
    with trainer_of(settings) as trainer:
        silence_routers(trainer)
        rows, loads, weights = [], [], []
        for batch in samples(settings, NUM_STEPS):
            rows.append(step(trainer, batch))
            report = load_report(trainer)
            assert report is not None
            loads.append(report.by_layer)
            weights.append(pieces(trainer))
        return {"rows": rows, "loads": loads, "weights": weights}


@cache
def launch(world: int) -> list[dict[str, Any]]:
    return run_ranks(on_rank, world, world, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def reference(name: str) -> tuple[list[StepResult], list[dict[str, np.ndarray]]]:
    settings, (world, _, _) = settings_of(name), CASES[name]
    weights = initial_weights(settings)
    for key in weights:
        if ".router." in key:
            weights[key].zero_()
    run, found, after = ReferenceRun(settings, weights), [], []
    num_data = world // settings.parallel.tensor_parallel_size
    for batch in samples(settings, NUM_STEPS):
        found.append(run.step(global_batch(torch.from_numpy(batch), settings.run.micro_batch_size, num_data)))
        after.append({key: weight.detach().numpy().copy() for key, weight in run.weights.items()})
    return found, after


@pytest.mark.parametrize("name", CASES)
def test_idle_experts_and_ranks_train_as_the_reference(name):
    settings, ranks = settings_of(name), [rank[name] for rank in launch(CASES[name][0])]
    expected, expected_weights = reference(name)
    for number, after in enumerate(expected_weights):
        for rank in ranks:
            row = rank["rows"][number]
            assert row["was_applied"]
            assert row["lm_loss"] == pytest.approx(expected[number].lm_loss, rel=1e-5)
            assert row["grad_norm"] == pytest.approx(expected[number].grad_norm, rel=2e-5)
        whole = assemble(settings, [rank["weights"][number] for rank in ranks])
        for key, values in after.items():
            np.testing.assert_allclose(whole[key], values, rtol=0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_idle_experts_get_no_gradient(name):
    """Plain SGD without weight decay: an expert that did not move had a gradient of zero."""
    settings, ranks = settings_of(name), [rank[name] for rank in launch(CASES[name][0])]
    start, whole = initial_weights(settings), assemble(settings, [rank["weights"][0] for rank in ranks])
    experts = [key for key in start if ".experts." in key]
    assert experts
    for demand in ranks[0]["loads"][0].values():
        assert min(demand[:2]) > 0 and not any(demand[2:])
    for key in experts:
        np.testing.assert_array_equal(whole[key][2:], start[key][2:].numpy(), err_msg=key)
        assert (whole[key][:2] != start[key][:2].numpy()).any(), key
