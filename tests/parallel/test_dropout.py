"""Dropout: who draws alike, who draws apart, and that recomputed layers draw the same again."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from megamoe.model.random import random_state
from megamoe.topology.parameters import param_table
from megamoe.training.build import Trainer
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    column,
    config,
    parallel,
    samples,
    steps,
    trainer_of,
    weights,
)

NUM_STEPS = 3
DROPOUT = ("model.hidden_dropout=0.3", "model.attention_dropout=0.3")
LAYOUTS = {
    "tensor": parallel(tp=2, zero=1),
    "sequence": parallel(tp=2, ep=2, sp=True, zero=2),
    "pipeline": parallel(pp=2, zero=2),
    "data": parallel(ep=2, zero=0),
}
RECOMPUTE = ("none", "selective", "full")


def on_rank() -> dict[tuple[str, str], Any]:
    return {(name, recompute): train(name, recompute) for name in LAYOUTS for recompute in RECOMPUTE}


def train(name: str, recompute: str) -> dict[str, Any]:
    settings = config("paper", (*LAYOUTS[name], *DROPOUT, *parallel(recompute=recompute)))
    with trainer_of(settings) as trainer:
        found: dict[str, Any] = {"states": {n: state.numpy().tobytes() for n, state in random_state().items()}}
        found["rows"] = steps(trainer, samples(settings, NUM_STEPS))
        found["weights"] = weights(trainer)
        found["default_after"] = random_state()["default"].numpy().tobytes()
        found["masks"] = masks(trainer)
        return found


@torch.no_grad()
def masks(trainer: Trainer) -> dict[str, np.ndarray]:
    """What attention dropout, and dropout after a layer, make of inputs that are alike on all ranks."""
    layer = trainer.chunks[0].decoder.layers[0]
    tensor, heads, head_dim = trainer.groups.grid.tensor, 4, 8
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(16, 2, heads // tensor, head_dim, generator=generator) for _ in range(3))
    torch.manual_seed(5)
    attention = layer.self_attention.core_attention(q, k, v)
    return {"attention": attention.numpy().copy(), "default": random_state()["default"].numpy().copy()}


@cache
def launch() -> list[dict[tuple[str, str], Any]]:
    return run_ranks(on_rank, 2, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_recompute_draws_the_same_again(name):
    for rank in launch():
        expected = rank[name, "none"]
        for recompute in RECOMPUTE[1:]:
            actual = rank[name, recompute]
            assert actual["rows"] == expected["rows"]
            assert_same_arrays(actual["weights"], expected["weights"])
            assert actual["default_after"] == expected["default_after"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_dropout_drops(name):
    """Layouts agree without dropout, so with it they must differ, unless they draw the same numbers."""
    losses = {other: column(launch()[0][other, "none"]["rows"], "lm_loss") for other in LAYOUTS}
    assert all(np.isfinite(losses[name]))
    assert all(losses[other] != losses[name] for other in LAYOUTS if other != name)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["tensor", "sequence"])
def test_tensor_ranks_keep_equal_copies(name, recompute):
    first, second = (rank[name, recompute]["weights"] for rank in launch())
    settings = config("paper", LAYOUTS[name])
    table = param_table(settings.model, settings.moe)
    uncut = [p.name for p in table if p.tensor_dim is None and p.kind != "expert"]
    assert sum(".router." in p for p in uncut) == 2 and sum("norm" in p for p in uncut) == 18
    assert_same_arrays({n: second[n] for n in uncut}, {n: first[n] for n in uncut})


@pytest.mark.parametrize("name", ["tensor", "sequence"])
def test_tensor_ranks_share_one_generator_and_have_one_of_their_own(name):
    first, second = (rank[name, "none"] for rank in launch())
    own = "tracker.model-parallel-rng"
    assert first["states"]["default"] == second["states"]["default"]
    assert first["states"][own] != second["states"][own]
    assert first["default_after"] == second["default_after"]


@pytest.mark.parametrize("name", ["pipeline", "data"])
def test_stages_and_data_ranks_draw_apart(name):
    first, second = (rank[name, "none"]["states"] for rank in launch())
    assert first["default"] != second["default"]


def test_heads_on_other_tensor_ranks_have_other_attention_masks():
    first, second = (rank["tensor", "none"]["masks"] for rank in launch())
    assert (first["attention"] != second["attention"]).mean() > 0.5
    np.testing.assert_array_equal(first["default"], second["default"])  # and the shared generator stays shared
