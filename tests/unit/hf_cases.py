"""Models of many kinds for transformers, their weights spelled out from the parameter table's, name by name."""

import torch
from torch import Tensor

from megamoe.config.schema import Config, ModelConfig, MoEConfig
from megamoe.topology.parameters import dimensions, experts_by_layer, padded_vocab_size
from tests.parity.initial import initial_weights

SHAPE = {"num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "vocab_size": 50, "vocab_size_multiple": 8,
         "seq_length": 16}  # fmt: skip
MODERN = {"normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "use_bias": False,
          "tie_embeddings": False, "scale_embeddings": False, "ffn_hidden_size": 40}  # fmt: skip
EXPERTS = {"num_experts": 6, "top_k": 2, "layer_pattern": 1, "dropless": True}

# name -> settings of the sections model and moe
CASES: dict[str, tuple[dict, dict]] = {
    "paper_dense": ({}, {"num_experts": 0}),
    "paper_moe": ({}, {**EXPERTS, "layer_pattern": 2}),
    "modern": (MODERN | {"num_query_groups": 2, "rope_base": 500.0}, EXPERTS),
    "modern_dense": (MODERN | {"head_dim": 10}, {"num_experts": 0}),
    "switch": ({"activation": "gelu_tanh"}, {**EXPERTS, "top_k": 1, "normalize_gates": False}),
    "select_first": (MODERN, {**EXPERTS, "gate_order": "select_then_softmax"}),
    "not_normalized": (
        MODERN | {"qk_norm": "full", "norm_epsilon": 1e-3},
        {**EXPERTS, "top_k": 4, "normalize_gates": False, "routed_scaling_factor": 2.5},
    ),
    "head_norm": (MODERN | {"qk_norm": "head", "num_query_groups": 1, "head_dim": 8}, EXPERTS),
    "sigmoid_groups": (
        MODERN,
        {**EXPERTS, "num_experts": 12, "score_function": "sigmoid", "balance_bias_update_rate": 1e-3,
         "num_expert_groups": 4, "num_selected_groups": 2, "top_k": 3, "routed_scaling_factor": 1.5},
    ),
    "softmax_groups": ({}, {**EXPERTS, "num_expert_groups": 3, "num_selected_groups": 2, "top_k": 3}),
    "shared_add": (MODERN, {**EXPERTS, "shared_expert_ffn_hidden_size": 20}),
    "shared_gate": (MODERN, {**EXPERTS, "shared_expert_ffn_hidden_size": 20, "shared_expert_mix": "sigmoid_gate"}),
    "shared_residual": ({}, {**EXPERTS, "shared_expert_ffn_hidden_size": 20, "shared_expert_mix": "residual"}),
    "pyramid": (
        {"num_layers": 5},
        {**EXPERTS, "layer_pattern": (1, 3, 4), "num_experts_by_layer": (2, 4, 6), "expert_ffn_hidden_size": 28},
    ),
    "mixed": (
        {"use_bias": False, "normalization": "rmsnorm", "tie_embeddings": False, "qk_norm": "head"},
        {**EXPERTS, "layer_pattern": (0, 2)},
    ),
    "mixed_again": (
        {"activation": "swiglu", "position_embedding": "rope", "num_query_groups": 2, "qk_norm": "full"},
        {**EXPERTS, "score_function": "sigmoid", "normalize_gates": False},
    ),
}  # fmt: skip


def case(name: str) -> tuple[Config, dict[str, Tensor], dict[int, Tensor]]:
    """Configuration, weights by our names, and the balance biases [E] by layer."""
    model, moe = CASES[name]
    config = Config(model=ModelConfig(**SHAPE | model), moe=MoEConfig(**moe))
    generator = torch.Generator().manual_seed(5)
    # Starting weights are too even: norms of 1 and biases of 0 hide each other's mistakes.
    weights = {
        key: value + 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in initial_weights(config).items()
    }
    biases = {}
    if config.moe.balance_bias_update_rate:
        biases = {layer: 0.3 * torch.randn(count, generator=generator) for layer, count in counts(config).items()}
    return config, weights, biases


def counts(config: Config) -> dict[int, int]:
    return experts_by_layer(config.model, config.moe)


