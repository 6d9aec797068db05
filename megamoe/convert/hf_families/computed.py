"""What a configuration computes in evaluation with drops off: two that agree here are the same function of weights.

Settings that mean the same get the same value, and settings that mean nothing to the model are left out. The
vocabulary and the sequence length are not here: the one is compared with the rows of the tables, the other bounds
what the model is used for and changes nothing it computes.
"""

from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.hf_families.family import normalizes
from megamoe.topology.parameters import dimensions, experts_by_layer


def computed(config: Config) -> dict[str, Any]:
    """Settings of the function, by the name that a message gives them."""
    model, moe = config.model, config.moe
    sizes, experts = dimensions(model, moe), experts_by_layer(model, moe)
    settings: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": sizes.hidden,
        "num_attention_heads": sizes.heads,
        "num_query_groups": sizes.query_groups,
        "head_dim": sizes.head_dim,
        "normalization": model.normalization,
        "norm_epsilon": model.norm_epsilon,
        "activation": model.activation,
        "position_embedding": model.position_embedding,
        "qk_norm": model.qk_norm,
        "use_bias": model.use_bias,
        "num_labels": model.num_labels,
        "tie_embeddings": model.tie_embeddings and not model.num_labels,  # a classifier has no output matrix
        "scale_embeddings": model.scale_embeddings,
        "experts of each MoE layer": experts,
    }
    if model.position_embedding == "rope":
        settings["rope_base"] = model.rope_base
    if len(experts) < model.num_layers:
        settings["ffn_hidden_size"] = sizes.ffn
    if experts:
        settings |= {
            "top_k": moe.top_k,
            "expert_ffn_hidden_size": sizes.expert_ffn,
            "shared_expert_ffn_hidden_size": sizes.shared_expert_ffn,
            "score_function": moe.score_function,
            "normalize_gates": normalizes(moe),
            "routed_scaling_factor": moe.routed_scaling_factor,
            "balance bias": moe.balance_bias_update_rate > 0,
        }
        if sizes.shared_expert_ffn is not None:
            settings["shared_expert_mix"] = moe.shared_expert_mix
        if moe.num_expert_groups is not None and moe.num_selected_groups != moe.num_expert_groups:
            settings["num_expert_groups"] = moe.num_expert_groups
            settings["num_selected_groups"] = moe.num_selected_groups
    return settings


def differences(one: Config, other: Config) -> list[str]:
    """One clause for each setting of the function in which two configurations differ."""
    left, right = computed(one), computed(other)
    return [
        f"{key} is {left.get(key)!r} here and {right.get(key)!r} there"
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]
