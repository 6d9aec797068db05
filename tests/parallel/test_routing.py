"""What routing does across ranks: jitter that recompute repeats, and balance counted over data ranks."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megamoe.moe.routers import JITTER_STATE
from megamoe.training.report import load_report
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    config,
    parallel,
    samples,
    step,
    trainer_of,
    weights,
)
from tests.parity.initial import initial_weights
from tests.parity.reference import ReferenceRun, global_batch

JITTER = ("moe.input_jitter=0.1",)
SLICES = parallel(tp=2, ep=2, sp=True, zero=1)
COPIES = (*parallel(tp=2, zero=1), "parallel.expert_tensor_parallel_size=2")
GLOBAL = (*parallel(ep=2, zero=1), "moe.balance_loss_scope=global_batch", "run.global_batch_size=4")
CASES = {
    "plain": ("modern_second", SLICES),
    "jitter": ("modern_second", (*SLICES, *JITTER)),
    "jitter_recompute": ("modern_second", (*SLICES, *JITTER, "parallel.recompute=full")),
    "jitter_copies": ("modern_second", (*COPIES, *JITTER)),
    "global": ("modern_second", GLOBAL),
}


def settings_of(name: str):
    model, layout = CASES[name]
    return config(model, layout, optimizer="sgd")


def on_rank() -> dict[str, Any]:
    return {name: train(name) for name in CASES}


def train(name: str) -> dict[str, Any]:
    settings = settings_of(name)
    with trainer_of(settings) as trainer:
        state = get_cuda_rng_tracker().get_states().get(JITTER_STATE)
        first = None if state is None else state.numpy().copy()
        rows = []
        for batch in samples(settings, 2):
            row = step(trainer, batch)
            rows.append(row | {"balance_loss": load_report(trainer).balance_loss})
        return {"rows": rows, "weights": weights(trainer), "state": first}


@cache
def launch() -> list[dict[str, Any]]:
    return run_ranks(on_rank, 2, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def test_recompute_draws_the_jitter_again() -> None:
    for rank in launch():
        assert rank["jitter_recompute"]["rows"] == rank["jitter"]["rows"] != rank["plain"]["rows"]
        assert_same_arrays(rank["jitter_recompute"]["weights"], rank["jitter"]["weights"])


def test_tensor_ranks_draw_apart_on_slices_and_alike_on_copies() -> None:
    first, second = launch()
    assert first["plain"]["state"] is None
    assert not np.array_equal(first["jitter"]["state"], second["jitter"]["state"])
    np.testing.assert_array_equal(first["jitter_copies"]["state"], second["jitter_copies"]["state"])


def test_copies_stay_equal_under_jitter() -> None:
    first, second = (rank["jitter_copies"]["weights"] for rank in launch())
    routers = [name for name in first if ".router." in name]
    assert_same_arrays({name: first[name] for name in routers}, {name: second[name] for name in routers})


def test_global_scope_is_the_loss_of_one_large_micro_batch() -> None:
    """Two data ranks of one micro-batch each train as one process does on both at once."""
    settings = settings_of("global")
    plain = config("modern_second", ("run.global_batch_size=4",), optimizer="sgd")
    run = ReferenceRun(plain, initial_weights(plain))
    expected = [run.step(global_batch(torch.from_numpy(batch), 4, 1)) for batch in samples(settings, 2)]
    for rank in launch():
        for row, one in zip(rank["global"]["rows"], expected, strict=True):
            assert row["lm_loss"] == pytest.approx(one.lm_loss, rel=1e-5)
            assert row["balance_loss"] == pytest.approx(one.balance_loss, rel=1e-5)
            assert row["grad_norm"] == pytest.approx(one.grad_norm, rel=2e-5)
        router = "layers.1.router.weight"
        np.testing.assert_allclose(
            rank["global"]["weights"][router], run.weights[router].detach().numpy(), rtol=0, atol=1e-5
        )
