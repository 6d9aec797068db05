"""What Megatron-DeepSpeed's arguments mean to megamoe: a Config, or a refusal by name.

Defaults are those of megatron/arguments.py, for the arguments that older checkpoints do not have.
"""

from collections.abc import Mapping
from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.from_args import Settings, valid_config, vocabulary
from megamoe.errors import ConversionError

_OFF = (False, 0, 0.0)
_MUST_BE_OFF = {
    "apply_residual_connection_post_layernorm": "the residual is taken before the norm",
    "apply_layernorm_1p": "norms multiply by their weight, not by one more",
    "squared_relu": "activations are gelu, gelu_tanh and swiglu",
    "num_experts_switch": "experts are DeepSpeed's, not those of Megatron's SwitchMLP",
    "embed_layernorm": "there is no norm after the embedding",
    "multi_query_attention": "query groups are set by num_key_value_heads",
}
EMBEDDING = "language_model.embedding.word_embeddings.weight"


def refuse_inexpressible(settings: Settings) -> None:
    """Raises ConversionError for an argument that makes a function which megamoe does not have."""
    for name, reason in _MUST_BE_OFF.items():
        settings.refuse(name, _OFF, reason)
    settings.refuse("normalization", ("layernorm", "LayerNorm", "rmsnorm", "RMSNorm"), "norms are layernorm or rmsnorm")
    settings.refuse("rotary_percent", (1.0,), "all of a head is rotated")
    settings.refuse("mlp_type", ("standard", "residual"), "the FFN beside the experts is a residual one or none")
    settings.refuse("glu_activation", (), "activations are gelu, gelu_tanh and swiglu")
    settings.refuse("position_embedding_type", ("rope", "rotary"), "positions are rotations")
    if not settings.get("use_rotary_position_embeddings", False):
        raise ConversionError(
            f"{settings.where} has learned positions (use_rotary_position_embeddings is off), which megamoe cannot "
            "express: it has sinusoids and rotations"
        )


def experts_of_layers(settings: Settings) -> dict[int, int]:
    """0-based MoE layer -> its experts: every expert_interval-th, with one number for all or one for each."""
    numbers, interval = settings.get("num_experts", [1]), settings.get("expert_interval", 2)
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    num_layers = settings.need("num_layers", int)
    layers = [i for i in range(num_layers) if (i + 1) % interval == 0]
    if len(numbers) == 1:
        numbers = numbers * len(layers)
    if len(numbers) != len(layers):
        raise ConversionError(f"{settings.where} has num_experts {numbers} for the {len(layers)} layers {layers}")
    return {layer: number for layer, number in zip(layers, numbers, strict=True) if number > 1}


def config_of(
    settings: Settings, shapes: Mapping[str, tuple[int, ...]], tensor: int, vocab_multiple: int | None
) -> Config:
    """The model and its routing."""
    if len(shapes.get(f"tp0/{EMBEDDING}", ())) != 2:
        raise ConversionError(f"{settings.where} belongs to tensors without {EMBEDDING}")
    num_rows, heads = shapes[f"tp0/{EMBEDDING}"][0] * tensor, settings.need("num_attention_heads", int)
    if settings.get("padded_vocab_size", num_rows) != num_rows:
        raise ConversionError(
            f"{settings.where} has padded_vocab_size {settings.values['padded_vocab_size']}, the embeddings {num_rows}"
        )
    norm = settings.get("normalization", "layernorm").lower()
    model = {
        "num_layers": settings.need("num_layers", int),
        "hidden_size": settings.need("hidden_size", int),
        "ffn_hidden_size": settings.get("ffn_hidden_size", None),
        "num_attention_heads": heads,
        "num_query_groups": settings.get("num_key_value_heads", heads),
        "head_dim": settings.get("kv_channels", None),
        **vocabulary(num_rows, vocab_multiple),
        "seq_length": settings.get("seq_length", settings.get("max_position_embeddings", 1024)),
        "normalization": norm,
        "norm_epsilon": settings.get("layernorm_epsilon", 1e-5),
        "activation": _activation(settings),
        "position_embedding": "rope",
        "rope_base": float(settings.get("rotary_position_embeddings_theta", 10_000)),
        "use_bias": bool(settings.get("add_bias_linear", True)),
        "tie_embeddings": not settings.get("untie_embeddings_and_output_weights", False),
        "scale_embeddings": False,
        "init": "normal",
        "init_std": settings.get("init_method_std", 0.02),
        "hidden_dropout": settings.get("hidden_dropout", 0.1),
        "attention_dropout": settings.get("attention_dropout", 0.1),
    }
    return valid_config({"model": model, "moe": _moe(settings)}, settings.where)


