"""Every layout trains as the plain reference does: initial weights, losses, norms, and all parameters after 5 steps."""

import numpy as np
import pytest
import torch

from megamoe.config.schema import Config
from megamoe.topology.parameters import param_table
from tests.harness import run_ranks
from tests.parity.initial import initial_weights
from tests.parity.layouts import LAYOUTS, OPTIMIZERS, ParityLayout, samples
from tests.parity.ranks import Piece, RankOutcome, train_layouts
from tests.parity.reference import ReferenceRun, StepResult, global_batch

RELATIVE_LOSS = 1e-5
ABSOLUTE_PARAMETER = 1e-5
# Its square sums tens of thousands of products of rounded numbers.
RELATIVE_NORM = 2e-5
LAUNCH_TIMEOUT_SECONDS = 420

CASES = [(layout, optimizer) for layout in LAYOUTS for optimizer in OPTIMIZERS]
WORLDS = sorted({layout.world for layout in LAYOUTS})

_outcomes: dict[int, dict[tuple[str, str], list[RankOutcome]] | Exception] = {}


def outcome(layout: ParityLayout, optimizer: str) -> list[RankOutcome]:
    """Each rank's outcome. All layouts of one world size train in one launch, at the first question."""
    if layout.world not in _outcomes:
        try:
            _outcomes[layout.world] = _train_all(layout.world)
        except Exception as error:  # every case of this launch fails by it, none starts it again
            _outcomes[layout.world] = error
    found = _outcomes[layout.world]
    if isinstance(found, Exception):
        raise found
    return found[layout.name, optimizer]


def _train_all(world: int) -> dict[tuple[str, str], list[RankOutcome]]:
    cases = [(layout, optimizer) for layout, optimizer in CASES if layout.world == world]
    configs = [layout.config(optimizer) for layout, optimizer in cases]
    batches = [samples(config) for config in configs]
    by_rank = run_ranks(
        train_layouts, world, configs, batches, init=False, timeout_seconds=LAUNCH_TIMEOUT_SECONDS
    )
    by_case = zip(*by_rank, strict=True)
    return {(layout.name, optimizer): list(ranks) for (layout, optimizer), ranks in zip(cases, by_case, strict=True)}


def assemble(config: Config, by_rank: list[list[Piece]]) -> dict[str, np.ndarray]:
    """Whole tensors from the ranks' pieces. Every element must be there, and copies must agree to the bit."""
    whole = {p.name: np.full(p.shape, np.nan, np.float32) for p in param_table(config.model, config.moe)}
    for pieces in by_rank:
        for piece in pieces:
            target = whole[piece.name][piece.slices]
            seen = ~np.isnan(target)
            np.testing.assert_array_equal(target[seen], piece.values[seen], err_msg=f"copies of {piece.name} differ")
            whole[piece.name][piece.slices] = piece.values
    for name, values in whole.items():
        assert not np.isnan(values).any(), f"no rank holds all of {name}"
    return whole


def run_reference(layout: ParityLayout, config: Config) -> tuple[list[StepResult], dict[str, np.ndarray]]:
    parallel = config.parallel
    data_size = layout.world // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
    run = ReferenceRun(config, initial_weights(config))
    steps = [
        run.step(global_batch(torch.from_numpy(batch), config.run.micro_batch_size, data_size))
        for batch in samples(config)
    ]
    return steps, {name: weight.detach().numpy() for name, weight in run.weights.items()}


@pytest.mark.timeout(LAUNCH_TIMEOUT_SECONDS + 60)
@pytest.mark.parametrize("world", WORLDS)
def test_launch(world: int) -> None:
    """Pays for the launch of one world size, so that the cases below are charged with comparing only."""
    first = next(layout for layout in LAYOUTS if layout.world == world)
    assert len(outcome(first, "sgd")) == world


@pytest.mark.parametrize(("layout", "optimizer"), CASES, ids=[f"{layout.name}-{name}" for layout, name in CASES])
def test_equals_reference(layout: ParityLayout, optimizer: str) -> None:
    config = layout.config(optimizer)
    ranks = outcome(layout, optimizer)
    steps, weights = run_reference(layout, config)

    initial = assemble(config, [rank.initial for rank in ranks])
    for name, expected in initial_weights(config).items():
        np.testing.assert_array_equal(initial[name], expected.numpy(), err_msg=f"initial {name}")

    for rank in ranks:
        assert rank.applied == [True] * len(steps)
        np.testing.assert_allclose(rank.lm_losses, [s.lm_loss for s in steps], rtol=RELATIVE_LOSS)
        np.testing.assert_allclose(rank.balance_losses, [s.balance_loss for s in steps], rtol=RELATIVE_LOSS)
        np.testing.assert_allclose(rank.grad_norms, [s.grad_norm for s in steps], rtol=RELATIVE_NORM)
        _assert_same_biases(config, rank, steps)
    _assert_same_drops(config, layout, ranks[0], steps)

    final = assemble(config, [rank.final for rank in ranks])
    for name, expected in weights.items():
        np.testing.assert_allclose(final[name], expected, rtol=0, atol=ABSOLUTE_PARAMETER, err_msg=name)


def _assert_same_biases(config: Config, rank: RankOutcome, steps: list[StepResult]) -> None:
    """Step by step: a bias that answered to another load would be off by twice the rate."""
    for biases, step in zip(rank.biases, steps, strict=True):
        assert biases.keys() <= step.biases.keys()
        for layer, bias in biases.items():
            np.testing.assert_allclose(bias, step.biases[layer].numpy(), rtol=0, atol=1e-6)
    if config.moe.balance_bias_update_rate:
        assert config.parallel.pipeline_parallel_size > 1 or rank.biases[-1]


def _assert_same_drops(config: Config, layout: ParityLayout, rank: RankOutcome, steps: list[StepResult]) -> None:
    if config.moe.num_experts == 0:
        return
    num_layers = len({p.layer for p in param_table(config.model, config.moe) if p.kind == "router"})
    assignments = config.run.global_batch_size * config.model.seq_length * config.moe.top_k * num_layers
    dropped = [fraction * assignments for fraction in rank.dropped_fractions]
    np.testing.assert_allclose(dropped, [s.num_dropped for s in steps], rtol=1e-9, atol=1e-6)
    if not config.moe.dropless:
        assert max(dropped) > 0, "the case is meant to drop tokens"
