"""What fairseq's settings mean to megamoe: a Config from their names and the shapes, or a refusal by name.

Defaults are those of fairseq's `moe` branch (models/transformer_lm.py), which a checkpoint need not repeat.
"""

import re
from collections.abc import Mapping
from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.from_args import Settings, valid_config, vocabulary
from megamoe.errors import ConversionError

SHARED_ONLY = re.compile(r"\.experts\.\d+\.")
_ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_OFF = (False, 0, 0.0, "")
_MUST_BE_OFF = {
    "decoder_learned_pos": "positions are sinusoids or rotations, never learned",
    "no_token_positional_embeddings": "there are always positions",
    "layernorm_embedding": "there is no norm after the embedding",
    "use_stable_embedding": "there is no norm after the embedding",
    "no_decoder_final_norm": "there is always a norm after the last layer",
    "character_embeddings": "the input is tokens",
    "adaptive_input": "every token has an embedding of the full size",
    "adaptive_softmax_cutoff": "the softmax is over all tokens at once",
    "base_layers": "there are no BASE layers",
    "alternate_decoder_ffn_embed_dim": "the dense layers have one FFN size",
    "cross_self_attention": "there is no encoder",
    "decoder_layers_to_keep": "convert the model with the layers it was trained with",
    "moe_batch_prioritized_routing": "tokens are kept by position or by their gate, not in fairseq's mixed order",
}


def settings_of(content: Any, path: str, overrides: Mapping[str, Any] | None) -> Settings:
    """The model's settings: cfg["model"] as fairseq writes it now, or `args` of older files.

    Those of the criterion join under `criterion.NAME`. Raises ConversionError where there are none.
    """
    content = content if isinstance(content, Mapping) else {}
    cfg, args = content.get("cfg"), content.get("args")
    if isinstance(cfg, Mapping) and cfg.get("model") is not None:
        settings = Settings(cfg["model"], f"{path}, cfg.model,", overrides)
        if isinstance(cfg.get("criterion"), Mapping):
            settings.values |= {f"criterion.{key}": value for key, value in cfg["criterion"].items()}
        return settings
    if args is None:
        raise ConversionError(f"{path} has neither cfg nor args: the number of heads cannot be told without")
    settings = Settings(args, f"{path}, args,", overrides)
    settings.values |= {f"criterion.{key}": value for key, value in settings.values.items()}
    return settings


def refuse_inexpressible(settings: Settings) -> None:
    """Raises ConversionError for a setting that changes the function into one that megamoe does not have."""
    for name, reason in _MUST_BE_OFF.items():
        settings.refuse(name, _OFF, reason)
    settings.refuse("decoder_normalize_before", (True,), "norms come before attention and FFN")
    width = settings.need("decoder_embed_dim", int)
    for name in ("decoder_input_dim", "decoder_output_dim"):
        settings.refuse(name, (width,), "the embedding has the width of the layers")
    activation = settings.get("activation_fn", "relu")
    if activation not in _ACTIVATIONS:
        raise ConversionError(
            f"{settings.where} has activation_fn {activation!r}, which megamoe cannot express: it has "
            f"{', '.join(_ACTIVATIONS)}"
        )


def config_of(settings: Settings, shapes: Mapping[str, tuple[int, ...]], vocab_multiple: int | None) -> Config:
    """The model and its routing. Sizes are those of the tensors; raises ConversionError where a setting differs."""
    if len(shapes.get("embed_tokens.weight", ())) != 2:
        raise ConversionError(f"{settings.where} belongs to tensors without embed_tokens.weight")
    num_rows, width = shapes["embed_tokens.weight"]
    num_layers = len({int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, shapes) if match})
    _agree(settings, "decoder_embed_dim", width)
    _agree(settings, "decoder_layers", num_layers)
    ffn = settings.get("decoder_ffn_embed_dim", 2048)
    model = {
        "num_layers": num_layers,
        "hidden_size": width,
        "ffn_hidden_size": ffn,
        "num_attention_heads": settings.need("decoder_attention_heads", int),
        **vocabulary(num_rows, vocab_multiple),
        "seq_length": settings.get("max_target_positions", settings.get("tokens_per_sample", 1024)),
        "activation": _ACTIVATIONS[settings.get("activation_fn", "relu")],
        "tie_embeddings": bool(settings.get("share_decoder_input_output_embed", False)),
        "scale_embeddings": not settings.get("no_scale_embedding", False),
        "hidden_dropout": settings.get("dropout", 0.1),
        "attention_dropout": settings.get("attention_dropout", 0.0),
    }
    return valid_config({"model": model, "moe": _moe(settings, shapes, num_layers)}, settings.where)


def training_notes(settings: Settings) -> list[str]:
    """What fairseq did that evaluation by megamoe does not, or that the file leaves open."""
    notes = []
    if settings.get("activation_fn", "relu") == "gelu":
        notes.append(
            "activation_fn gelu is taken as the exact one; where Megatron's fused kernel was installed fairseq used "
            "the tanh approximation: for that say activation_fn gelu_accurate"
        )
    if settings.get("moe_freq", 0) > 0:
        policy = settings.get("moe_second_expert_policy", "sampling")
        if policy != "all" and not settings.get("moe_top1_expert", False):
            notes.append(f"moe_second_expert_policy {policy} is random in fairseq: megamoe takes the two best experts")
        if not settings.get("moe_gating_use_fp32", False):
            notes.append("moe_gating_use_fp32 was off: megamoe computes the gates in fp32")
    for name in ("activation_dropout", "relu_dropout", "decoder_layerdrop"):
        if settings.get(name, 0.0):
            notes.append(f"{name} {settings.values[name]} was used in training: megamoe has no such dropout")
    return notes


def _moe(settings: Settings, shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> dict[str, Any]:
    period = max(settings.get("moe_freq", 0), settings.get("decoder_moe_freq", 0))
    found = {int(m[1]) for m in map(re.compile(r"layers\.(\d+)\.moe_layer\.").match, shapes) if m}
    expected = {i for i in range(num_layers) if period and (i + 1) % period == 0}
    if found != expected:
        raise ConversionError(
            f"{settings.where} has moe_freq {period}, so experts belong in layers {sorted(expected)}, but they are in "
            f"{sorted(found)}"
        )
    if not expected:
        return {}
    is_top1 = bool(settings.get("moe_top1_expert", False))
    fraction = settings.get("moe_eval_capacity_token_fraction", 0.25)
    before = settings.get("moe_normalize_gate_prob_before_dropping", False)
    moe = {
        "num_experts": settings.need("moe_expert_count", int),
        "top_k": 1 if is_top1 else 2,
        "layer_pattern": period,
        "normalize_gates": not is_top1,  # the one gate of top-1 stays the probability that it is
        "normalize_when": "before_drops" if before else "after_drops",
        "eval_capacity_fraction": fraction if fraction > 0 else None,
    }
    weight = settings.get("criterion.moe_gate_loss_wt", None)
    if weight is not None:  # megamoe sums over layers
        combine = settings.get("criterion.moe_gate_loss_combine_method", "average")
        moe["balance_loss_coeff"] = weight if combine == "sum" else weight / len(expected)
    return moe


def _agree(settings: Settings, name: str, found: int) -> None:
    said = settings.get(name, found)
    if said != found:
        raise ConversionError(f"{settings.where} has {name} {said}, but the tensors have {found}")