def qkv_order(settings: Settings) -> str:
    """How the rows of a rank's query_key_value lie: "head" (per query group: queries, key, value), "part" (all
    queries, all keys, all values) or "inner" (for each head and row of it: query, key, value).

    By the checkpoint's version, but for one trap: since December 2024 Megatron-DeepSpeed reads and trains parts under
    the version of before. It then has the argument ds_sequence_parallel_fpdt, which tells.
    """
    version = settings.get("checkpoint_version", 0)
    orders = {0: "part", 1: "inner", 2: "head", 3: "head"}
    if version not in orders:
        raise ConversionError(f"{settings.where} has checkpoint_version {version!r}: use one of 0, 1, 2, 3")
    order = "part" if "ds_sequence_parallel_fpdt" in settings.values else orders[version]
    heads = settings.need("num_attention_heads", int)
    if order != "head" and settings.get("num_key_value_heads", heads) != heads:
        raise ConversionError(f"{settings.where} has num_key_value_heads with rows by {order}, which nothing trains so")
    return order


def training_notes(settings: Settings) -> list[str]:
    """What DeepSpeed's gate does that megamoe's does not."""
    if not experts_of_layers(settings):
        return []
    notes = [f"moe_min_capacity {settings.get('moe_min_capacity', 4)} of DeepSpeed's gate has no counterpart"]
    if settings.get("topk", 1) == 1:
        notes.append("DeepSpeed's top-1 gate drops random tokens over capacity (use_rts), megamoe the later ones")
    elif settings.get("moe_top2_2nd_expert_sampling", True):
        notes.append("DeepSpeed's gate draws the second expert with noise: megamoe takes the two best")
    return notes


def _activation(settings: Settings) -> str:
    """Megatron's fused gelu, which is on by default, is the tanh approximation."""
    if settings.get("swiglu", False):
        return "swiglu"
    if settings.get("openai_gelu", False):
        return "gelu_tanh"
    fused = settings.get("bias_gelu_fusion", True) and settings.get("add_bias_linear", True)
    return "gelu_tanh" if fused and not settings.get("onnx_safe", False) else "gelu"


def _moe(settings: Settings) -> dict[str, Any]:
    counts, top_k = experts_of_layers(settings), settings.get("topk", 1)
    if not counts:
        return {}
    interval = settings.get("expert_interval", 2)
    numbers = set(counts.values())
    every = [i for i in range(settings.values["num_layers"]) if (i + 1) % interval == 0]
    moe = {
        "num_experts": max(numbers),
        "num_experts_by_layer": None if len(numbers) == 1 else tuple(counts.values()),
        "layer_pattern": interval if list(counts) == every else tuple(counts),
        "top_k": top_k,
        "normalize_gates": top_k > 1,
        "capacity_factor": settings.get("moe_train_capacity_factor", 1.0),
        "eval_capacity_factor": settings.get("moe_eval_capacity_factor", 1.0),
        "drop_policy": "position" if top_k <= 2 else "probability",
        "dropless": not settings.get("moe_token_dropping", True),
        "balance_loss_coeff": settings.get("moe_loss_coeff", 0.1),
    }
    if settings.get("mlp_type", "standard") == "residual":
        ffn = settings.get("ffn_hidden_size", None) or 4 * settings.need("hidden_size", int)
        moe |= {"shared_expert_ffn_hidden_size": ffn, "shared_expert_mix": "residual"}
    return moe
