"""Megatron-core's GPTModel, built for one pipeline stage (or virtual stage) from the configuration."""

import logging
import math
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megamoe.config.schema import Config
from megamoe.model.attention import CausalAttention
from megamoe.model.decoding import Decoding, keep_places
from megamoe.model.embedding import RotaryPositions, TokenEmbedding
from megamoe.model.norms import FullNorm, HeadNorm, Norm
from megamoe.model.parallel import ParallelGroups
from megamoe.model.token_nats import token_nats
from megamoe.model.transformer_config import PRECISION_DTYPE, transformer_config
from megamoe.moe.balance_bias import BalanceBias
from megamoe.moe.exchange import Exchange
from megamoe.moe.layer import EvaluationMode, ExpertParallel, MoEContext, MoELayer
from megamoe.moe.losses import LossScale
from megamoe.moe.shared import SharedExpert
from megamoe.moe.statistics import LoadStatistics
from megamoe.topology.parameters import dimensions, experts_by_layer, padded_vocab_size
from megamoe.topology.stages import stage_layers

# Megatron warns once per layer that our MoE layer is not one of the classes it hands groups to; it has its own.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: "Unknown MLP type" not in record.getMessage()
)


class GPT(GPTModel):
    """GPTModel with our token embedding. Input ids [b, s]; output losses [b, s], logits, or hidden states [s, b, h]."""

    def __init__(
        self, config: TransformerConfig, spec: TransformerBlockSubmodules, settings: Config, groups: ParallelGroups,
        collection: ProcessGroupCollection, decoding: Decoding, **kwargs: Any,
    ) -> None:  # fmt: skip
        model = settings.model
        super().__init__(
            config,
            spec,
            vocab_size=padded_vocab_size(model),
            max_sequence_length=model.seq_length,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="rope" if model.position_embedding == "rope" else "none",
            rotary_base=model.rope_base,
            pg_collection=collection,
            **kwargs,
        )
        self.decoding, self.num_tokens_known = decoding, model.vocab_size
        self.tensor_group, self.tensor_size = groups.tensor, groups.grid.tensor
        self.first_row = self.vocab_size // self.tensor_size * groups.coordinates.tensor  # of the output layer's
        if model.position_embedding == "rope":
            self.rotary_pos_emb = RotaryPositions(
                decoding=decoding,
                kv_channels=config.kv_channels,
                rotary_percent=1.0,
                rotary_base=model.rope_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=collection.cp,
            )
        if self.pre_process:
            self.embedding = TokenEmbedding(
                config=config,
                vocab_size=self.vocab_size,
                max_sequence_length=self.max_sequence_length,
                tp_group=groups.tensor,
                scale=math.sqrt(model.hidden_size) if model.scale_embeddings else 1.0,
                sinusoidal=model.position_embedding == "sinusoidal",
                tensor_rank=groups.coordinates.tensor,
                decoding=decoding,
            )

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing to set up: both copies of a tied embedding are filled with the same values by name, and Megatron's
        own way (zero the last stage's copy, sum over both stages) moves the weight to a CUDA device."""

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Megatron's output layer and loss; where only some results are wanted, of those alone."""
        if self.post_process and self.decoding.kept is not None:
            hidden_states = keep_places(hidden_states, self.decoding.kept)
        if self.post_process and self.decoding.hides_padding and kwargs.get("labels") is not None:
            return self._token_nats(hidden_states, kwargs["labels"])
        output = super()._postprocess(hidden_states=hidden_states, **kwargs)
        if self.post_process and kwargs.get("labels") is None:
            self._hide_padding(output)
        return output

    def _token_nats(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """hidden [s, b, h], labels [b, s] -> nats fp32 [b, s], without gradients."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return token_nats(
            hidden_states,
            labels,
            lambda rows: self.output_layer(rows, weight=weight)[0],
            num_local_rows=self.vocab_size // self.tensor_size,
            first_row=self.first_row,
            num_tokens_known=self.num_tokens_known,
            group=self.tensor_group,
        )

    def _hide_padding(self, logits: Tensor) -> None:
        """Make the rows that fill the vocabulary up impossible in this slice [..., V/t], if that is asked for."""
        if self.decoding.hides_padding:
            logits[..., max(0, self.num_tokens_known - self.first_row) :] = -torch.inf


def build_model_chunks(
    config: Config,
    groups: ParallelGroups,
    device: torch.device,
    *,
    loss_scale: LossScale,
    statistics: LoadStatistics,
    evaluation: EvaluationMode,
    balance_bias: BalanceBias,
    decoding: Decoding | None = None,
) -> list[GPT]:
    """The chunks of this rank's pipeline stage, in order: one, or virtual_pipeline_parallel_size of them.

    Values of the parameters are undefined: `megamoe.model.naming.fill_initial` fills them.
    """
    core_config = transformer_config(config)
    collection = _process_group_collection(groups)
    context = _moe_context(config, groups, device, loss_scale, statistics, evaluation, balance_bias)
    decoding = decoding or Decoding()
    grid, pipeline_rank = groups.grid, groups.coordinates.pipeline
    virtual = config.parallel.virtual_pipeline_parallel_size
    chunks = []
    for chunk in range(virtual):
        layers = stage_layers(config.model.num_layers, grid.pipeline, virtual, pipeline_rank, chunk)
        chunks.append(
            GPT(
                core_config,
                block_spec(config, groups, context, layers, decoding),
                config,
                groups,
                collection,
                decoding,
                pre_process=pipeline_rank == 0 and chunk == 0,
                post_process=pipeline_rank == grid.pipeline - 1 and chunk == virtual - 1,
                vp_stage=chunk if virtual > 1 else None,
            )
        )
    return chunks


def block_spec(
    config: Config, groups: ParallelGroups, context: MoEContext, layers: range, decoding: Decoding
) -> TransformerBlockSubmodules:
    """The layers of one stage: the two families, dense and MoE layers, all by choice of submodules."""
    num_experts = experts_by_layer(config.model, config.moe)
    return TransformerBlockSubmodules(
        layer_specs=[
            ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm,
                    self_attention=_attention_spec(config, groups, decoding),
                    self_attn_bda=get_bias_dropout_add,
                    pre_mlp_layernorm=Norm,
                    mlp=(
                        _moe_spec(context, groups, layer, num_experts[layer]) if layer in num_experts else _ffn_spec()
                    ),
                    mlp_bda=get_bias_dropout_add,
                ),
            )
            for layer in layers
        ],
        layer_norm=Norm,
    )


def _attention_spec(config: Config, groups: ParallelGroups, decoding: Decoding) -> ModuleSpec:
    query_norm, key_norm = {
        "none": lambda: (None, None),
        "head": lambda: (HeadNorm, HeadNorm),
        "full": lambda: _full_norms(config, groups),
    }[config.model.qk_norm]()
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=ModuleSpec(module=CausalAttention, params={"decoding": decoding}),
            linear_proj=RowParallelLinear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def _full_norms(config: Config, groups: ParallelGroups) -> tuple[ModuleSpec, ModuleSpec]:
    sizes, size = dimensions(config.model, config.moe), groups.grid.tensor
    common = {"group": groups.tensor if size > 1 else None, "size": size}
    query = ModuleSpec(module=FullNorm, params={"num_heads": sizes.heads, **common})
    key = ModuleSpec(module=FullNorm, params={"num_heads": sizes.query_groups, **common})
    return query, key


def _ffn_spec() -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )


def _moe_spec(context: MoEContext, groups: ParallelGroups, layer: int, num_experts: int) -> ModuleSpec:
    params: dict[str, Any] = {"context": context, "layer": layer, "num_experts": num_experts}
    if context.config.shared_expert_ffn_hidden_size is not None:
        params["shared_expert"] = partial(
            SharedExpert,
            ffn_hidden_size=context.config.shared_expert_ffn_hidden_size,
            mix=context.config.shared_expert_mix,
            tensor_group=groups.tensor,
        )
    return ModuleSpec(module=MoELayer, params=params)


def _moe_context(
    config: Config,
    groups: ParallelGroups,
    device: torch.device,
    loss_scale: LossScale,
    statistics: LoadStatistics,
    evaluation: EvaluationMode,
    balance_bias: BalanceBias,
) -> MoEContext:
    grid, sizes = groups.grid, dimensions(config.model, config.moe)
    return MoEContext(
        config=config.moe,
        hidden_size=sizes.hidden,
        expert_ffn_hidden_size=sizes.expert_ffn,
        activation=config.model.activation,
        use_bias=config.model.use_bias,
        dtype=PRECISION_DTYPE[config.run.precision],
        device=device,
        parallel=ExpertParallel(
            exchange=_exchange(config, groups),
            expert_size=grid.expert,
            tensor_group=groups.tensor if grid.tensor > 1 else None,
            tensor_size=grid.tensor,
            expert_tensor_size=grid.expert_tensor,
            expert_tensor_rank=groups.coordinates.expert_tensor,
            sequence_parallel=config.parallel.sequence_parallel,
            data_group=groups.data if grid.data > 1 else None,
            data_size=grid.data,
        ),
        loss_scale=loss_scale,
        statistics=statistics,
        evaluation=evaluation,
        balance_bias=balance_bias,
    )


def _exchange(config: Config, groups: ParallelGroups) -> Exchange:
    num_chunks = config.parallel.all_to_all_chunks
    if groups.expert_local is None or groups.expert_across is None:
        return Exchange.flat(groups.expert, num_chunks=num_chunks)
    return Exchange.hierarchical(groups.expert_local, groups.expert_across, num_chunks=num_chunks)


def _process_group_collection(groups: ParallelGroups) -> ProcessGroupCollection:
    collection = ProcessGroupCollection()
    collection.tp, collection.pp, collection.mp = groups.tensor, groups.pipeline, groups.model
    collection.cp, collection.dp, collection.dp_cp = groups.context, groups.data, groups.data
    collection.ep, collection.expt_tp, collection.expt_dp = groups.expert, groups.expert_tensor, groups.expert_data
    collection.embd = collection.pos_embd = None
    return collection
