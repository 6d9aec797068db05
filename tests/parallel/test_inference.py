"""Evaluation leaves a trainer as it was; sampling gives the same tokens in every layout."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from megamoe.model.random import random_state
from megamoe.training.build import Trainer
from megamoe.training.sampling import sample_tokens
from tests.harness import run_ranks
from tests.parallel.worlds import (
    LAUNCH_TIMEOUT_SECONDS,
    assert_same_arrays,
    config,
    mean_loss,
    optimizer_state,
    parallel,
    samples,
    steps,
    trainer_of,
    weights,
)
from tests.parity.ranks import share

DROPOUT = ("model.hidden_dropout=0.2", "model.attention_dropout=0.2")
TIGHT = ("moe.capacity_factor=0.25",)  # training drops most tokens
SAMPLED = {  # ranks -> layouts that must all continue a prompt alike
    1: {"one": parallel(zero=0)},
    4: {"virtual": parallel(pp=2, vp=2, ep=2, zero=1), "pipeline": parallel(tp=2, pp=2, sp=True, zero=1)},
    8: {"all": parallel(tp=2, pp=2, ep=2, zero=1)},
}
PROMPT, NUM_TOKENS = [5, 77, 3], 18  # prompt and continuation are longer than the context of 16


def on_rank(world: int) -> dict[str, Any]:
    found = {name: sampled(layout) for name, layout in SAMPLED[world].items()}
    if world == 4:
        capacities = {"as_trained": (), "roomy": ("moe.eval_capacity_factor=4.0",)}
        found |= {name: evaluated(more) for name, more in capacities.items()}
        found["dropless"] = evaluated(("moe.dropless=true",))
    return found


def sampled(layout: tuple[str, ...]) -> list[int]:
    settings = config("paper_untied", (*layout, *DROPOUT))  # dropout must not act here
    with trainer_of(settings) as trainer:
        before = snapshot(trainer)
        tokens = sample_tokens(trainer, PROMPT, NUM_TOKENS, temperature=0.0, seed=1)
        assert_unchanged(trainer, before)
        assert sample_tokens(trainer, PROMPT, 4, temperature=1.0, seed=1) == sample_tokens(
            trainer, PROMPT, 4, temperature=1.0, seed=1
        )
        return tokens


def evaluated(more: tuple[str, ...]) -> dict[str, Any]:
    """Losses of the same held-out batch before any step, twice, and what training dropped afterwards."""
    layout = parallel(tp=2, pp=2, ep=2, zero=1)
    settings = config("paper_capacity", (*layout, *TIGHT, *DROPOUT, *more))
    batches = samples(settings, 3)
    with trainer_of(settings) as trainer:
        losses = [mean_loss(trainer, trainer.evaluate(share(trainer, batches[0]))) for _ in range(2)]
        steps(trainer, batches[1:2])
        dropped = sum(float(load.dropped) for load in trainer.statistics._loads.values())
        before = snapshot(trainer)
        trainer.evaluate(share(trainer, batches[0]))
        assert_unchanged(trainer, before)
        return {"losses": losses, "dropped": dropped, "rows": steps(trainer, batches[2:])}


def snapshot(trainer: Trainer) -> dict[str, Any]:
    return {
        "arrays": weights(trainer) | optimizer_state(trainer) | {n: t.numpy() for n, t in random_state().items()},
        "loads": dict(trainer.statistics._loads),
        "counts": (trainer.step, trainer.samples, trainer.skipped_steps),
    }


def assert_unchanged(trainer: Trainer, before: dict[str, Any]) -> None:
    now = snapshot(trainer)
    assert_same_arrays(now["arrays"], before["arrays"])
    assert now["counts"] == before["counts"]
    assert now["loads"].keys() == before["loads"].keys()
    assert all(now["loads"][layer] is load for layer, load in before["loads"].items())
    modules = [module for chunk in trainer.chunks for module in chunk.modules()]
    assert all(module.training for module in modules)
    assert all(parameter.grad is None for chunk in trainer.chunks for parameter in chunk.parameters())


@cache
def launch(world: int) -> list[dict[str, Any]]:
    return run_ranks(on_rank, world, world, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


@pytest.mark.parametrize("name", ["as_trained", "roomy", "dropless"])
def test_evaluation_leaves_everything_as_it_was(name):
    """Weights, moments, random states, statistics and train mode are compared on the ranks."""
    for rank in (rank[name] for rank in launch(4)):
        assert rank["losses"][0] == rank["losses"][1]
        assert rank["losses"] == launch(4)[0][name]["losses"]


def test_evaluation_capacity_is_used_in_evaluation_only():
    as_trained, roomy, dropless = (
        [rank[name] for rank in launch(4)] for name in ("as_trained", "roomy", "dropless")
    )
    assert roomy[0]["losses"] == pytest.approx(dropless[0]["losses"], rel=1e-6)
    assert abs(as_trained[0]["losses"][0] - dropless[0]["losses"][0]) > 1e-3
    assert sum(rank["dropped"] for rank in dropless) == 0
    assert [r["dropped"] for r in roomy] == [r["dropped"] for r in as_trained] and sum(r["dropped"] for r in roomy) > 0
    assert roomy[0]["rows"] == as_trained[0]["rows"]  # training is the same, whatever the capacity of evaluation


def test_sampled_tokens_do_not_depend_on_the_layout():
    expected = launch(1)[0]["one"]
    assert len(expected) == NUM_TOKENS and len(set(expected)) > 3 and max(expected) < 128
    for world, layouts in SAMPLED.items():
        for name in layouts:
            for rank in launch(world):
                np.testing.assert_array_equal(rank[name], expected, err_msg=name)
