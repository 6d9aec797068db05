"""Experts without tokens, ranks all of whose experts have none, and both ways the experts' products are done."""

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megamoe.moe.experts import StackedExperts
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


# --- both products ----------------------------------------------------------------------------------------------------

LOADS = {"uneven": [30, 0, 3, 1], "even": [5, 5, 5, 5], "one idle": [4, 5, 0, 5], "only the last": [0, 0, 0, 9],
         "none": [0, 0, 0, 0]}  # fmt: skip


def stacked(*, gated: bool, use_bias: bool, adds_bias: bool) -> StackedExperts:
    experts = StackedExperts(
        num_local_experts=4, hidden_size=16, ffn_hidden_size=24, activation=F.silu if gated else F.gelu, gated=gated,
        use_bias=use_bias, adds_fc2_bias=adds_bias, dtype=torch.float64, device="cpu",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    return experts


def results(experts: StackedExperts, path: Any, rows: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    buffer = torch.randn(sum(rows), 16, dtype=torch.float64, generator=generator).requires_grad_()
    weigh = torch.randn(sum(rows), 16, dtype=torch.float64, generator=generator)
    experts.zero_grad()
    y = path(buffer, rows)
    (y * weigh).sum().backward()
    gradients = {f"gradient of {name}": parameter.grad.clone() for name, parameter in experts.named_parameters()}
    return {"output": y.detach(), "gradient of rows": buffer.grad, **gradients}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("gated", "use_bias", "adds_bias"), [(0, 1, 1), (1, 0, 1), (1, 1, 0), (0, 1, 0)])
def test_batched_and_one_by_one_are_equal(load, gated, use_bias, adds_bias):
    experts = stacked(gated=bool(gated), use_bias=bool(use_bias), adds_bias=bool(adds_bias))
    rows = LOADS[load]
    batched = results(experts, partial(experts._batched, most=max(1, *rows)), rows)
    one_by_one = results(experts, experts._one_by_one, rows)
    chosen = results(experts, experts.forward, rows)
    assert batched.keys() == one_by_one.keys() == chosen.keys()
    for name, values in batched.items():
        torch.testing.assert_close(one_by_one[name], values, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(chosen[name], values, rtol=1e-12, atol=1e-12, msg=name)
    for number, count in enumerate(rows):
        moved = any(one_by_one[name][number].any() for name in one_by_one if name.startswith("gradient of fc"))
        assert moved == (count > 0)


def test_the_product_is_chosen_by_the_load(monkeypatch):
    experts, taken = stacked(gated=False, use_bias=True, adds_bias=True), []
    for name in ("_batched", "_one_by_one"):
        original = getattr(experts, name)
        monkeypatch.setattr(
            experts, name, lambda *args, name=name, original=original: taken.append(name) or original(*args)
        )
    for rows in ([30, 0, 3, 1], [5, 5, 5, 5]):
        experts(torch.zeros(sum(rows), 16, dtype=torch.float64), rows)
    assert taken == ["_one_by_one", "_batched"]
