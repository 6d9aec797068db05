"""Seconds of an optimizer step: what every pipeline stage computes and sends, the schedule's bubble, the update.

    p stages   v chunks on each   m micro-batches   t_i seconds of stage i for one micro-batch, forward and backward

A 1F1B schedule takes sum(t_i) / v + (m - 1 / v) max(t_i): the first micro-batch passes all stages, the others follow at
the pace of the slowest (Narayanan et al. 2021, section 2.2; never too little where stages are unequal). What a stage
sends counts into its t_i, except for what is stated to run beside computation (`Traits`; of ours, all-to-all in
chunks): of that the cluster's `overlap` is hidden, at most as long as the computation beside it lasts.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

from megamoe.config.schema import Config
from megamoe.errors import ConfigError
from megamoe.plan.cluster import Cluster
from megamoe.plan.collectives import step_collectives
from megamoe.plan.compute import Compute, PassSeconds
from megamoe.plan.compute import pass_seconds as seconds_of_passes
from megamoe.plan.network import Network, Placement
from megamoe.plan.quantities import Collective, Family, Load
from megamoe.plan.roles import Role, roles
from megamoe.plan.states import ELEMENT_BYTES, num_micro_batches
from megamoe.topology.flops import hardware_flops_per_token, model_flops_per_token
from megamoe.topology.grid import Grid

CollectivesOf = Callable[[int], Sequence[Collective]]  # pipeline rank -> its collectives of one step
UPDATE_BYTES = 34  # moved for each element of a rank's partition: gradient twice, master and moments read and written,
# the weight written


@dataclass(frozen=True)
class Traits:
    """How a training program is made, where that changes its time. The default is megamoe's own engine."""

    fused_attention: bool = True
    fused_elementwise: bool = False  # biases, dropouts, activations and residual sums in few kernels
    one_hot_dispatch: bool = False  # tokens go to experts by products with [S, E, C] masks
    dispatched_slices: bool = False  # where experts are cut by tensor ranks: each sends the rows of its slice of the
    # sequence, and what arrives is gathered (Megatron-core); else each sends the rows of all tokens
    deduplicated_dispatch: bool = False  # a token travels once to each node, however many of its experts are there
    overlapped_all_to_all: bool = False  # beside the computation of another micro-batch
    overlapped_tensor_parallel: bool = False  # beside the products around it
    overlapped_gradient_reduce: bool = False  # and gathering of weights, beside the last backward and first forward
    fully_sharded: bool = False  # weights gathered for each pass, gradients reduced after each backward pass
    prefetched_shards: bool = False  # on streams of their own: hidden as far as computation is long enough
    reduced_gradient_bytes: int = 4  # of one element as fully sharded gradients are reduced


@dataclass(frozen=True)
class StepTime:
    """One optimizer step. `by_kind` adds up to `seconds`; of a step's stages it shows the slowest."""

    seconds: float
    by_kind: Mapping[str, float]  # forward, backward, recompute, bubble, update; "send: …" by purpose
    hidden_seconds: float  # of communication beside computation, on the slowest stage
    slowest_stage: int
    tokens_per_second_per_gpu: float
    model_flops_utilisation: float  # of the peak rate; recompute is no work of the model
    hardware_flops_utilisation: float  # recompute counted
    tokens: int


