"""How many micro-batches a pipeline rank holds at once: the schedule tells, run with chunks that do nothing."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megamoe.config.loading import override_config
from megamoe.config.schema import Config
from megamoe.data.batches import MicroBatch
from megamoe.dry_run.build import META, without_memory
from megamoe.dry_run.fake_world import playing
from megamoe.model.transformer_config import transformer_config
from megamoe.training.groups import create_groups, destroy_groups
from megamoe.training.step import Batch, Schedule


class _EmptyChunk(nn.Module):
    """A chunk of the model as the schedules see it, with one multiplication inside."""

    model_type = None

    def __init__(
        self, core_config: Any, number: int, flights: "_Flights", *, pre_process: bool, post_process: bool
    ) -> None:
        super().__init__()
        self.config, self.pre_process, self.post_process = core_config, pre_process, post_process
        self.weight = nn.Parameter(torch.ones((), dtype=core_config.params_dtype, device=META))
        self._number, self._flights = number, flights
        self._input: Tensor | None = None

    def set_input_tensor(self, tensors: Sequence[Tensor | None] | Tensor | None) -> None:
        self._input = tensors[0] if isinstance(tensors, list | tuple) else tensors

    def forward(self, tokens: Tensor | None, *_: Any, labels: Tensor | None) -> Tensor:
        if self.pre_process:
            hidden = tokens.t().unsqueeze(-1) * self.weight.expand(self.config.hidden_size)
        else:
            hidden = self._input * self.weight
        output = hidden.sum(dim=-1).t() if self.post_process else hidden
        self._flights.begin(self._number)
        output.register_hook(lambda _: self._flights.end(self._number))
        return output


class _Flights:
    """How many forward passes of each chunk wait for their backward pass: now, and after each forward pass so far."""

    def __init__(self, num_chunks: int) -> None:
        self._now = [0] * num_chunks
        self.seen: list[tuple[int, ...]] = []

    def begin(self, chunk: int) -> None:
        self._now[chunk] += 1
        self.seen.append(tuple(self._now))

    def end(self, chunk: int) -> None:
        self._now[chunk] -= 1


def in_flight_over_a_step(config: Config, pipeline_rank: int, num_micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """After each forward pass on `pipeline_rank`, by chunk of the model: those whose backward pass has not begun.

    The world that is played has the pipeline alone: no schedule looks at other ranks.
    """
    parallel, virtual = config.parallel, config.parallel.virtual_pipeline_parallel_size
    alone = override_config(
        config,
        [
            *(f"parallel.{name}_parallel_size=1" for name in ("tensor", "expert", "expert_tensor")),
            "parallel.sequence_parallel=false",
            "parallel.all_to_all=flat",
            "parallel.all_to_all_chunks=1",
        ],
        "a dry run",
    )
    stages = parallel.pipeline_parallel_size
    with playing(pipeline_rank, stages), without_memory():
        groups = create_groups(alone.parallel)
        core_config = transformer_config(alone)
        flights = _Flights(virtual)
        chunks = [
            _EmptyChunk(
                core_config,
                chunk,
                flights,
                pre_process=pipeline_rank == 0 and chunk == 0,
                post_process=pipeline_rank == stages - 1 and chunk == virtual - 1,
            )
            for chunk in range(virtual)
        ]
        schedule = Schedule(chunks, groups, alone.model.seq_length, alone.run.micro_batch_size, META)
        ids = np.zeros((alone.run.micro_batch_size, alone.model.seq_length), dtype=np.int64)
        batch = Batch(iter([MicroBatch(ids, ids)] * num_micro_batches * virtual), num_micro_batches)
        schedule.losses(batch, engine=SimpleNamespace(announce_backward=lambda _: None))
        destroy_groups()
    return tuple(flights.seen)
