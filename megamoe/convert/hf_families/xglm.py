"""XGLMForCausalLM: the paper's dense models. Positions are fairseq's sinusoids, counted from 2, as ours."""

from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.hf_families.family import Family, Tree
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.names import XGLM as NAMES
from megamoe.topology.parameters import dimensions

_EPSILON = 1e-5  # of its layer norms: no key says another
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_DEFAULTS = {
    "vocab_size": 256_008,
    "max_position_embeddings": 2048,
    "d_model": 1024,
    "ffn_dim": 4096,
    "num_layers": 24,
    "attention_heads": 16,
    "activation_function": "gelu",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "layerdrop": 0.0,
    "init_std": 0.02,
    "scale_embedding": True,
    "tie_word_embeddings": True,
    "pad_token_id": 1,
}


def _read(keys: Keys) -> Tree:
    activation = keys.take("activation_function")
    if activation not in _ACTIVATIONS:
        keys.refuse(f"activation_function {activation!r}", "use gelu or gelu_new")
    # Theirs is zero at the position whose row has the number of the padding token. Rows 0 and 1 are no position's.
    keys.require("pad_token_id", [None, 0, 1], "that class has no position vector in row pad_token_id of its table")
    keys.take("activation_dropout"), keys.take("layerdrop")  # training only: see the notes
    model = {
        "num_layers": keys.take("num_layers", "num_hidden_layers"),
        "hidden_size": keys.take("d_model", "hidden_size"),
        "ffn_hidden_size": keys.take("ffn_dim"),
        "num_attention_heads": keys.take("attention_heads", "num_attention_heads"),
        "seq_length": keys.take("max_position_embeddings"),
        "normalization": "layernorm",
        "norm_epsilon": _EPSILON,
        "activation": _ACTIVATIONS[activation],
        "position_embedding": "sinusoidal",
        "use_bias": True,
        "tie_embeddings": keys.take("tie_word_embeddings"),
        "scale_embeddings": keys.take("scale_embedding"),
        "hidden_dropout": keys.take("dropout"),
        "attention_dropout": keys.take("attention_dropout"),
        "init": "normal",
        "init_std": keys.take("init_std"),
    }
    return {"model": model, "moe": {}}


def _refusals(config: Config) -> list[str]:
    model, sizes = config.model, dimensions(config.model, config.moe)
    found = []
    if config.moe.num_experts:
        found.append(f"moe.num_experts {config.moe.num_experts}: it has no experts")
    if model.normalization != "layernorm":
        found.append(f"model.normalization {model.normalization}: it has layernorm")
    elif model.norm_epsilon != _EPSILON:
        found.append(f"model.norm_epsilon {model.norm_epsilon:g}: its layer norms have {_EPSILON:g}")
    if model.activation == "swiglu":
        found.append("model.activation swiglu: it has gelu or gelu_tanh")
    if model.position_embedding != "sinusoidal":
        found.append(f"model.position_embedding {model.position_embedding}: it has sinusoidal")
    if model.qk_norm != "none":
        found.append(f"model.qk_norm {model.qk_norm}: it has no norms of queries and keys")
    if not model.use_bias:
        found.append("model.use_bias false: its linear layers have biases")
    if sizes.query_groups != sizes.heads:
        found.append(f"model.num_query_groups {sizes.query_groups}: it has one key and value head per query head")
    if sizes.head_dim * sizes.heads != sizes.hidden:
        found.append(f"model.head_dim {sizes.head_dim}: its heads share out hidden_size {sizes.hidden}")
    return found


def _write(config: Config) -> dict[str, Any]:
    model, sizes = config.model, dimensions(config.model, config.moe)
    return {
        "max_position_embeddings": model.seq_length,
        "d_model": sizes.hidden,
        "ffn_dim": sizes.ffn,
        "num_layers": model.num_layers,
        "attention_heads": sizes.heads,
        "activation_function": {"gelu": "gelu", "gelu_tanh": "gelu_new"}[model.activation],
        "dropout": model.hidden_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "init_std": model.init_std,
        "scale_embedding": model.scale_embeddings,
        "add_cross_attention": False,
        "tie_word_embeddings": model.tie_embeddings,
    }


FAMILY = Family(
    "XGLMForCausalLM", "xglm", _DEFAULTS, lambda config: NAMES, _read, _refusals, _write,
    trained={"model.hidden_dropout": "dropout", "model.attention_dropout": "attention_dropout"},
    has_classifier=False,
)  # fmt: skip
