"""Rows of tokens that travel to experts: how many a rank routes, sends and receives. No torch."""

from dataclasses import dataclass

from megamoe.config.schema import Config
from megamoe.plan.quantities import Load
from megamoe.topology.capacity import expert_capacity
from megamoe.topology.grid import Grid


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one micro-batch in one MoE layer: those this rank sends, those its experts receive."""

    sent: int
    received: int


def routed_rows(config: Config, grid: Grid) -> int:
    """Tokens of a micro-batch that one rank routes: its slice of the sequence; under expert tensor parallelism, all."""
    tokens = config.model.seq_length * config.run.micro_batch_size
    return tokens // grid.tensor if grid.expert_tensor == 1 else tokens


def expert_rows(config: Config, grid: Grid, num_experts: int, load: Load | None = None) -> ExpertRows:
    """Rows on the rank whose experts are the fullest, at `load` (even where None).

    With a capacity, experts are taken to be full as far as the even load fills them: fewer rows travel where it is
    below 1, and no more arrive than fit.
    """
    moe, tokens = config.moe, routed_rows(config, grid)
    sent = moe.top_k * tokens
    factor = 1.0 if load is None else load.max_over_mean
    if moe.dropless:
        return ExpertRows(sent, round(sent * factor))
    capacity = expert_capacity(tokens, num_experts, moe.top_k, moe.capacity_factor)
    sent = min(sent, num_experts * capacity)
    most = capacity * (num_experts // grid.expert) * grid.expert
    return ExpertRows(sent, min(round(sent * factor), most))
