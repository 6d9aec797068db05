"""Llama and its kin: RMSNorm, SwiGLU, rotary embeddings; dense, or with experts in all or some layers.

All of them route alike: experts are the best of the softmax over all, gates those probabilities, divided by their sum
where the class does that. Source: the modelling and configuration files of transformers 5.23.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.hf_families import names
from megamoe.convert.hf_families.family import (
    Family,
    Tree,
    normalizes,
    pattern_of,
    their_loss_coefficient,
    to_our_loss_coefficient,
    uniform_experts,
)
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.placement import PLACEMENTS, Placement
from megamoe.topology.parameters import dimensions, moe_layers


@dataclass(frozen=True)
class Experts:
    """How a class spells its mixture of experts."""

    placement: Placement
    num_experts: tuple[str, ...] = ("num_experts", "num_local_experts")  # the key it writes, then other spellings
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    ffn: str = "intermediate_size"
    always_normalizes: bool = False  # else norm_topk_prob says so
    num_shared: str | None = None  # shared experts of the experts' FFN size, added
    norm_min: str | None = None  # smallest sum that gates are divided by
    jitter: str | None = None


@dataclass(frozen=True)
class Kin:
    """What tells one class from another."""

    architecture: str
    model_type: str
    defaults: dict[str, Any]
    names: names.Names
    experts: Experts | None = None
    qk_norm: str = "none"
    bias_keys: tuple[str, ...] = ()
    may_have_biases: bool = False  # on all linear layers, by all of bias_keys together
    writes_head_dim: bool = False
    free_head_dim: bool = True  # else hidden_size / num_attention_heads
    has_attention_dropout: bool = True
    has_classifier: bool = True
    constant: tuple[tuple[str, Any], ...] = ()  # keys with the one value that we can express

    def family(self) -> Family:
        trained = {"model.attention_dropout": "attention_dropout"} if self.has_attention_dropout else {}
        if self.experts is not None:
            trained |= {"moe.balance_loss_coeff": "router_aux_loss_coef"}
            trained |= {"moe.input_jitter": self.experts.jitter} if self.experts.jitter else {}
        reads = (partial(function, self) for function in (_read, _refusals, _write))
        read, refusals, write = reads
        return Family(
            self.architecture, self.model_type, self.defaults, lambda config: self.names, read, refusals, write,
            trained, has_classifier=self.has_classifier,
        )  # fmt: skip


def _read(kin: Kin, keys: Keys) -> Tree:
    keys.require("hidden_act", ["silu", "swish"], "gated FFNs are swiglu")
    for key, value in kin.constant:
        keys.require(key, [value], f"use {key} {value!r}")
    heads, hidden = keys.take("num_attention_heads"), keys.take("hidden_size")
    groups, head_dim = keys.take("num_key_value_heads"), keys.take("head_dim")
    if head_dim is not None and not kin.free_head_dim and head_dim * heads != hidden:
        keys.refuse(f"head_dim {head_dim}", "its norms of queries and keys are of hidden_size")
    model = {
        "num_layers": keys.take("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": keys.take("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": None if groups == heads else groups,
        "head_dim": None if head_dim is None or head_dim * heads == hidden else head_dim,
        "seq_length": keys.take("max_position_embeddings"),
        "normalization": "rmsnorm",
        "norm_epsilon": keys.take("rms_norm_eps"),
        "activation": "swiglu",
        "position_embedding": "rope",
        "rope_base": keys.rope_base(),
        "qk_norm": kin.qk_norm,
        "use_bias": _read_bias(kin, keys),
        "tie_embeddings": keys.take("tie_word_embeddings"),
        "scale_embeddings": False,
        "attention_dropout": keys.take("attention_dropout") if kin.has_attention_dropout else 0.0,
        "init": "normal",
        "init_std": keys.take("initializer_range"),
    }
    _read_windows(keys)
    return {"model": model, "moe": {} if kin.experts is None else _read_experts(kin.experts, keys, model)}


def _read_bias(kin: Kin, keys: Keys) -> bool:
    values = {key: bool(keys.take(key)) for key in kin.bias_keys}
    if kin.may_have_biases and all(values.values()):
        return True
    for key, value in values.items():
        if value:
            have = "all linear layers have biases or none has"
            keys.refuse(f"{key} true", f"{have}: set {' and '.join(kin.bias_keys)}" if kin.may_have_biases else have)
    return False


def _read_windows(keys: Keys) -> None:
    """Attention sees all earlier tokens, in every layer."""
    if keys.take("use_sliding_window") is not False:  # None: the class has no such switch
        window = keys.take("sliding_window")
        if window is not None:
            keys.refuse(f"sliding_window {window}", "attention sees all earlier tokens")
    keys.take("sliding_window"), keys.take("max_window_layers")
    for kind in keys.take("layer_types") or ():
        if kind != "full_attention":
            keys.refuse(f"layer_types {kind}", "attention sees all earlier tokens")


def _read_experts(experts: Experts, keys: Keys, model: dict[str, Any]) -> dict[str, Any]:
    num_layers, ffn = model["num_layers"], keys.take(experts.ffn)
    num_experts, top_k = keys.take(*experts.num_experts), keys.take(*experts.top_k)
    layers = experts.placement.read(keys, num_layers)
    loss_coefficient = keys.take("router_aux_loss_coef") or 0.0
    jitter = keys.take(experts.jitter) if experts.jitter else 0.0
    num_shared = (keys.take(experts.num_shared) or 0) if experts.num_shared else 0
    normalizes_gates = experts.always_normalizes or bool(keys.take("norm_topk_prob"))
    if experts.norm_min and num_experts and keys.take(experts.norm_min) > top_k / num_experts:
        keys.refuse(f"{experts.norm_min} {keys.take(experts.norm_min)!r}", "gates are divided by their sum as it is")
    if not num_experts or not layers:
        keys.refuse("experts in none of its layers", "use the class of the dense model")
    return {
        "num_experts": num_experts,
        "top_k": top_k,
        "layer_pattern": pattern_of(layers, num_layers),
        "expert_ffn_hidden_size": None if ffn == model["ffn_hidden_size"] else ffn,
        "shared_expert_ffn_hidden_size": num_shared * ffn or None,
        "dropless": True,
        "normalize_gates": normalizes_gates,
        "balance_loss": "all_choices",
        "balance_loss_coeff": to_our_loss_coefficient(loss_coefficient, top_k, len(layers)),
        "input_jitter": jitter,
    }


def _refusals(kin: Kin, config: Config) -> list[str]:
    model, sizes = config.model, dimensions(config.model, config.moe)
    found = []
    for key, value in (("normalization", "rmsnorm"), ("activation", "swiglu"), ("position_embedding", "rope")):
        if getattr(model, key) != value:
            found.append(f"model.{key} {getattr(model, key)}: it has {value}")
    if model.scale_embeddings:
        found.append("model.scale_embeddings true: it takes embeddings as they are")
    if model.qk_norm != kin.qk_norm:
        theirs = {"none": "no norms of queries and keys", "head": "one over each head", "full": "one over all heads"}
        found.append(f"model.qk_norm {model.qk_norm}: it has {theirs[kin.qk_norm]}")
    if model.use_bias and not kin.may_have_biases:
        found.append("model.use_bias true: its experts and FFNs have no biases")
    if not kin.free_head_dim and sizes.head_dim * sizes.heads != sizes.hidden:
        found.append(f"model.head_dim {sizes.head_dim}: its heads share out hidden_size {sizes.hidden}")
    if sizes.hidden % sizes.heads:  # refused by the configuration class, or by its default head_dim
        found.append(f"model.num_attention_heads {sizes.heads}: it must divide hidden_size {sizes.hidden}")
    if kin.experts is not None:
        return found + _expert_refusals(kin.experts, config)
    if config.moe.num_experts:
        found.append(f"moe.num_experts {config.moe.num_experts}: it has no experts")
    return found


def _expert_refusals(experts: Experts, config: Config) -> list[str]:
    moe, sizes = config.moe, dimensions(config.model, config.moe)
    if not moe.num_experts:
        return ["moe.num_experts 0: it has experts"]
    found = experts.placement.refusals(config)
    if uniform_experts(config) is None:
        found.append("moe.num_experts_by_layer: its layers have the same number of experts")
    if moe.score_function != "softmax":
        found.append(f"moe.score_function {moe.score_function}: its scores are a softmax")
    if not normalizes(moe) and experts.always_normalizes:
        found.append("moe.normalize_gates false: its gates are divided by their sum")
    if moe.routed_scaling_factor != 1.0:
        found.append(f"moe.routed_scaling_factor {moe.routed_scaling_factor:g}: its gates are not scaled")
    if moe.num_expert_groups is not None:
        found.append(f"moe.num_expert_groups {moe.num_expert_groups}: it chooses among all experts")
    shared = sizes.shared_expert_ffn
    if shared is not None:
        if experts.num_shared is None:
            found.append(f"moe.shared_expert_ffn_hidden_size {shared}: it has no shared expert")
        elif shared % sizes.expert_ffn:
            found.append(
                f"moe.shared_expert_ffn_hidden_size {shared}: its shared experts are each of the experts' size "
                f"{sizes.expert_ffn}"
            )
        if moe.shared_expert_mix != "add":
            found.append(f"moe.shared_expert_mix {moe.shared_expert_mix}: it adds shared experts, or has none")
    return found


def _write(kin: Kin, config: Config) -> dict[str, Any]:
    model, sizes = config.model, dimensions(config.model, config.moe)
    keys: dict[str, Any] = dict(kin.constant)
    keys |= dict.fromkeys(kin.bias_keys, model.use_bias)
    if kin.has_attention_dropout:
        keys["attention_dropout"] = model.attention_dropout
    if kin.writes_head_dim or sizes.head_dim * sizes.heads != sizes.hidden:
        keys["head_dim"] = sizes.head_dim
    keys |= {
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": model.init_std,
        "intermediate_size": sizes.ffn,
        "max_position_embeddings": model.seq_length,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": sizes.query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "tie_word_embeddings": model.tie_embeddings,
    }
    if kin.experts is not None:
        keys |= _write_experts(kin.experts, config)
    return keys


def _write_experts(experts: Experts, config: Config) -> dict[str, Any]:
    moe, sizes = config.moe, dimensions(config.model, config.moe)
    keys = {
        experts.num_experts[0]: uniform_experts(config),
        experts.top_k[0]: moe.top_k,
        experts.ffn: sizes.expert_ffn,
        "output_router_logits": False,
        "router_aux_loss_coef": their_loss_coefficient(config),
        **experts.placement.write(moe_layers(config.model, moe), config),
    }
    if not experts.always_normalizes:
        keys["norm_topk_prob"] = normalizes(moe)
    if experts.num_shared:
        keys[experts.num_shared] = (sizes.shared_expert_ffn or 0) // sizes.expert_ffn
    if experts.norm_min:
        keys[experts.norm_min] = min(1e-12, moe.top_k / moe.num_experts)
    if experts.jitter:
        keys[experts.jitter] = moe.input_jitter
    return keys


_SHARED_DEFAULTS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "head_dim": None,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": None,
    "use_sliding_window": None,
    "sliding_window": None,
    "max_window_layers": None,
    "layer_types": None,
}


def _defaults(vocab: int, hidden: int, ffn: int, layers: int, heads: int, groups: int | None, length: int, **more: Any):
    return {
        **_SHARED_DEFAULTS,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": length,
        **more,
    }


_NO_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

LLAMA = Kin(
    "LlamaForCausalLM", "llama",
    _defaults(32_000, 4096, 11_008, 32, 32, None, 2048, rms_norm_eps=1e-6, attention_bias=False, mlp_bias=False),
    names.LLAMA, bias_keys=("attention_bias", "mlp_bias"), may_have_biases=True, writes_head_dim=True,
)  # fmt: skip
QWEN3 = Kin(
    "Qwen3ForCausalLM", "qwen3",
    _defaults(151_936, 4096, 22_016, 32, 32, 32, 32_768, rms_norm_eps=1e-6, attention_bias=False, head_dim=128,
              max_window_layers=28, **_NO_WINDOW),
    names.LLAMA, qk_norm="head", bias_keys=("attention_bias",), writes_head_dim=True,
)  # fmt: skip
MIXTRAL = Kin(
    "MixtralForCausalLM", "mixtral",
    _defaults(32_000, 4096, 14_336, 32, 32, 8, 131_072, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
              num_experts_per_tok=2, router_aux_loss_coef=0.001, router_jitter_noise=0.0),
    names.MIXTRAL,
    experts=Experts(PLACEMENTS["every layer"], ("num_local_experts", "num_experts"), always_normalizes=True,
                    jitter="router_jitter_noise"),
)  # fmt: skip
OLMOE = Kin(
    "OlmoeForCausalLM", "olmoe",
    _defaults(50_304, 2048, 2048, 16, 16, None, 4096, rms_norm_eps=1e-5, attention_bias=False, clip_qkv=None,
              num_experts=64, num_experts_per_tok=8, norm_topk_prob=False, router_aux_loss_coef=0.01),
    names.QWEN_MOE, experts=Experts(PLACEMENTS["every layer"]), qk_norm="full", bias_keys=("attention_bias",),
    free_head_dim=False, constant=(("clip_qkv", None),), has_classifier=False,
)  # fmt: skip
QWEN3_MOE = Kin(
    "Qwen3MoeForCausalLM", "qwen3_moe",
    _defaults(151_936, 2048, 6144, 24, 32, 4, 32_768, rms_norm_eps=1e-6, attention_bias=False, num_experts=128,
              num_experts_per_tok=8, norm_topk_prob=False, moe_intermediate_size=768, decoder_sparse_step=1,
              mlp_only_layers=None, router_aux_loss_coef=0.001, **_NO_WINDOW),
    names.QWEN_MOE, experts=Experts(PLACEMENTS["sparse step"], ffn="moe_intermediate_size"), qk_norm="head",
    bias_keys=("attention_bias",),
)  # fmt: skip
ERNIE_MOE = Kin(
    "Ernie4_5_MoeForCausalLM", "ernie4_5_moe",
    _defaults(103_424, 2560, 12_288, 28, 20, 4, 131_072, rms_norm_eps=1e-5, rope_theta=500_000.0, use_bias=False,
              tie_word_embeddings=True, moe_num_experts=64, moe_k=6, moe_intermediate_size=1536,
              moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1,
              moe_norm_min=1e-12, router_aux_loss_coef=0.001),
    names.ERNIE_MOE,
    experts=Experts(PLACEMENTS["interval"], ("moe_num_experts", "num_experts", "num_local_experts"),
                    ("moe_k", "num_experts_per_tok"), "moe_intermediate_size", always_normalizes=True,
                    num_shared="moe_num_shared_experts", norm_min="moe_norm_min"),
    bias_keys=("use_bias",), has_attention_dropout=False, has_classifier=False,
)  # fmt: skip

FAMILIES = tuple(kin.family() for kin in (LLAMA, QWEN3, MIXTRAL, OLMOE, QWEN3_MOE, ERNIE_MOE))
