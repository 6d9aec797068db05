"""The megamoe architecture in plain torch for transformers 5. The file travels with models: it imports no megamoe.

It computes what megamoe computes in evaluation with no token dropped: dense layers and layers with a mixture of
experts, of the paper's family (LayerNorm, GELU, sinusoidal positions; arXiv 2112.10684) and of the modern one
(RMSNorm, SwiGLU, rotary positions), with any of the routers.

    b sequences   t tokens of each   h hidden   n heads   d head dimension   S = b * t   E experts   k choices
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_megamoe import MegamoeConfig

FIRST_SINUSOID_POSITION = 2  # fairseq counts positions from its padding id, 1, plus 1


def sinusoids(positions: Tensor, hidden_size: int) -> Tensor:
    """positions [b, t] -> [b, t, h] fp32: sines in the first half of the features, cosines in the second."""
    half = hidden_size // 2
    numbers = torch.arange(half, dtype=torch.float32, device=positions.device)
    frequency = torch.exp(numbers * -(math.log(10_000.0) / (half - 1)))
    angle = (positions + FIRST_SINUSOID_POSITION).float().unsqueeze(-1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def rotation(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [b, 1, t, d] of the rotary embedding, in `dtype`."""
    numbers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angle = positions.float().unsqueeze(-1) * (1.0 / base ** (numbers / head_dim))
    angle = torch.cat([angle, angle], dim=-1).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [b, n, t, d] turned: feature i together with feature i + d / 2."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [S, k] of the k largest of scores [S, E], best first; the lower index wins a tie."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float,
    dropout: float = 0.0, **_,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention spelled out, for whoever wants the weights: ([b, t, n, d], weights [b, n, t, all tokens])."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(weights, dropout) @ value).transpose(1, 2).contiguous(), weights


def make_norm(config: MegamoeConfig) -> nn.Module:
    kind = nn.LayerNorm if config.normalization == "layernorm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_epsilon)


