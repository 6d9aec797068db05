"""The MoE layer as Megatron-core's transformer layer calls it and as DeepSpeed recognises it.

    s sequence   b micro-batch   h hidden   E experts   k choices   S = s * b tokens, of this rank's slice

Tensor parallelism, without expert tensor parallelism: every tensor rank routes its own slice of the sequence, so no
token is sent or computed twice; with sequence parallelism the slice is what arrives, otherwise it is cut here and
gathered again (filled up first where it does not divide, as a single new token of a text does not; what fills it up is
not routed). With expert tensor parallelism the experts' matrices are cut like the dense ones: all tensor ranks route
the same tokens and sum their partial results.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.utils import groups as deepspeed_groups
from megatron.core.tensor_parallel import get_cuda_rng_tracker, mappings
from torch import Tensor, nn

from megamoe.config.schema import MoEConfig
from megamoe.moe.balance_bias import BalanceBias
from megamoe.moe.dispatch import combine, dispatch
from megamoe.moe.exchange import Exchange
from megamoe.moe.experts import StackedExperts
from megamoe.moe.losses import LossScale, attach_loss, balance_loss, choice_share, z_loss
from megamoe.moe.precision import compute_dtype
from megamoe.moe.routers import JITTER_STATE, build_router
from megamoe.moe.routing import Normalization, Routing, settle
from megamoe.moe.shared import SharedExpert
from megamoe.moe.statistics import LoadStatistics
from megamoe.topology.capacity import expert_capacity


@dataclass(frozen=True)
class ExpertParallel:
    """The groups an MoE layer talks over (None: a group of one) and where this rank stands in them."""

    exchange: Exchange  # how rows reach the ranks that share the experts
    expert_size: int
    tensor_group: dist.ProcessGroup | None
    tensor_size: int
    expert_tensor_size: int
    expert_tensor_rank: int
    sequence_parallel: bool
    data_group: dist.ProcessGroup | None = None
    data_size: int = 1


@dataclass
class EvaluationMode:
    """How MoE layers behave outside training; one instance is shared by the layers of a rank.

    With `drop_tokens` off experts take all tokens: what a text is continued with must not depend on its padding. With
    `has_losses` off the losses of routing, which cost collectives, are not computed, and only drops are counted.
    """

    drop_tokens: bool = True
    has_losses: bool = True


@dataclass(frozen=True)
class MoEContext:
    """What the MoE layers of one rank share: settings, groups, loss scale, statistics."""

    config: MoEConfig
    hidden_size: int
    expert_ffn_hidden_size: int
    activation: str  # a key of megamoe.moe.activations.ACTIVATIONS
    use_bias: bool
    dtype: torch.dtype
    device: torch.device | str
    parallel: ExpertParallel
    loss_scale: LossScale
    statistics: LoadStatistics
    evaluation: EvaluationMode
    balance_bias: BalanceBias | None = None


def expert_group_name(expert_parallel_size: int) -> str:
    """DeepSpeed's key for the expert groups of one size; expert parameters carry it."""
    return f"ep_size_{expert_parallel_size}"


class Router(nn.Module):
    """A bias-free linear map to one score per expert: weight [E, h].

    With `input_jitter` the input is multiplied, in training, by draws from U(1 - jitter, 1 + jitter) (Switch, 2021,
    section 2.2). They come from a random state of Megatron's tracker, which recompute rewinds and checkpoints hold.
    """

    def __init__(self, context: MoEContext, num_experts: int) -> None:
        super().__init__()
        shape = (num_experts, context.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=context.dtype, device=context.device))
        self.input_jitter = context.config.input_jitter

    def forward(self, x: Tensor) -> Tensor:
        """x [S, h] -> logits [S, E] fp32. The product is one of the model's dtype, as in Artetxe et al.'s code."""
        if self.input_jitter > 0.0 and self.training:
            with get_cuda_rng_tracker().fork(JITTER_STATE):
                factor = torch.empty(x.shape, dtype=torch.float32, device=x.device)
                factor.uniform_(1.0 - self.input_jitter, 1.0 + self.input_jitter)
            x = (x.float() * factor).to(x.dtype)
        wide = compute_dtype(x)
        return nn.functional.linear(x.to(wide), self.weight.to(wide)).to(x.dtype).float()