@dataclass
class _Stage:
    """Seconds of one stage over a whole step."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0
    update: float = 0.0
    sends: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # exposed, in the schedule
    update_sends: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # exposed, after it
    hidden: float = 0.0

    @property
    def scheduled(self) -> float:
        return self.forward + self.backward + self.recompute + sum(self.sends.values())

    @property
    def after(self) -> float:
        return self.update + sum(self.update_sends.values())


class StepTimer:
    """The step of a configuration on `world_size` GPUs of a cluster; `collectives` gives what each stage sends, None
    stands for what our engine sends. Raises ConfigError or TopologyError where the sizes do not go together."""

    def __init__(
        self, config: Config, cluster: Cluster, world_size: int, collectives: CollectivesOf | None = None, *,
        traits: Traits | None = None, load: Load | None = None,
    ) -> None:  # fmt: skip
        self.config, self.cluster, self.world_size = config, cluster, world_size
        self.traits, self._collectives = traits or Traits(), collectives or self._own_collectives
        self.grid = Grid.from_config(config.parallel, world_size)
        self.network = Network(cluster, config.parallel, world_size)
        self.compute = Compute(
            config, self.grid, load or Load(), fused_attention=self.traits.fused_attention,
            one_hot_dispatch=self.traits.one_hot_dispatch, fused_elementwise=self.traits.fused_elementwise,
            routed_slices=self.traits.dispatched_slices,
        )  # fmt: skip
        self.num_micro_batches = num_micro_batches(config, world_size)
        if self.num_micro_batches == 0:
            run, least = config.run, config.run.micro_batch_size * self.grid.data
            raise ConfigError(
                f"run.global_batch_size {run.global_batch_size} gives less than one micro-batch to each of "
                f"{self.grid.data} data-parallel ranks: use a multiple of {least}"
            )
        self._passes: dict[int, PassSeconds] = {}
        self._held: dict[int, tuple[int, int]] = {}
        self._messages: dict[int, list[Collective]] = {}

    def on(self, cluster: Cluster) -> "StepTimer":
        """The same step on other machines, or with other constants; what only the layout decides is kept."""
        _ = self._roles, self._flops_per_token  # found once, for every copy
        other = copy(self)
        other.cluster, other._passes, other.network = cluster, {}, self.network.on(cluster)
        return other

    @cached_property
    def _flops_per_token(self) -> tuple[float, float]:
        """Of the model, and with recompute."""
        return (model_flops_per_token(self.config, attention="causal"),
                hardware_flops_per_token(self.config, attention="causal"))  # fmt: skip

    def time(self) -> StepTime:
        """Raises ConfigError or TopologyError where configuration, cluster and number of GPUs do not go together."""
        by_rank = {rank: stage for role, stage in ((r, self._stage(r)) for r in self._roles)
                   for rank in role.pipeline_ranks}  # fmt: skip
        stages = [by_rank[rank] for rank in range(self.grid.pipeline)]
        slowest = max(range(len(stages)), key=lambda index: stages[index].scheduled)
        scheduled = _schedule_seconds(
            [stage.scheduled / self.num_micro_batches for stage in stages],
            self.num_micro_batches,
            self.config.parallel.virtual_pipeline_parallel_size,
        )
        last = max(stages, key=lambda stage: stage.after)
        return self._result(stages[slowest], last, scheduled, slowest)

    def _result(self, stage: _Stage, last: _Stage, scheduled: float, slowest: int) -> StepTime:
        kinds = {"forward": stage.forward, "backward": stage.backward, "recompute": stage.recompute}
        kinds["bubble"] = scheduled - stage.scheduled
        kinds["update"] = last.update
        sends: Counter[str] = Counter()
        for part in (stage.sends, last.update_sends):
            for purpose, seconds in part.items():
                sends[f"send: {purpose}"] += seconds
        seconds = scheduled + last.after
        tokens = self.config.run.global_batch_size * self.config.model.seq_length
        rate = tokens / seconds / self.world_size
        peak = self.cluster.peak(self.config.run.precision)
        return StepTime(
            seconds=seconds,
            by_kind={**kinds, **sends},
            hidden_seconds=stage.hidden,
            slowest_stage=slowest,
            tokens_per_second_per_gpu=rate,
            model_flops_utilisation=rate * self._flops_per_token[0] / peak,
            hardware_flops_utilisation=rate * self._flops_per_token[1] / peak,
            tokens=tokens,
        )

    @cached_property
    def _roles(self) -> tuple[Role, ...]:
        return roles(self.config, self.world_size)

    def _own_collectives(self, pipeline_rank: int) -> Sequence[Collective]:
        return step_collectives(
            self.config, self.world_size, pipeline_rank, rows_sent=self.compute.most_rows.sent,
            ranks_per_node=self.cluster.ranks_per_node,
        )  # fmt: skip

    def _stage(self, role: Role) -> _Stage:
        stage, m = _Stage(), self.num_micro_batches
        recompute = self.config.parallel.recompute
        expert = 0.0
        for num_experts in (count for chunk in role.chunks for count in chunk.num_experts):
            passes = self._layer_passes(num_experts)
            stage.forward += m * passes.forward
            stage.backward += m * passes.backward
            again = {"full": passes.forward, "selective": passes.attention, "none": 0.0}[recompute]
            stage.recompute += m * again
            expert += m * passes.expert * (4 if recompute == "full" else 3)
        if any(chunk.has_head for chunk in role.chunks):
            loss = seconds_of_passes(self.compute.logits, self.cluster, self.config)
            stage.forward += m * loss.forward
            stage.backward += m * loss.backward
        self._add_sends(stage, role, expert)
        stage.update = self._update_seconds(role)
        return stage

    def _layer_passes(self, num_experts: int) -> PassSeconds:
        if num_experts not in self._passes:
            work = self.compute.layer(num_experts)
            self._passes[num_experts] = seconds_of_passes(work, self.cluster, self.config)
        return self._passes[num_experts]

    def _add_sends(self, stage: _Stage, role: Role, expert_seconds: float) -> None:
        rank = role.pipeline_rank * self.grid.stage_ranks
        computing = stage.forward + stage.backward + stage.recompute
        tensor: set[str] = set()  # purposes of the tensor group
        for collective in self._sent(role.pipeline_rank):
            if collective.phase == "update":
                if not (self.traits.fully_sharded and collective.group in ("data", "expert_data")):
                    seconds = collective.count * self.network.seconds(collective, rank)
                    stage.update_sends[collective.purpose] += seconds
                continue
            seconds = collective.count * self._seconds(collective, rank)
            purpose = collective.purpose + _ENDING.get(collective.kind, "")
            stage.sends[purpose] += seconds
            if collective.group == "tensor":
                tensor.add(purpose)
        if self.traits.fully_sharded:
            self._add_sharded(stage, role, computing)
        chunks = self.config.parallel.all_to_all_chunks
        exchanges = [purpose for purpose in stage.sends if purpose.endswith(_ENDING["all_to_all"])]
        if self.traits.overlapped_all_to_all:
            self._hide(stage, stage.sends, exchanges, computing)
        elif chunks > 1:
            share = (chunks - 1) / chunks
            self._hide(stage, stage.sends, exchanges, expert_seconds * share, share)
        if self.traits.overlapped_tensor_parallel:
            self._hide(stage, stage.sends, [purpose for purpose in stage.sends if purpose in tensor], computing)
        if self.traits.overlapped_gradient_reduce:
            beside = (stage.forward + stage.backward + stage.recompute) / self.num_micro_batches
            self._hide(stage, stage.update_sends, list(stage.update_sends), beside)

    def _sent(self, pipeline_rank: int) -> Sequence[Collective]:
        """What a rank of this stage sends; calls that are equal but for the layer are one entry."""
        if pipeline_rank not in self._messages and not self.traits.dispatched_slices:
            self._messages[pipeline_rank] = list(self._collectives(pipeline_rank))
        if pipeline_rank not in self._messages:
            counts: Counter[Collective] = Counter()
            for collective in self._as_traits_say(pipeline_rank):
                counts[replace(collective, count=1)] += collective.count
            self._messages[pipeline_rank] = [replace(each, count=count) for each, count in counts.items()]
        return self._messages[pipeline_rank]

    def _as_traits_say(self, pipeline_rank: int) -> Iterator[Collective]:
        tensor = self.grid.expert_tensor
        for collective in self._collectives(pipeline_rank):
            if tensor > 1 and self.traits.dispatched_slices and collective.purpose in _WHOLE_SEQUENCE:
                continue
            if collective.kind != "all_to_all" or tensor == 1 or not self.traits.dispatched_slices:
                yield collective
                continue
            part = collective.num_bytes // tensor
            yield replace(collective, num_bytes=part)
            # Rows are gathered over the tensor ranks on the way to the experts, results summed on the way back, and
            # the other way round in the backward pass: of either kind one in two.
            goes_in = (collective.purpose == "dispatch") != (collective.phase == "backward")
            kind, own = ("all_gather", part) if goes_in else ("reduce_scatter", part * tensor)
            yield Collective(kind, "expert_tensor", collective.purpose, collective.phase, own, collective.count)

    def _hide(
        self, stage: _Stage, sends: dict[str, float], purposes: Sequence[str], beside: float, share: float = 1.0,
        overlap: float | None = None,
    ) -> None:  # fmt: skip
        """Take out of `sends` what `beside` seconds of computation hide; `share` of a transfer can run beside any."""
        total = sum(sends[purpose] for purpose in purposes)
        hidden = (self.cluster.efficiency.overlap if overlap is None else overlap) * min(total * share, beside)
        for purpose in purposes:
            sends[purpose] -= hidden * sends[purpose] / total if total else 0.0
        stage.hidden += hidden

    def _seconds(self, collective: Collective, rank: int) -> float:
        if collective.kind in ("send", "receive"):
            # Both directions of a link work at once: of a message in and one out the longer is waited for.
            return self.network.seconds(collective, rank) / 2
        rows = self.compute.most_rows
        if collective.kind == "all_to_all" and collective.purpose in _ROWS and rows.sent:
            # All wait for the rank to which most rows go, and from which they come back.
            num_bytes = round(collective.num_bytes * rows.received / rows.sent)
            collective = replace(collective, num_bytes=num_bytes)
        if collective.kind == "all_to_all" and self.traits.deduplicated_dispatch:
            at = self.network.placement(collective.group, rank)
            if at.num_nodes > 1:
                return self._deduplicated_seconds(collective.num_bytes, at)
        return self.network.seconds(collective, rank)

    def _deduplicated_seconds(self, num_bytes: int, at: Placement) -> float:
        """Once to each other node that holds one of a token's experts, and on from there to all of them at once."""
        top_k = self.config.moe.top_k
        missed = (1 - at.num_on_node / at.num_ranks) ** top_k
        remote = num_bytes / top_k * (at.num_nodes - 1) * (1 - missed)
        local = num_bytes * (at.num_on_node - 1) / at.num_on_node
        across = self.network.exchange_seconds(0.0, remote, 0, at.num_nodes - 1)
        inside = self.network.exchange_seconds(local, 0.0, at.num_on_node - 1, 0)
        return max(across, inside)

    def _add_sharded(self, stage: _Stage, role: Role, computing: float) -> None:
        """Fully sharded: weights gathered forward and backward, gradients reduced, in every micro-batch."""
        size, rank = ELEMENT_BYTES[self.config.run.precision], role.pipeline_rank * self.grid.stage_ranks
        sends: dict[str, float] = defaultdict(float)
        dense, experts = self._elements(role)
        families: tuple[tuple[Family, int], ...] = (("data", dense), ("expert_data", experts))
        for family, elements in families:
            at = self.network.placement(family, rank)
            gather = self.network.call_seconds("all_gather", elements * size / at.num_ranks, at)
            reduce = self.network.call_seconds("reduce_scatter", elements * self.traits.reduced_gradient_bytes, at)
            sends["sharded weights"] += self.num_micro_batches * 2 * gather
            sends["sharded gradients"] += self.num_micro_batches * reduce
        self._hide(stage, sends, list(sends), computing, overlap=1.0 if self.traits.prefetched_shards else None)
        for purpose, seconds in sends.items():
            stage.sends[purpose] += seconds

    def _elements(self, role: Role) -> tuple[int, int]:
        """Weights that a rank of this role holds: dense ones, and those of experts."""
        if role.pipeline_rank not in self._held:
            experts = sum(held.num_elements for held in role.parameters if held.is_expert)
            self._held[role.pipeline_rank] = role.num_elements - experts, experts
        return self._held[role.pipeline_rank]

    def _update_seconds(self, role: Role) -> float:
        """Of the optimizer on this rank's partition: all is a matter of memory bandwidth."""
        dense, experts = self._elements(role)
        sharded = self.config.parallel.zero_stage > 0
        own = dense / (self.grid.data if sharded else 1) + experts / (self.grid.expert_data if sharded else 1)
        return own * UPDATE_BYTES / (self.cluster.memory_bytes_per_second * self.cluster.efficiency.memory)


_WHOLE_SEQUENCE = ("experts' input", "experts' output")  # gathered and summed where all tokens are routed
_ROWS = ("dispatch", "combine")  # all-to-alls that carry tokens
_ENDING = {"all_to_all": " (all-to-all)"}


def _schedule_seconds(stages: Sequence[float], num_micro_batches: int, chunks: int) -> float:
    """Of the 1F1B schedule, interleaved where there are several chunks, given one micro-batch's seconds by stage."""
    return sum(stages) / chunks + (num_micro_batches - 1 / chunks) * max(stages)


def step_time(
    config: Config, cluster: Cluster, world_size: int, collectives: CollectivesOf | None = None, *,
    traits: Traits | None = None, load: Load | None = None,
) -> StepTime:  # fmt: skip
    """The step of a configuration on `world_size` GPUs of a cluster, as our engine or one of other `traits` takes it.

    `collectives`: what each pipeline rank sends; None: what our engine does. Raises as `StepTimer`.
    """
    return StepTimer(config, cluster, world_size, collectives, traits=traits, load=load).time()
