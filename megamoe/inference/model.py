"""Forward passes over texts through Megatron-core's pipeline schedule, on all ranks together.

    b texts of a micro-batch   s tokens of each   n results of each   V tokens of the vocabulary   t tensor ranks

Every rank is given the same list of micro-batches. Micro-batch i is computed by the data-parallel ranks' number
i mod d, where its cache stays; what comes out is the same on all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.inference.rows import TokenRows
from megamoe.inference.schedule import forward_passes
from megamoe.model import cpu_bridge
from megamoe.model.decoding import Decoding, KeyValueCache
from megamoe.model.gpt import GPT, build_model_chunks
from megamoe.model.naming import LocalParameter, local_parameters
from megamoe.model.parallel import ParallelGroups
from megamoe.moe.balance_bias import BalanceBias
from megamoe.moe.layer import EvaluationMode
from megamoe.moe.losses import LossScale
from megamoe.moe.statistics import LoadStatistics
from megamoe.topology.parameters import param_table
from megamoe.training.groups import create_groups, destroy_groups
from megamoe.training.restore import load_model

Chooser = Callable[[int, Tensor], Tensor]  # (number of the micro-batch, logits [b, V] fp32) -> ids [b]


@dataclass
class ForwardModel:
    """This rank's part of a model that only computes."""

    config: Config
    groups: ParallelGroups
    chunk: GPT
    parameters: list[LocalParameter]
    balance_bias: BalanceBias
    device: torch.device
    decoding: Decoding
    evaluation: EvaluationMode
    statistics: LoadStatistics
    _loads: dict[int, Tensor] = field(default_factory=dict)  # by layer, fp64 [2]: choices, and those dropped

    @property
    def num_data_ranks(self) -> int:
        return self.groups.grid.data

    def computes(self, number: int) -> bool:
        """Whether micro-batch `number` of a call is computed here: the values of all others are never looked at."""
        return number % self.num_data_ranks == self.groups.coordinates.data

    def new_cache(self, num_texts: int, num_slots: int) -> KeyValueCache:
        """For a micro-batch of so many texts of up to `num_slots` tokens; it takes memory where it is used."""
        return KeyValueCache(num_texts, num_slots, self.device)

    def losses(self, rows: Sequence[TokenRows]) -> list[Tensor]:
        """Nats of each micro-batch's labels, fp32 [b, n] on the host. Micro-batches have one shape [b, s], and one n.

        Collective over all ranks.
        """
        found = self._passes(rows)
        shape = rows[0].labels.shape
        sums = torch.zeros((len(rows), *shape), dtype=torch.float32, device=self.device)
        if found is not None and self.groups.coordinates.tensor == 0:
            for number, losses in found:
                sums[number] = losses.float()
        return list(self._shared(sums).unbind(0))

    def choose(self, rows: Sequence[TokenRows], chooser: Chooser) -> list[Tensor]:
        """What `chooser` makes of the logits after each text's last token: ids int64 [b] a micro-batch, on the host.

        It is called where the micro-batch's logits are, on each tensor rank alike; the first one's answer counts, which
        may be a negative number where there is no id. Collective over all ranks.
        """
        found = self._passes([_only_last(row) for row in rows])
        ids = torch.zeros((len(rows), rows[0].tokens.shape[0]), dtype=torch.int64, device=self.device)
        for number, part in found or ():
            chosen = chooser(number, self._whole_vocabulary(part[:, 0]))
            if self.groups.coordinates.tensor == 0:
                ids[number] = chosen.to(self.device)
        return list(self._shared(ids).unbind(0))

    def fill(self, rows: Sequence[TokenRows]) -> None:
        """Only extend the caches. Collective over all ranks."""
        self._passes([TokenRows(row.tokens, None, _no_places(row), row.cache, row.num_new) for row in rows])

    def logits(self, rows: Sequence[TokenRows]) -> list[Tensor]:
        """All logits, fp32 [b, n, V] on the host of every rank: for tests and for small models. Collective."""
        found = self._passes(rows)
        num_results = rows[0].tokens.shape[1] if rows[0].kept is None else rows[0].kept.shape[1]
        shape = (len(rows), rows[0].tokens.shape[0], num_results, self.config.model.vocab_size)
        values = torch.zeros(shape, dtype=torch.float32, device=self.device)
        for number, part in found or ():
            whole = self._whole_vocabulary(part)
            if self.groups.coordinates.tensor == 0:
                values[number] = whole
        return list(self._shared(values).unbind(0))

    @contextmanager
    def capacity(self, *, drop_tokens: bool) -> Iterator[None]:
        """Inside, experts take at most what moe.eval_capacity_… (or training's capacity) says; else all tokens."""
        kept, self.evaluation.drop_tokens = self.evaluation.drop_tokens, drop_tokens
        try:
            yield
        finally:
            self.evaluation.drop_tokens = kept

    def take_loads(self) -> dict[int, tuple[float, float]]:
        """By 0-based layer: choices of experts since the last call, and how many of them were dropped.

        Counted where experts have a capacity. Collective over all ranks.
        """
        counts = torch.zeros((self.config.model.num_layers, 2), dtype=torch.float64, device=self.device)
        for layer, values in self._loads.items():
            counts[layer] = values
        self._loads.clear()
        dist.all_reduce(counts, group=self.groups.world)
        counts /= self.groups.grid.expert_tensor  # ranks that share an expert's matrices route the same tokens
        return {layer: (all_, dropped) for layer, (all_, dropped) in enumerate(counts.tolist()) if all_}

    def _count_loads(self) -> None:
        for layer, load in self.statistics.take().items():
            counts = torch.stack([load.demand.sum(), load.dropped])
            self._loads[layer] = self._loads[layer] + counts if layer in self._loads else counts

    def close(self) -> None:
        """Let go of the groups in both engines' module state."""
        destroy_groups()

    @torch.no_grad()
    def _passes(self, rows: Sequence[TokenRows]) -> list[tuple[int, Tensor]] | None:
        """(number, output) of this rank's micro-batches on the last stage, else None.

        The last ones are repeated where they do not deal out evenly, without a cache: experts of one group must be
        called alike.
        """
        if len({row.tokens.shape for row in rows}) != 1:
            raise ValueError(f"micro-batches of one call must have one shape: {[tuple(r.tokens.shape) for r in rows]}")
        size, mine = self.num_data_ranks, self.groups.coordinates.data
        numbers = range(mine, len(rows) + -len(rows) % size, size)
        own = [rows[i] if i < len(rows) else _without_cache(rows[-1]) for i in numbers]

        def after(place: int) -> None:
            if self.evaluation.drop_tokens and numbers[place] < len(rows):
                self._count_loads()
            self.statistics.take()

        found = forward_passes(self.chunk, self.groups, self.decoding, own, self.device, after)
        for row in rows:
            if row.cache is not None:
                row.cache.advance(row.tokens.shape[1] if row.num_new is None else row.num_new)
        return None if found is None else [(i, each) for i, each in zip(numbers, found, strict=True) if i < len(rows)]

    def _whole_vocabulary(self, part: Tensor) -> Tensor:
        """[..., V/t] of each tensor rank -> fp32 [..., V], without the rows that fill it up. Over the tensor group."""
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.groups.grid.tensor)]
        dist.all_gather(parts, part, group=self.groups.tensor)
        return torch.cat(parts, dim=-1)[..., : self.config.model.vocab_size].float()

    def _shared(self, values: Tensor) -> Tensor:
        """The sum over all ranks, of which one has each value and all others zeros; on the host."""
        dist.all_reduce(values, group=self.groups.world)
        return values.cpu()