class MoELayer(DeepSpeedMoE):
    """Router, dispatch, stacked experts, combine. A DeepSpeed `MoE` by class, so that its engine keeps expert
    gradients and optimizer partitions apart; none of DeepSpeed's gates, masks or padded buffers are used."""

    def __init__(
        self, config: Any, *, context: MoEContext, layer: int, num_experts: int,
        shared_expert: Callable[[Any], SharedExpert] | None = None,
    ) -> None:  # fmt: skip
        """`config` is Megatron's TransformerConfig, which every spec module is handed, and of which `shared_expert`
        builds the FFN beside the experts; `layer` is 0-based."""
        nn.Module.__init__(self)  # not DeepSpeedMoE.__init__: it would build the gate and experts replaced here
        parallel = context.parallel
        self.context, self.layer = context, layer
        self.num_experts = num_experts  # read by DeepSpeed's engine
        self.ep_size = parallel.expert_size
        self.expert_group_name = expert_group_name(parallel.expert_size)
        self.num_local_experts = self.num_experts // parallel.expert_size
        self.router = Router(context, num_experts)
        self.choose = build_router(context.config)
        if context.balance_bias is not None:
            context.balance_bias.add_layer(layer, num_experts)
        self.experts = StackedExperts(
            num_local_experts=self.num_local_experts,
            hidden_size=context.hidden_size,
            ffn_hidden_size=context.expert_ffn_hidden_size // parallel.expert_tensor_size,
            activation=context.activation,
            use_bias=context.use_bias,
            adds_fc2_bias=parallel.expert_tensor_rank == 0,
            recompute_activation=context.config.recompute_activation,
            dtype=context.dtype,
            device=context.device,
        )
        for parameter in self.experts.parameters():
            parameter.allreduce = False  # DeepSpeed: reduce over the expert-data group, not over data parallel
            parameter.group_name = self.expert_group_name
        # Dense parameters like any other: no `allreduce` mark.
        self.shared_expert = shared_expert(config) if shared_expert is not None else None

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine, which here finds the groups registered instead of making its own."""
        deepspeed_groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """hidden [s, b, h] (a slice of s under sequence parallelism) -> the same shape, and no separate bias."""
        x, beside = self._enter(hidden), None
        if self.shared_expert is not None:
            beside = partial(self.shared_expert, hidden)
        fillers = self._num_fillers(hidden, x)
        if fillers:
            x = x[: x.shape[0] - fillers]
        y, shared = self._route_and_apply(x.reshape(-1, x.shape[-1]), num_sequences=x.shape[1], beside=beside)
        y = y.view_as(x)
        if fillers:
            y = nn.functional.pad(y, (0, 0, 0, 0, 0, fillers))
        y = self._leave(y)
        if y.shape[0] > hidden.shape[0]:
            y = y[: hidden.shape[0]]
        return y if self.shared_expert is None else self.shared_expert.mix(hidden, y, shared), None

    def _route_and_apply(
        self, x: Tensor, *, num_sequences: int, beside: Callable[[], Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x [S, h], token t of sequence t % num_sequences -> [S, h], and what `beside` returns.

        `beside` needs no exchange of rows: it runs while the first chunk travels.
        """
        parallel = self.context.parallel
        routing, losses = self._route(x, num_sequences)
        buffers, metadata = dispatch(x, routing, parallel.exchange)
        shared = None if beside is None else beside()
        chunks = zip(buffers, metadata.rows_per_expert, self.experts.cut(parallel.exchange.num_chunks), strict=True)
        y = combine((self.experts(*chunk) for chunk in chunks), routing, metadata)
        for loss, coefficient in losses:
            # Router gradients are summed over the tensor group, whose ranks each hold a slice or a copy of the loss.
            y = attach_loss(y, loss, self.context.loss_scale, coefficient / parallel.tensor_size)
        return y, shared

    def _route(self, x: Tensor, num_sequences: int) -> tuple[Routing, list[tuple[Tensor, float]]]:
        """The decision for x [S, h], and the losses it costs with their coefficients, those above 0."""
        config, bias = self.context.config, self.context.balance_bias
        logits = self.router(x)
        choice = self.choose(logits, bias.of(self.layer) if bias is not None else None)
        routing = settle(
            choice.expert_index,
            choice.gate,
            num_experts=self.num_experts,
            capacity=self._capacity(x.shape[0]),
            normalization=self._normalization,
            drop_policy=config.drop_policy,
            scale=config.routed_scaling_factor,
            place_of_expert=self.context.parallel.exchange.place_of_expert(self.num_experts, x.device),
        )
        if not self.training and not self.context.evaluation.has_losses:
            if self.context.evaluation.drop_tokens:
                self.context.statistics.record(self.layer, routing, x.new_zeros(()))
            return routing, []
        groups = num_sequences if config.balance_loss_scope == "sequence" else 1
        share = self._choice_share(choice.expert_index, groups)
        balance = balance_loss(
            choice.probabilities, choice.expert_index, config.balance_loss, share=share, num_sequences=groups
        )
        z = z_loss(logits) if config.z_loss_coeff > 0.0 else None
        # Under recompute the forward pass runs twice, first without gradients: that one is not counted.
        if torch.is_grad_enabled() or not self.training:
            self.context.statistics.record(self.layer, routing, balance, z_loss=z, logits=logits)
            if bias is not None and self.training:
                bias.record(self.layer, routing.expert_index)
        losses = [(balance, config.balance_loss_coeff)] if config.balance_loss_coeff > 0.0 else []
        return routing, losses if z is None else [*losses, (z, config.z_loss_coeff)]

    def _choice_share(self, expert_index: Tensor, num_sequences: int) -> Tensor:
        """Shares of choices over all ranks that the scope of the balance loss spans: no loss depends on the layout."""
        config, parallel, num_ranks = self.context.config, self.context.parallel, 1
        share = choice_share(expert_index, self.num_experts, config.balance_loss, num_sequences=num_sequences)
        if parallel.tensor_group is not None and parallel.expert_tensor_size == 1:
            dist.all_reduce(share, group=parallel.tensor_group)  # the slices of one micro-batch are counted together
            num_ranks *= parallel.tensor_size
        if parallel.data_group is not None and config.balance_loss_scope == "global_batch":
            dist.all_reduce(share, group=parallel.data_group)
            num_ranks *= parallel.data_size
        return share / num_ranks

    @property
    def _normalization(self) -> Normalization:
        config = self.context.config
        return config.normalize_when if config.normalize_gates else "none"

    def _capacity(self, num_tokens: int) -> int | None:
        config = self.context.config
        if config.dropless:
            return None
        factor = config.capacity_factor
        if not self.training:
            if not self.context.evaluation.drop_tokens:
                return None
            if config.eval_capacity_fraction is not None:
                return math.ceil(config.eval_capacity_fraction * num_tokens)
            factor = config.eval_capacity_factor or factor
        return expert_capacity(num_tokens, self.num_experts, config.top_k, factor)

    def _enter(self, hidden: Tensor) -> Tensor:
        parallel = self.context.parallel
        if parallel.tensor_group is None:
            return hidden
        if parallel.expert_tensor_size == 1:
            if parallel.sequence_parallel:
                return hidden
            if missing := -hidden.shape[0] % parallel.tensor_size:
                hidden = nn.functional.pad(hidden, (0, 0, 0, 0, 0, missing))
            return mappings.scatter_to_sequence_parallel_region(hidden, group=parallel.tensor_group)
        if parallel.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(hidden, group=parallel.tensor_group)
        return mappings.copy_to_tensor_model_parallel_region(hidden, group=parallel.tensor_group)

    def _num_fillers(self, hidden: Tensor, x: Tensor) -> int:
        """Positions at the end of x, this rank's slice of hidden, that only fill it up: they take no token's place."""
        parallel = self.context.parallel
        if parallel.tensor_group is None or parallel.expert_tensor_size > 1 or parallel.sequence_parallel:
            return 0
        end = (dist.get_rank(parallel.tensor_group) + 1) * x.shape[0]
        return min(x.shape[0], max(0, end - hidden.shape[0]))

    def _leave(self, y: Tensor) -> Tensor:
        parallel = self.context.parallel
        if parallel.tensor_group is None:
            return y
        if parallel.expert_tensor_size == 1:
            if parallel.sequence_parallel:
                return y
            return mappings.gather_from_sequence_parallel_region(
                y, tensor_parallel_output_grad=False, group=parallel.tensor_group
            )
        if parallel.sequence_parallel:
            return mappings.reduce_scatter_to_sequence_parallel_region(y, group=parallel.tensor_group)
        return mappings.reduce_from_tensor_model_parallel_region(y, group=parallel.tensor_group)