class FullRMSNorm(nn.Module):
    """RMSNorm over all heads of queries or keys together (OLMoE), rounded before the weight multiplies it."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return normal.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Causal attention with grouped keys and values, and norms of queries and keys where the model has them."""

    def __init__(self, config: MegamoeConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.is_causal, self.scaling = True, config.head_dim**-0.5  # read by transformers' attention functions
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        num_queries, num_keys = (config.head_dim * n for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, num_queries, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, num_keys, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, num_keys, bias=config.use_bias)
        self.out_proj = nn.Linear(num_queries, config.hidden_size, bias=config.use_bias)
        if config.qk_norm == "head":
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_epsilon)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_epsilon)
        elif config.qk_norm == "full":
            self.q_norm = FullRMSNorm(num_queries, config.norm_epsilon)
            self.k_norm = FullRMSNorm(num_keys, config.norm_epsilon)

    def forward(
        self, x: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [b, t, h] -> the same shape, and the attention weights where the implementation has them."""
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.unflatten(-1, (-1, self.head_dim)) for y in (query, key, value))
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.transpose(1, 2) for y in (query, key, value))
        if turn is not None:
            query, key = rotate(query, *turn), rotate(key, *turn)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(self, query, key, value, mask, dropout=0.0, scaling=self.scaling)
        return self.out_proj(y.flatten(2)), weights


class FeedForward(nn.Module):
    """A dense FFN, or one expert: fc2(gelu(fc1 x)), or down(silu(gate x) * up x)."""

    def __init__(self, config: MegamoeConfig, size: int):
        super().__init__()
        hidden, bias = config.hidden_size, config.use_bias
        self.is_gated = config.activation == "swiglu"
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        if self.is_gated:
            self.gate_proj = nn.Linear(hidden, size, bias=bias)
            self.up_proj = nn.Linear(hidden, size, bias=bias)
            self.down_proj = nn.Linear(size, hidden, bias=bias)
        else:
            self.fc1, self.fc2 = nn.Linear(hidden, size, bias=bias), nn.Linear(size, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Router(nn.Linear):
    """Which experts a token passes, and with what weight. All but the product is computed in fp32."""

    def __init__(self, config: MegamoeConfig, num_experts: int):
        super().__init__(config.hidden_size, num_experts, bias=False)
        self.config = config
        has_bias = config.balance_bias_update_rate > 0.0
        # fp32 by name: transformers makes models of 16-bit weights under a 16-bit default.
        self.register_buffer("balance_bias", torch.zeros(num_experts, dtype=torch.float32) if has_bias else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [S, h] -> logits [S, E] fp32, chosen experts [S, k] int64, their weights [S, k] fp32."""
        config, logits = self.config, super().forward(x).float()
        if config.gate_order == "select_then_softmax":
            chosen = self._select(logits)
            gates = logits.gather(1, chosen).softmax(dim=-1)
        else:
            scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(dim=-1)
            # The bias takes part in the selection alone.
            chosen = self._select(scores if self.balance_bias is None else scores + self.balance_bias.float())
            gates = scores.gather(1, chosen)
        if config.normalize_gates:
            total = gates.sum(dim=-1, keepdim=True)
            gates = gates / total.masked_fill(total < torch.finfo(torch.float32).tiny, 1.0)
        return logits, chosen, gates * config.routed_scaling_factor

    def _select(self, scores: Tensor) -> Tensor:
        """The best k of scores [S, E], within the best groups of neighbouring experts where there are groups."""
        config, scores = self.config, scores.detach()
        if config.num_expert_groups is not None:
            by_group = scores.unflatten(1, (config.num_expert_groups, -1))
            best_of = min(2 if config.score_function == "sigmoid" else 1, by_group.shape[2])
            selected = top_k(by_group.topk(best_of, dim=-1).values.sum(dim=-1), config.num_selected_groups)
            is_out = torch.ones(by_group.shape[:2], dtype=torch.bool, device=scores.device).scatter(1, selected, False)
            scores = by_group.masked_fill(is_out.unsqueeze(-1), -math.inf).flatten(1)
        return top_k(scores, config.num_experts_per_tok)


class MixtureOfExperts(nn.Module):
    """Every token through its k experts, none dropped, and through the shared expert where there is one."""

    def __init__(self, config: MegamoeConfig, num_experts: int):
        super().__init__()
        self.gate = Router(config, num_experts)
        self.experts = nn.ModuleList(FeedForward(config, config.expert_ffn_hidden_size) for _ in range(num_experts))
        self.shared_expert = self.shared_expert_mix = None
        if config.shared_expert_ffn_hidden_size is not None:
            self.shared_expert = FeedForward(config, config.shared_expert_ffn_hidden_size)
            if config.shared_expert_mix != "add":
                num_scores = 2 if config.shared_expert_mix == "residual" else 1
                self.shared_expert_mix = nn.Linear(config.hidden_size, num_scores, bias=num_scores == 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [b, t, h] -> the same shape, and the router's logits [S, E] fp32."""
        flat = x.flatten(0, 1)
        logits, chosen, gates = self.gate(flat)
        routed = self._routed(flat, chosen, gates).view_as(x)
        return routed if self.shared_expert is None else self._mix(x, routed, self.shared_expert(x)), logits

    def _routed(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x [S, h] -> [S, h]: the rows of each expert side by side, through it, and home again."""
        k = chosen.shape[1]
        place = chosen.flatten().argsort(stable=True)  # [S * k]: token * k + choice, sorted by expert
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        rows = x[place // k].split(counts)
        results = torch.cat([self.experts[e](rows[e]) for e, count in enumerate(counts) if count])
        by_choice = results[place.argsort()].view(-1, k, x.shape[1])
        gates = gates.to(x.dtype).unsqueeze(-1)
        total = gates[:, 0] * by_choice[:, 0]
        for choice in range(1, k):
            total = total + gates[:, choice] * by_choice[:, choice]
        return total

    def _mix(self, x: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """DeepSeekMoE's sum, Qwen2-MoE's gate on the shared expert, or PR-MoE's weights for both; all [b, t, h]."""
        if self.shared_expert_mix is None:
            return routed + shared
        scores = self.shared_expert_mix(x).float()
        if scores.shape[-1] == 1:
            return routed + scores.sigmoid().to(x.dtype) * shared
        of_routed, of_shared = scores.softmax(dim=-1).to(x.dtype).split(1, dim=-1)
        return of_routed * routed + of_shared * shared


class MegamoeDecoderLayer(GradientCheckpointingLayer):
    """Attention and FFN, each behind a norm and beside the residual. Names are fairseq's: `final_layer_norm` is the
    norm before the FFN."""

    def __init__(self, config: MegamoeConfig, layer_idx: int):
        super().__init__()
        num_experts = config.experts_by_layer().get(layer_idx)
        self.is_moe = num_experts is not None
        self.self_attn_layer_norm, self.final_layer_norm = make_norm(config), make_norm(config)
        self.self_attn = Attention(config, layer_idx)
        self.mlp = (
            MixtureOfExperts(config, num_experts) if self.is_moe else FeedForward(config, config.intermediate_size)
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, turn: tuple[Tensor, Tensor] | None, past_key_values: Cache | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [b, t, h] -> the same shape, attention weights or None, router logits [S, E] or None."""
        y, weights = self.self_attn(self.self_attn_layer_norm(x), mask, turn, past_key_values)
        x = x + y
        y, logits = self.final_layer_norm(x), None
        if self.is_moe:
            y, logits = self.mlp(y)
        else:
            y = self.mlp(y)
        return x + y, weights, logits


class MegamoePreTrainedModel(PreTrainedModel):
    config_class = MegamoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegamoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights that no file holds: transformers' normal distribution for matrices, ones for norms."""
        super()._init_weights(module)
        if isinstance(module, Router) and module.balance_bias is not None:
            init.zeros_(module.balance_bias)


class MegamoeModel(MegamoePreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: MegamoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MegamoeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layer_norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        output_router_logits: bool | None = None, **_,
    ) -> MoeModelOutputWithPast:  # fmt: skip
        """input_ids [b, t] -> hidden states [b, t, h] behind the last norm.

        Positions count from 0 at the first token of each row that attention_mask [b, all tokens] does not hide.
        Raises ValueError unless just one of input_ids and inputs_embeds (token embeddings, unscaled) is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if config.scale_embeddings:
            x = x * math.sqrt(config.hidden_size)
        if (config.use_cache and not self.training if use_cache is None else use_cache) and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            position_ids = _positions(x, attention_mask, past_key_values)
        mask = create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids,
        )  # fmt: skip
        turn = None
        if config.position_embedding == "rope":
            turn = rotation(position_ids, config.head_dim, config.rope_base, x.dtype)
        else:
            x = x + sinusoids(position_ids, config.hidden_size).to(x.dtype)
        hidden_states, attentions, routers = [x], [], []
        for layer in self.layers:
            x, weights, logits = layer(x, mask, turn, past_key_values=past_key_values)
            hidden_states.append(x)
            attentions.append(weights)
            if logits is not None:
                routers.append(logits)
        x = hidden_states[-1] = self.layer_norm(x)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            router_logits=tuple(routers) if output_router_logits else None,
        )


def _positions(x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """Positions [b or 1, t] of the tokens of x [b, t, h] behind those in the cache."""
    length = x.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -length:]
    num_seen = 0 if cache is None else cache.get_seq_length()
    return torch.arange(num_seen, num_seen + length, device=x.device).unsqueeze(0)


class MegamoeForCausalLM(MegamoePreTrainedModel, GenerationMixin):
    """The language model: token ids to logits, `generate`, and the loss of labels."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegamoeConfig):
        super().__init__(config)
        self.model = MegamoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
        output_attentions: bool | None = None, output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0, **kwargs,
    ) -> MoeCausalLMOutputWithPast:  # fmt: skip
        """input_ids [b, t] -> logits [b, t, vocab], of the last `logits_to_keep` tokens where that is above 0.

        `labels` [b, t] are token ids, shifted here; -100 is not counted. The loss is the language model's alone.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states,
            output_attentions, output_router_logits, return_dict=True,
        )  # fmt: skip
        x = outputs.last_hidden_state
        logits = self.lm_head(x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class MegamoeForSequenceClassification(GenericForSequenceClassification, MegamoePreTrainedModel):
    """The classifier: token ids [b, t] to logits [b, labels] of the last token that is not padding."""

    def __init__(self, config: MegamoeConfig):
        MegamoePreTrainedModel.__init__(self, config)  # theirs looks MegamoeModel up where it may not be registered
        self.num_labels, self.model = config.num_labels, MegamoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


__all__ = ["MegamoeForCausalLM", "MegamoeForSequenceClassification", "MegamoeModel", "MegamoePreTrainedModel"]