def _no_places(row: TokenRows) -> Tensor:
    return torch.zeros((row.tokens.shape[0], 0), dtype=torch.int64)


def _only_last(row: TokenRows) -> TokenRows:
    count, length = row.tokens.shape
    last = torch.full((count,), length) if row.num_new is None else row.num_new
    # A text that has ended has no new token: what follows its padding is not looked at.
    return TokenRows(row.tokens, None, (last[:, None] - 1).clamp(min=0), row.cache, row.num_new)


def _without_cache(row: TokenRows) -> TokenRows:
    return TokenRows(row.tokens, row.labels, row.kept)


def build_forward_model(config: Config, checkpoint: Path, device: torch.device) -> ForwardModel:
    """Groups, model and weights of this rank, drops off. torch.distributed must be initialised; collective.

    config: made by `megamoe.inference.settings.forward_config`. Raises CheckpointError for damage, TopologyError where
    the layout does not fit.
    """
    cpu_bridge.apply()
    groups = create_groups(config.parallel)
    statistics, evaluation = LoadStatistics(), EvaluationMode(drop_tokens=False, has_losses=False)
    balance_bias = BalanceBias(config.moe.balance_bias_update_rate, device)
    decoding = Decoding(hides_padding=True)
    (chunk,) = build_model_chunks(
        config, groups, device, loss_scale=LossScale(), statistics=statistics, evaluation=evaluation,
        balance_bias=balance_bias, decoding=decoding,
    )  # fmt: skip
    chunk.to(device).eval().requires_grad_(False)
    parameters = local_parameters([chunk], param_table(config.model, config.moe), groups)
    model = ForwardModel(
        config, groups, chunk, parameters, balance_bias, device, decoding, evaluation, statistics
    )
    load_model(model, checkpoint)
    return model