def hf_settings(config: Config) -> dict:
    """What config.json holds: megamoe's own names but for `top_k`, which transformers would read as its own."""
    left_out = {"vocab_size", "vocab_size_multiple", "attention_dropout", "hidden_dropout", "init", "init_std"}
    routing = {
        "num_experts", "num_experts_by_layer", "layer_pattern", "expert_ffn_hidden_size",
        "shared_expert_ffn_hidden_size", "shared_expert_mix", "score_function", "gate_order", "normalize_gates",
        "routed_scaling_factor", "num_expert_groups", "num_selected_groups", "balance_bias_update_rate",
    }  # fmt: skip
    return {
        **config.model.model_dump(mode="json", exclude=left_out),
        **config.moe.model_dump(mode="json", include=routing),
        "num_experts_per_tok": config.moe.top_k,
        "vocab_size": padded_vocab_size(config.model),
    }


def hf_weights(config: Config, ours: dict[str, Tensor], biases: dict[int, Tensor]) -> dict[str, Tensor]:
    """Weights by transformers' names."""
    sizes, theirs = dimensions(config.model, config.moe), {}

    def give(name: str, tensor: Tensor) -> None:
        theirs[name] = tensor.clone().contiguous()

    def feed_forward(name: str, source: str, expert: int | None = None) -> None:
        for ending in ("weight", "bias"):
            if f"{source}.fc1.{ending}" not in ours:
                continue
            first, second = ours[f"{source}.fc1.{ending}"], ours[f"{source}.fc2.{ending}"]
            if expert is not None:
                first, second = first[expert], second[expert]
            if config.model.activation == "swiglu":
                give(f"{name}.gate_proj.{ending}", first[0])
                give(f"{name}.up_proj.{ending}", first[1])
                give(f"{name}.down_proj.{ending}", second)
            else:
                give(f"{name}.fc1.{ending}", first)
                give(f"{name}.fc2.{ending}", second)

    give("model.embed_tokens.weight", ours["embedding.weight"])
    if not config.model.tie_embeddings:
        give("lm_head.weight", ours["output.weight"])
    for source, name in norm_names(config).items():
        for ending in ("weight", "bias"):
            if f"{source}.{ending}" in ours:
                give(f"{name}.{ending}", ours[f"{source}.{ending}"])
    for i in range(config.model.num_layers):
        source, name = f"layers.{i}", f"model.layers.{i}"
        per_group = sizes.heads // sizes.query_groups
        for ending in ("weight", "bias"):
            if f"{source}.attention.qkv.{ending}" not in ours:
                continue
            rows = ours[f"{source}.attention.qkv.{ending}"]
            rows = rows.view(sizes.query_groups, per_group + 2, sizes.head_dim, *rows.shape[1:])
            give(f"{name}.self_attn.q_proj.{ending}", rows[:, :per_group].flatten(0, 2))
            give(f"{name}.self_attn.k_proj.{ending}", rows[:, per_group].flatten(0, 1))
            give(f"{name}.self_attn.v_proj.{ending}", rows[:, per_group + 1].flatten(0, 1))
            give(f"{name}.self_attn.out_proj.{ending}", ours[f"{source}.attention.out.{ending}"])
        if i not in counts(config):
            feed_forward(f"{name}.mlp", f"{source}.ffn")
            continue
        give(f"{name}.mlp.gate.weight", ours[f"{source}.router.weight"])
        if i in biases:
            give(f"{name}.mlp.gate.balance_bias", biases[i])
        for e in range(counts(config)[i]):
            feed_forward(f"{name}.mlp.experts.{e}", f"{source}.experts", e)
        if config.moe.shared_expert_ffn_hidden_size:
            feed_forward(f"{name}.mlp.shared_expert", f"{source}.shared_expert")
        for ending in ("weight", "bias"):
            if f"{source}.shared_expert_mix.{ending}" in ours:
                give(f"{name}.mlp.shared_expert_mix.{ending}", ours[f"{source}.shared_expert_mix.{ending}"])
    return theirs


def norm_names(config: Config) -> dict[str, str]:
    names = {"final_norm": "model.layer_norm"}
    for i in range(config.model.num_layers):
        names[f"layers.{i}.attention_norm"] = f"model.layers.{i}.self_attn_layer_norm"
        names[f"layers.{i}.ffn_norm"] = f"model.layers.{i}.final_layer_norm"
        names[f"layers.{i}.attention.q_norm"] = f"model.layers.{i}.self_attn.q_norm"
        names[f"layers.{i}.attention.k_norm"] = f"model.layers.{i}.self_attn.k_norm"
    return names
