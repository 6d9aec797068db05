"""The parity grid covers what it says it covers, and its models are sound enough to be compared to 1e-5."""

from itertools import combinations, product

import pytest
import torch

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from tests.parity.initial import initial_weights
from tests.parity.layouts import LAYOUTS, MODELS, OPTIMIZERS, ParityLayout, launches, samples
from tests.parity.reference import ReferenceRun, StepResult, global_batch

FACTORS = {
    "tensor": (1, 2),
    "pipeline": (1, 2, 4),
    "virtual": (1, 2),
    "expert": (1, 2, 4),
    "expert_tensor": (1, 2),
    "data": (1, 2, 4),
    "zero": (0, 1, 2),
    "sequence_parallel": (False, True),
    "recompute": ("none", "selective", "full"),
    "placement": ("second", "all", "late", "dense"),
    "tied": (True, False),
    "drops": (False, True),
    "clip": (False, True),
    "scaling": ("mean", "sqrt_world_size"),
    "family": ("paper", "modern"),
}


def levels(layout: ParityLayout) -> dict[str, object]:
    """The level of every factor in `layout`."""
    config = layout.config("sgd")
    parallel, moe = config.parallel, config.moe
    pattern = moe.layer_pattern
    placement = "late" if isinstance(pattern, tuple) else {1: "all", 2: "second"}[pattern]
    return {
        "tensor": parallel.tensor_parallel_size,
        "pipeline": parallel.pipeline_parallel_size,
        "virtual": parallel.virtual_pipeline_parallel_size,
        "expert": parallel.expert_parallel_size,
        "expert_tensor": parallel.expert_tensor_parallel_size,
        "data": layout.world // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size),
        "zero": parallel.zero_stage,
        "sequence_parallel": parallel.sequence_parallel,
        "recompute": parallel.recompute,
        "placement": placement if moe.num_experts else "dense",
        "tied": config.model.tie_embeddings,
        "drops": moe.num_experts > 0 and not moe.dropless,
        "clip": config.optimizer.clip_grad > 0,
        "scaling": config.optimizer.expert_grad_scaling,
        "family": "modern" if config.model.normalization == "rmsnorm" else "paper",
    }


def possible(fixed: dict[str, object]) -> bool:
    """Whether some layout of up to 8 ranks has the levels `fixed`, and the pair means something."""
    tensor = fixed.get("tensor", 2 if fixed.get("expert_tensor") == 2 or fixed.get("sequence_parallel") else 1)
    pipeline = fixed.get("pipeline", 2 if fixed.get("virtual") == 2 else 1)
    expert, expert_tensor = fixed.get("expert", 1), fixed.get("expert_tensor", 1)
    if (fixed.get("expert_tensor") == 2 and tensor == 1) or (fixed.get("sequence_parallel") and tensor == 1):
        return False
    if fixed.get("virtual") == 2 and pipeline == 1:
        return False
    if fixed.get("placement") == "dense" and (
        expert > 1 or expert_tensor > 1 or fixed.get("drops") or fixed.get("scaling") == "sqrt_world_size"
    ):
        return False
    if fixed.get("scaling") == "sqrt_world_size" and expert == 1 and "expert" in fixed:
        return False  # a factor of 1
    if fixed.get("pipeline") == 1 and fixed.get("placement") == "late":
        return False  # its point is the stage without experts
    for data in [fixed["data"]] if "data" in fixed else [1, 2, 4, 8]:
        for tp in [tensor] if "tensor" in fixed or tensor == 2 else [1, 2]:
            fits = tp * pipeline * data <= 8 and (tp * data) % (expert * expert_tensor) == 0
            if fits and (expert == 1 or tp * data > 1):
                return True
    return False


def missing_pairs() -> list[tuple[tuple[str, object], tuple[str, object]]]:
    rows = [levels(layout) for layout in LAYOUTS]
    missing = []
    for (a, a_levels), (b, b_levels) in combinations(FACTORS.items(), 2):
        for x, y in product(a_levels, b_levels):
            if possible({a: x, b: y}) and not any(row[a] == x and row[b] == y for row in rows):
                missing.append(((a, x), (b, y)))
    return missing


def test_every_possible_pair_of_levels_occurs() -> None:
    assert missing_pairs() == []


def test_names_are_unique_and_launches_hold_every_layout_once() -> None:
    names = [layout.name for layout in LAYOUTS]
    launched = [layout for models in launches().values() for rows in models.values() for layout in rows]
    assert len(set(names)) == len(names) >= 28
    assert sorted(layout.name for layout in launched) == sorted(names)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_is_a_valid_configuration(optimizer: str) -> None:
    for layout in LAYOUTS:
        validate(layout.config(optimizer), layout.world)


def test_every_model_is_used() -> None:
    assert {layout.model for layout in LAYOUTS} == set(MODELS)


def train(config: Config, world: int, *, disturbed: bool) -> tuple[ReferenceRun, list[StepResult]]:
    """The reference's steps; `disturbed` moves every start weight by a rounding error and turns the sums around."""
    weights = initial_weights(config)
    if disturbed:
        generator = torch.Generator().manual_seed(0)
        weights = {n: w * (1 + 1e-7 * torch.randn(w.shape, generator=generator)) for n, w in weights.items()}
    run, results = ReferenceRun(config, weights), []
    data = world // (config.parallel.tensor_parallel_size * config.parallel.pipeline_parallel_size)
    for step_samples in samples(config):
        batch = global_batch(torch.from_numpy(step_samples), config.run.micro_batch_size, data)
        results.append(run.step([rank[::-1] for rank in batch[::-1]] if disturbed else batch))
    return run, results


@pytest.mark.parametrize("model", MODELS)
def test_rounding_stays_far_below_the_tolerance_and_updates_far_above(model: str) -> None:
    """Else 1e-5 would either fail by luck (a token near two experts) or miss a tensor that hardly moves."""
    layout = next(layout for layout in reversed(LAYOUTS) if layout.model == model)
    config = layout.config("sgd")
    run, results = train(config, layout.world, disturbed=False)
    other, other_results = train(config, layout.world, disturbed=True)
    for a, b in zip(results, other_results, strict=True):
        assert a.num_dropped == b.num_dropped and (a.num_dropped > 0) == ("capacity" in model)
        assert a.lm_loss == pytest.approx(b.lm_loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
        assert config.optimizer.clip_grad < a.grad_norm  # where clipping is on, it acts
    for name, start in initial_weights(config).items():
        torch.testing.assert_close(run.weights[name], other.weights[name], atol=3e-6, rtol=0, msg=name)
        assert (run.weights[name] - start).abs().max() > 3e-4, name
