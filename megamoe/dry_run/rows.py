"""What a rank of a fake world is told where a real one reads numbers from its device: above all, rows for experts.

Without values there is no routing, so how many rows go where is stated: every rank of an expert group sends alike, all
kept assignments of its tokens, evenly over the experts but for those of one rank, the fullest, which is the one that
is played.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.moe.host_read import Purpose
from megamoe.plan.quantities import Load
from megamoe.topology.capacity import expert_capacity
from megamoe.topology.grid import Coordinates

GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class StatedRows:
    """A `megamoe.moe.host_read.Reader` for the rank at `coordinates` under `load`; the gradient norm it states is 1."""

    config: Config
    coordinates: Coordinates
    load: Load

    def __call__(self, values: Tensor, purpose: Purpose) -> Any:
        if purpose == "gradient norm":  # its square, then sum and number of losses, and nobody wishes to stop
            return [GRADIENT_NORM, 0.0, 0.0, 0.0, 0.0]
        return self.rows(tuple(values.shape)).tolist()

    def rows(self, shape: tuple[int, ...]) -> np.ndarray:
        """int64 [3, N, L, C, m]: rows of this rank for each expert; of this node's ranks for this local number on each
        node; of each rank for this one. See `megamoe.moe.exchange`."""
        _, num_nodes, num_local, num_chunks, num_experts = shape
        sent = self.sent_by_each(num_nodes * num_local, num_chunks * num_experts).reshape(shape[1:])
        node, local = divmod(self.coordinates.expert, num_local)
        midway, received = np.empty_like(sent), np.empty_like(sent)
        midway[:] = sent[:, local][:, None]
        received[:] = sent[node, local]
        return np.stack((sent, midway, received))

    def sent_by_each(self, num_ranks: int, num_experts: int) -> np.ndarray:
        """int64 [num_ranks, num_experts]: rows that every rank of the expert group has for each expert of each rank."""
        config, parallel = self.config.moe, self.config.parallel
        tokens = self.config.run.micro_batch_size * self.config.model.seq_length
        if parallel.expert_tensor_parallel_size == 1:
            tokens //= parallel.tensor_parallel_size
        assignments, all_experts = tokens * config.top_k, num_ranks * num_experts
        capacity = assignments
        if not config.dropless:
            capacity = expert_capacity(tokens, all_experts, config.top_k, config.capacity_factor)
        own = assignments
        if num_ranks > 1:
            own = min(assignments, round(assignments / num_ranks * self.load.max_over_mean))
        rows = np.empty((num_ranks, num_experts), dtype=np.int64)
        others = _evenly(assignments - own, (num_ranks - 1) * num_experts).reshape(num_ranks - 1, num_experts)
        here = self.coordinates.expert
        rows[:here], rows[here], rows[here + 1 :] = others[:here], _evenly(own, num_experts), others[here:]
        return np.minimum(rows, capacity)


@dataclass
class ReplayedRows:
    """A `megamoe.moe.host_read.Reader` that repeats what a real rank read, in order."""

    read: list[tuple[Purpose, Any]]
    _next: int = 0

    def __call__(self, values: Tensor, purpose: Literal["rows", "gradient norm"]) -> Any:
        expected, numbers = self.read[self._next]
        if expected != purpose or np.shape(numbers) != tuple(values.shape):
            raise ValueError(
                f"the real rank read {expected} of shape {np.shape(numbers)} where {purpose} of shape "
                f"{tuple(values.shape)} is asked for"
            )
        self._next += 1
        return numbers


def _evenly(total: int, num_parts: int) -> np.ndarray:
    """[num_parts] whole numbers that sum to `total` and differ by 1 at most, the larger ones dealt out over all."""
    ends = np.arange(num_parts + 1, dtype=np.int64) * total // max(1, num_parts)
    return np.diff(ends)
