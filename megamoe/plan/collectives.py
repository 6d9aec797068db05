"""Every collective that a rank calls in one optimizer step, as Megatron-core, DeepSpeed and our layers do. No torch.

Calls on groups of one rank are left out: nothing travels. What a run adds at intervals (reports, checkpoints, checks
of replicas) is no part of a step; `report_collectives` has the reports.

    n = s * b * h elements of a micro-batch's activations   t tensor parallel size
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache

from megamoe.config.schema import Config
from megamoe.plan.gradient_collectives import update_collectives, zero_2_collectives
from megamoe.plan.quantities import Collective, Family, Kind, Phase
from megamoe.plan.roles import Chunk, Role, role_of
from megamoe.plan.states import ELEMENT_BYTES, boundary_bytes, num_micro_batches
from megamoe.topology.grid import Coordinates, Grid
from megamoe.topology.nodes import exchange_levels
from megamoe.topology.parameters import experts_by_layer

# (0-based layer, micro-batch, chunk of experts, hop) -> rows this rank sends towards experts, and rows it receives. Hop
# 0 is flat all-to-all or the one inside a node, hop 1 the one across nodes.
Rows = Callable[[int, int, int, int], tuple[int, int]]


def step_collectives(
    config: Config,
    world_size: int,
    pipeline_rank: int,
    *,
    rows_sent: Rows | int,
    data_rank: int = 0,
    expert_data_rank: int = 0,
    ranks_per_node: int | None = None,
) -> tuple[Collective, ...]:
    """The collectives of one full-sized step on a rank of a pipeline stage, equal ones counted together.

    `rows_sent` are rows (a token's hidden state for one expert) that the rank sends in one MoE layer and micro-batch;
    of a number, as many are taken to arrive, and to be spread evenly over chunks. What is summed over a tensor group
    depends on which part of the gradients the rank owns: on `data_rank` and `expert_data_rank`. `ranks_per_node` counts
    where parallel.ranks_per_node is not set. The step is taken to be applied. Raises TopologyError or ConfigError where
    the layout does not fit the ranks.
    """
    grid = Grid.from_config(config.parallel, world_size)
    role = role_of(config, world_size, pipeline_rank)
    at = Coordinates(0, 0, data_rank, pipeline_rank, 0, expert_data_rank, 0)
    layout = _Layout(config, grid, _hops(config, grid, ranks_per_node), num_micro_batches(config, world_size))
    totals: Counter[tuple[Kind, Family, str, Phase, int]] = Counter()
    for found in layout.all_calls(role, at, rows_sent):
        totals[found.kind, found.group, found.purpose, found.phase, found.num_bytes] += found.count
    return tuple(Collective(*key, count) for key, count in totals.items() if _size(grid, layout, key[1]) > 1)


def report_collectives(config: Config, world_size: int) -> tuple[Collective, ...]:
    """What a report adds, every monitor.log_interval_steps steps (megamoe.training.report)."""
    if world_size == 1:
        return ()
    experts = experts_by_layer(config.model, config.moe)
    found = [
        Collective("all_reduce", "world", "report of losses", "update", 16, 1),
        Collective("all_reduce", "world", "report of memory", "update", 8, 1),
    ]
    if experts:
        row = max(experts.values()) + config.moe.top_k + 3 + 1
        found.append(Collective("all_reduce", "world", "report of loads", "update", 8 * len(experts) * row, 1))
    return tuple(found)


def _hops(config: Config, grid: Grid, ranks_per_node: int | None) -> tuple[tuple[Family, int], ...]:
    """(group, its size) of each hop of an all-to-all."""
    ranks_per_node = config.parallel.ranks_per_node or ranks_per_node
    if config.parallel.all_to_all == "hierarchical" and grid.expert > 1 and ranks_per_node is not None:
        sizes = _level_sizes(grid, ranks_per_node)
        if sizes is not None:
            return ("expert_local", sizes[0]), ("expert_across", sizes[1])
    return (("expert", grid.expert),)


@lru_cache(maxsize=1024)  # a search asks for the same few again and again
def _level_sizes(grid: Grid, ranks_per_node: int) -> tuple[int, int] | None:
    levels = exchange_levels(grid.expert_groups(), ranks_per_node)
    return None if levels is None else (len(levels.local[0]), len(levels.across[0]))


def _size(grid: Grid, layout: "_Layout", family: Family) -> int:
    hops = dict(layout.hops)
    sizes = {
        "world": grid.world, "tensor": grid.tensor, "data": grid.data, "pipeline": grid.pipeline,
        "expert_data": grid.expert_data, "tied_embedding": 2 * grid.data if grid.pipeline > 1 else 1,
    }  # fmt: skip
    return hops[family] if family in hops else sizes[family]


class _Layout:
    """The sizes that calls depend on."""

    def __init__(
        self, config: Config, grid: Grid, hops: tuple[tuple[Family, int], ...], num_micro_batches: int
    ) -> None:
        self.config, self.grid, self.hops, self.num_micro_batches = config, grid, hops, num_micro_batches
        self.element = ELEMENT_BYTES[config.run.precision]
        self.tokens = config.model.seq_length * config.run.micro_batch_size
        self.whole = self.tokens * config.model.hidden_size * self.element  # n
        self.slice = self.whole // grid.tensor  # n / t
        self.is_sequence_parallel = config.parallel.sequence_parallel
        self.recomputes = config.parallel.recompute == "full"

    def all_calls(self, role: Role, at: Coordinates, rows_sent: Rows | int) -> Iterator[Collective]:
        for chunk in role.chunks:
            yield from self._pipeline(chunk)
            if chunk.has_embedding:
                yield from self._embedding()
            for layer, num_experts in zip(chunk.layers, chunk.num_experts, strict=True):
                yield from self._attention()
                if num_experts == 0:
                    yield from self._two_linears("FFN")
                else:
                    yield from self._moe(num_experts)
                    yield from self._exchange(layer, num_experts, rows_sent)
            if chunk.has_head:
                yield from self._head()
        if self.config.parallel.zero_stage == 2:
            yield from zero_2_collectives(self.config, self.grid, role, self.num_micro_batches)
        yield from update_collectives(self.config, self.grid, role, at)

    def _call(
        self, kind: Kind, purpose: str, phase: Phase, num_bytes: int, *, group: Family = "tensor", count: int = 1
    ) -> Collective:
        """A call made once (or `count` times) a micro-batch."""
        return Collective(kind, group, purpose, phase, num_bytes, count * self.num_micro_batches)

    def _layer_forward(
        self, kind: Kind, purpose: str, num_bytes: int, group: Family = "tensor"
    ) -> Iterator[Collective]:
        """A call in a layer's forward pass, which full recompute runs twice."""
        yield self._call(kind, purpose, "forward", num_bytes, group=group)
        if self.recomputes:
            yield self._call(kind, purpose, "recompute", num_bytes, group=group)

    def _pipeline(self, chunk: Chunk) -> Iterator[Collective]:
        """Activations from the chunk before and to the next, gradients the other way."""
        size = boundary_bytes(self.config)
        if not chunk.has_embedding:
            yield self._call("receive", "activations", "forward", size, group="pipeline")
            yield self._call("send", "gradients of activations", "backward", size, group="pipeline")
        if not chunk.has_head:
            yield self._call("send", "activations", "forward", size, group="pipeline")
            yield self._call("receive", "gradients of activations", "backward", size, group="pipeline")

    def _embedding(self) -> Iterator[Collective]:
        if self.is_sequence_parallel:
            yield self._call("reduce_scatter", "embedding", "forward", self.whole)
            yield self._call("all_gather", "embedding", "backward", self.slice)
        else:
            yield self._call("all_reduce", "embedding", "forward", self.whole)

    def _column_cut(self, purpose: str, *, in_layer: bool = True) -> Iterator[Collective]:
        """A product whose outputs are cut over the tensor group (Megatron-core's ColumnParallelLinear)."""
        if not self.is_sequence_parallel:
            yield self._call("all_reduce", purpose, "backward", self.whole)
            return
        if in_layer:
            yield from self._layer_forward("all_gather", purpose, self.slice)
        else:
            yield self._call("all_gather", purpose, "forward", self.slice)
        yield self._call("all_gather", purpose, "backward", self.slice)  # the input again, for the weight's gradient
        yield self._call("reduce_scatter", purpose, "backward", self.whole)

    def _row_cut(self, purpose: str) -> Iterator[Collective]:
        """A product whose inputs are cut over the tensor group (RowParallelLinear)."""
        if self.is_sequence_parallel:
            yield from self._layer_forward("reduce_scatter", purpose, self.whole)
            yield self._call("all_gather", purpose, "backward", self.slice)
        else:
            yield from self._layer_forward("all_reduce", purpose, self.whole)

    def _two_linears(self, purpose: str) -> Iterator[Collective]:
        yield from self._column_cut(purpose)
        yield from self._row_cut(purpose)

    def _attention(self) -> Iterator[Collective]:
        yield from self._two_linears("attention")
        if self.config.model.qk_norm == "full":
            for _ in ("queries", "keys"):  # megamoe.model.norms.FullNorm: sums of squares in fp32
                yield from self._layer_forward("all_reduce", "norm of queries and keys", self.tokens * 4)
                yield self._call("all_reduce", "norm of queries and keys", "backward", self.tokens * 4)

    def _moe(self, num_experts: int) -> Iterator[Collective]:
        """What tensor ranks tell each other around the experts, the shared expert, and shares of choices."""
        moe = self.config.moe
        routes_slices = self.grid.expert_tensor == 1
        if not routes_slices:
            if self.is_sequence_parallel:
                yield from self._layer_forward("all_gather", "experts' input", self.slice)
                yield self._call("reduce_scatter", "experts' input", "backward", self.whole)
            else:
                yield self._call("all_reduce", "experts' input", "backward", self.whole)
            yield from self._row_cut("experts' output")
        elif not self.is_sequence_parallel:
            yield self._call("all_gather", "experts' input", "backward", self.slice)
            yield from self._layer_forward("all_gather", "experts' output", self.slice)
        if moe.shared_expert_ffn_hidden_size is not None:
            yield from self._two_linears("shared expert")
        num_sets = self.config.run.micro_batch_size if moe.balance_loss_scope == "sequence" else 1
        shares = 4 * num_experts * num_sets
        if routes_slices:
            yield from self._layer_forward("all_reduce", "shares of choices", shares)
        if moe.balance_loss_scope == "global_batch":
            yield from self._layer_forward("all_reduce", "shares of choices", shares, "data")

    def _exchange(self, layer: int, num_experts: int, rows_sent: Rows | int) -> Iterator[Collective]:
        """Counts of rows, then rows to the experts and back, their gradients the other way round."""
        for group, _ in self.hops:
            yield from self._layer_forward("all_to_all", "counts of rows", 8 * num_experts, group)
        num_chunks = self.config.parallel.all_to_all_chunks
        row = self.config.model.hidden_size * self.element
        passes: tuple[Phase, ...] = ("forward", "recompute") if self.recomputes else ("forward",)
        for hop, (group, _) in enumerate(self.hops):
            for chunk in range(num_chunks):
                for sent, received, count in self._rows(layer, chunk, hop, rows_sent):
                    for phase in (*passes, "backward"):
                        # Backward, combine sends gradients of what it brought home: as many rows as dispatch sent.
                        away, home = ("combine", "dispatch") if phase == "backward" else ("dispatch", "combine")
                        yield Collective("all_to_all", group, away, phase, sent * row, count)
                        yield Collective("all_to_all", group, home, phase, received * row, count)

    def _rows(self, layer: int, chunk: int, hop: int, rows_sent: Rows | int) -> Iterator[tuple[int, int, int]]:
        """(sent, received, number of micro-batches with these)."""
        if callable(rows_sent):
            for micro_batch in range(self.num_micro_batches):
                yield (*rows_sent(layer, micro_batch, chunk, hop), 1)
            return
        num_chunks = self.config.parallel.all_to_all_chunks
        rows = (rows_sent * (chunk + 1)) // num_chunks - rows_sent * chunk // num_chunks
        yield rows, rows, self.num_micro_batches

    def _head(self) -> Iterator[Collective]:
        if self.config.model.num_labels:  # whole on each tensor rank: whole sequences are all that it needs
            if self.is_sequence_parallel:
                yield self._call("all_gather", "classifier", "forward", self.slice)
            return
        yield from self._column_cut("output", in_layer=False)
        # Vocabulary-parallel cross entropy: the largest logit, the sum of exponentials, the label's logit; fp32.
        yield self._call("all_reduce", "loss", "forward", self.tokens * 4, count=3)
