"""Fine-tuning under every kind of layout is that of one plain process: masked losses, a head, frozen parts."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamoe.config.schema import Config
from megamoe.data.examples import open_examples
from megamoe.data.order import Permutation
from megamoe.topology.parameters import param_table
from megamoe.training.build import Trainer
from megamoe.training.examples import validate_examples
from megamoe.training.loop import local_batch
from megamoe.training.optimizer_state import optimizer_parts
from tests.harness import run_ranks
from tests.parallel.worlds import mean_loss, trainer_of
from tests.parity.finetune_reference import FinetuneReference, by_hand, write_examples
from tests.parity.initial import initial_weights
from tests.parity.layouts import ParityLayout
from tests.parity.ranks import pieces
from tests.parity.test_training import assemble

NUM_STEPS, NUM_EXAMPLES = 4, 22
RELATIVE_LOSS, RELATIVE_NORM, ABSOLUTE_PARAMETER = 1e-5, 2e-5, 1e-5
LAUNCH_TIMEOUT_SECONDS = 250
TASKS = {
    "classify": ("finetune.objective=classification", "model.num_labels=3"),
    "complete": ("finetune.objective=language_model",),
}
FREEZABLE = {
    "routers": "router.", "experts": "experts.", "norms": "norm.", "embeddings": "embedding.",
    "attention": "attention.", "ffn": ".ffn.", "output": "output.", "dense": "",
}  # fmt: skip
# ranks, model of the grid, task, layout, frozen parts
CASES: dict[str, tuple[int, str, str, str, tuple[str, ...]]] = {
    "one": (1, "paper", "classify", "zero_stage=0", ()),
    "one-complete": (1, "modern_second", "complete", "zero_stage=1", ()),
    **{f"one-{part}": (1, "modern_second", "complete", "zero_stage=1", (part,)) for part in FREEZABLE},
    "one-probe": (1, "residual", "classify", "zero_stage=2 recompute=full", ("dense", "experts", "routers")),
    "tensor": (2, "paper", "classify", "tensor_parallel_size=2 zero_stage=1", ()),
    "tensor-sequence": (2, "modern_second", "classify", "tensor_parallel_size=2 sequence_parallel=true", ("norms",)),
    "tensor-complete": (2, "paper", "complete", "tensor_parallel_size=2 expert_tensor_parallel_size=2", ()),
    "pipeline": (2, "paper", "classify", "pipeline_parallel_size=2 zero_stage=1", ("embeddings", "attention")),
    "pipeline-complete": (2, "paper", "complete", "pipeline_parallel_size=2 zero_stage=1", ()),
    "pipeline-tied": (2, "paper", "complete", "pipeline_parallel_size=2 zero_stage=2", ("embeddings",)),
    "experts": (2, "modern_second", "classify", "expert_parallel_size=2 zero_stage=1", ("routers",)),
    "experts-complete": (2, "paper", "complete", "expert_parallel_size=2 zero_stage=1", ()),
    "data": (2, "paper", "complete", "zero_stage=1", ("experts",)),
    "data-dense": (2, "paper_dense", "classify", "zero_stage=2", ()),
    "four": (
        4, "modern_second", "classify", "tensor_parallel_size=2 pipeline_parallel_size=2 sequence_parallel=true", (),
    ),
    "four-complete": (
        4, "paper", "complete", "pipeline_parallel_size=2 expert_parallel_size=2 zero_stage=2", ("routers", "norms"),
    ),
    "four-interleaved": (
        4, "paper", "classify", "pipeline_parallel_size=2 virtual_pipeline_parallel_size=2 zero_stage=0", ("experts",),
    ),
}  # fmt: skip


def config_of(name: str, path: Path) -> Config:
    _, model, task, layout, frozen = CASES[name]
    sizes = [f"parallel.{word}" for word in layout.split()]
    return ParityLayout("", 0, model, (
        *TASKS[task], *sizes, "model.vocab_size=260", "data.tokenizer={kind: byte}",
        f"finetune.train_files=[{path}]", f"finetune.valid_files=[{path}]",
        f"finetune.freeze=[{','.join(frozen)}]", "optimizer.clip_grad=0.5", "run.global_batch_size=8",
    )).config("adamw")  # fmt: skip


def task_path(root: str, name: str) -> Path:
    return Path(root) / f"{CASES[name][2]}.jsonl"


def train(names: list[str], root: str) -> dict[str, Any]:
    found = {}
    for name in names:
        config = config_of(name, task_path(root, name))
        splits = open_examples(config)
        with trainer_of(config) as trainer:
            initial, losses, norms = pieces(trainer), [], []
            for _ in range(NUM_STEPS):
                batch = local_batch(trainer, splits.train, trainer.samples, config.run.global_batch_size)
                result = trainer.train_step(batch, config.run.global_batch_size)
                losses.append(mean_loss(trainer, result.lm_losses))
                norms.append(result.grad_norm)
            found[name] = {
                "initial": initial, "final": pieces(trainer), "losses": losses, "norms": norms,
                "valid": validate_examples(trainer, splits.valid), "held": held(trainer),
            }  # fmt: skip
    return found


def held(trainer: Trainer) -> set[str]:
    """Names of parameters that the optimizer has state for."""
    return {part.local.parameter.name for part in optimizer_parts(trainer)}


@cache
def launch(world: int) -> tuple[dict[str, list[dict]], list[dict[str, Any]]]:
    names = [name for name, case in CASES.items() if case[0] == world]
    with tempfile.TemporaryDirectory() as root:
        trees = {task: write_examples(Path(root) / f"{task}.jsonl", task, NUM_EXAMPLES) for task in TASKS}
        return trees, run_ranks(train, world, names, root, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS)


def frozen_names(config: Config) -> list[str]:
    """By the names of parameters alone; dense is all that is of no expert, no router and no head."""

    def is_in(part: str, name: str) -> bool:
        if part == "dense":
            return ".router." not in name and ".experts." not in name and name != "score.weight"
        if part == "attention":
            return ".attention." in name and "_norm." not in name
        if part == "ffn":
            return ".ffn." in name or ".shared_expert" in name
        return FREEZABLE[part] in name

    table = param_table(config.model, config.moe)
    return [p.name for p in table if any(is_in(part, p.name) for part in config.finetune.freeze)]


def numbers_of(config: Config) -> list[list[int]]:
    """The examples of each step: whole epochs, one after another, each in an order of its own."""
    orders = [Permutation(NUM_EXAMPLES, seed=config.run.seed, stream=0, epoch=epoch) for epoch in range(2)]
    numbers, size = [order(i) for order in orders for i in range(NUM_EXAMPLES)], config.run.global_batch_size
    return [numbers[step * size : (step + 1) * size] for step in range(NUM_STEPS)]


@pytest.mark.timeout(LAUNCH_TIMEOUT_SECONDS + 60)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_launch(world):
    """Pays for the launch, so that the cases below are charged with comparing only."""
    assert len(launch(world)[1]) == world


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name):
    world, _, task, _, _ = CASES[name]
    trees, ranks = launch(world)
    config = config_of(name, Path(f"{task}.jsonl"))
    frozen = frozen_names(config)
    reference = FinetuneReference(config, initial_weights(config), frozen)
    examples = [by_hand(tree, config.model.seq_length) for tree in trees[task]]
    batches = [[examples[i] for i in numbers] for numbers in numbers_of(config)]
    if task == "complete":
        counts = {sum(int(each.mask.sum()) for each in batch[:2]) for batch in batches}
        assert len(counts) > 1, "micro-batches are meant to differ in what counts"
    steps = [reference.finetune_step(batch) for batch in batches]
    loss, accuracy = reference.validate(examples)
    outcomes = [rank[name] for rank in ranks]
    for outcome in outcomes:
        np.testing.assert_allclose(outcome["valid"]["valid_loss"], loss, rtol=RELATIVE_LOSS)
        assert outcome["valid"].get("valid_accuracy", accuracy) == pytest.approx(accuracy)
        np.testing.assert_allclose(outcome["losses"], [loss for loss, _ in steps], rtol=RELATIVE_LOSS)
        np.testing.assert_allclose(outcome["norms"], [norm for _, norm in steps], rtol=RELATIVE_NORM)
    initial, final = (assemble(config, [outcome[key] for outcome in outcomes]) for key in ("initial", "final"))
    for weight, expected in reference.weights.items():
        np.testing.assert_allclose(
            final[weight], expected.detach().numpy(), rtol=0, atol=ABSOLUTE_PARAMETER, err_msg=weight
        )
        if weight in frozen:
            np.testing.assert_array_equal(final[weight], initial[weight], err_msg=weight)
        else:
            assert (final[weight] != initial[weight]).any(), weight
    assert not set(frozen) & set().union(*(outcome["held"] for outcome in outcomes))
    assert set(frozen) or not config.finetune.freeze
