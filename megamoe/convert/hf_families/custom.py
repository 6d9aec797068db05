"""MegamoeForCausalLM, the class that megamoe ships: everything that a configuration can express with drops off.

config.json holds megamoe's own keys, flat: those of the sections `model` and `moe` that say what the model computes,
with every `null` that means a size resolved, and layer_pattern as the list of 0-based layers with experts. Beside them
stand the names that transformers itself looks for; they repeat the others.
"""

from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.custom_code import AUTO_MAP
from megamoe.convert.hf_families.family import Family, Tree, pattern_of
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.names import custom_names
from megamoe.topology.parameters import dimensions, moe_layers

ARCHITECTURE, MODEL_TYPE = "MegamoeForCausalLM", "megamoe"
# Besides vocab_size, which is the padded number of rows.
MODEL_KEYS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim",
    "seq_length", "normalization", "norm_epsilon", "activation", "position_embedding", "rope_base", "qk_norm",
    "use_bias", "tie_embeddings", "scale_embeddings",
)  # fmt: skip
MOE_KEYS = (
    "num_experts", "num_experts_by_layer", "top_k", "layer_pattern", "expert_ffn_hidden_size",
    "shared_expert_ffn_hidden_size", "shared_expert_mix", "score_function", "gate_order", "normalize_gates",
    "routed_scaling_factor", "num_expert_groups", "num_selected_groups", "balance_bias_update_rate",
)  # fmt: skip
# The names that transformers looks for -> the key of ours that each repeats.
USUAL_KEYS = {
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_query_groups",
    "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "seq_length",
    "tie_word_embeddings": "tie_embeddings",
}
_TOP_K = "num_experts_per_tok"  # as transformers writes it: by the name top_k it would be a setting of sampling
_ALIASES = {ours: usual for usual, ours in USUAL_KEYS.items()} | {"top_k": _TOP_K}


def _write(config: Config) -> dict[str, Any]:
    model, moe = config.model, config.moe
    sizes = dimensions(model, moe)
    keys = {key: getattr(model, key) for key in MODEL_KEYS} | {key: getattr(moe, key) for key in MOE_KEYS}
    keys |= {
        "ffn_hidden_size": sizes.ffn,
        "num_query_groups": sizes.query_groups,
        "head_dim": sizes.head_dim,
        "expert_ffn_hidden_size": sizes.expert_ffn,
        "layer_pattern": list(moe_layers(model, moe)),
        "num_experts_by_layer": None if moe.num_experts_by_layer is None else list(moe.num_experts_by_layer),
    }
    keys[_TOP_K] = keys.pop("top_k")
    return keys | {usual: keys[ours] for usual, ours in USUAL_KEYS.items()} | {"auto_map": dict(AUTO_MAP)}


def _read(keys: Keys) -> Tree:
    model, moe = (
        {key: keys.take(key, *([_ALIASES[key]] if key in _ALIASES else [])) for key in wanted}
        for wanted in (MODEL_KEYS, MOE_KEYS)
    )
    heads, hidden, ffn = model["num_attention_heads"], model["hidden_size"], model["ffn_hidden_size"]
    if model["num_query_groups"] == heads:
        model["num_query_groups"] = None
    if model["head_dim"] is not None and model["head_dim"] * heads == hidden:
        model["head_dim"] = None
    if ffn == 4 * hidden:
        model["ffn_hidden_size"] = None
    if moe["expert_ffn_hidden_size"] == ffn:
        moe["expert_ffn_hidden_size"] = None
    if not moe["num_experts"]:
        return {"model": model, "moe": {}}
    pattern = moe["layer_pattern"]
    if not isinstance(pattern, int):
        moe["layer_pattern"] = pattern_of(tuple(sorted(pattern)), model["num_layers"])
    return {"model": model, "moe": {**moe, "dropless": True}}


FAMILY = Family(
    ARCHITECTURE, MODEL_TYPE, {}, lambda config: custom_names(config.model.activation == "swiglu"),
    _read, lambda config: [], _write, keeps_gate_order=True,
)  # fmt: skip
