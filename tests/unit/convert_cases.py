"""Tiny random models made by transformers, set up in all ways that matter, and what moves tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from megamoe.checkpoint.slices import Box
from megamoe.config.schema import Config
from megamoe.convert.links import WEIGHT, Conversion, Ours

VOCAB, HIDDEN, HEADS, FFN, EXPERTS, SEQ, LAYERS = 96, 32, 4, 48, 4, 16, 4
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": SEQ,
    "bos_token_id": 3, "eos_token_id": 4, "pad_token_id": 5, "attn_implementation": "eager",
}  # fmt: skip
_EXPERTS = {"num_experts": EXPERTS, "num_experts_per_tok": 2}
_ERNIE = {
    "moe_num_experts": EXPERTS, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 0,
}  # fmt: skip
_XGLM = {
    "vocab_size": VOCAB, "d_model": HIDDEN, "ffn_dim": FFN, "num_layers": LAYERS, "attention_heads": HEADS,
    "max_position_embeddings": SEQ, "attn_implementation": "eager",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """The class by the beginning of its name, and the settings of its configuration."""

    kind: str
    settings: Mapping[str, Any]

    @property
    def config_class(self) -> type:
        return getattr(transformers, f"{self.kind}Config")

    def build(self) -> torch.nn.Module:
        """Every weight random, norms off 1 and biases off 0; the bias that must be zero stays so."""
        torch.manual_seed(7)
        model = getattr(transformers, f"{self.kind}ForCausalLM")(self.config_class(**self.settings)).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "e_score_correction_bias" not in name:
                    p.copy_(torch.randn(p.shape) * 0.15 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        return model


CASES = {
    "llama": Case("Llama", _COMMON),
    "llama, tied": Case("Llama", {**_COMMON, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "llama, biases": Case("Llama", {**_COMMON, "attention_bias": True, "mlp_bias": True}),
    "llama, one group": Case("Llama", {**_COMMON, "num_key_value_heads": 1, "head_dim": 16}),
    "llama, all groups": Case("Llama", {**_COMMON, "num_key_value_heads": HEADS}),
    "qwen3": Case("Qwen3", {**_COMMON, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen3, tied": Case("Qwen3", {**_COMMON, "head_dim": 8, "tie_word_embeddings": True}),
    "mixtral": Case("Mixtral", {**_COMMON, "num_local_experts": EXPERTS, "router_aux_loss_coef": 0.02}),
    "mixtral, three of six": Case(
        "Mixtral", {**_COMMON, "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16}
    ),
    "olmoe": Case("Olmoe", {**_COMMON, **_EXPERTS, "num_key_value_heads": HEADS}),
    "olmoe, groups": Case("Olmoe", {**_COMMON, **_EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "olmoe, one expert": Case("Olmoe", {**_COMMON, **_EXPERTS, "num_experts_per_tok": 1}),
    "qwen3 moe": Case(
        "Qwen3Moe", {**_COMMON, **_EXPERTS, "moe_intermediate_size": 24, "decoder_sparse_step": 2, "head_dim": 16}
    ),
    "qwen3 moe, listed": Case(
        "Qwen3Moe",
        {**_COMMON, **_EXPERTS, "moe_intermediate_size": 24, "mlp_only_layers": [1, 2], "norm_topk_prob": True},
    ),
    "ernie": Case("Ernie4_5_Moe", {**_COMMON, **_ERNIE, "moe_layer_interval": 2}),
    "ernie, shared": Case("Ernie4_5_Moe", {**_COMMON, **_ERNIE, "moe_num_shared_experts": 2, "head_dim": 16}),
    "ernie, range": Case(
        "Ernie4_5_Moe",
        {**_COMMON, **_ERNIE, "moe_layer_start_index": 1, "moe_layer_end_index": 2, "tie_word_embeddings": False},
    ),
    "xglm": Case("XGLM", _XGLM),
    "xglm, unlike the paper": Case(
        "XGLM", {**_XGLM, "scale_embedding": False, "tie_word_embeddings": False, "activation_function": "gelu_new"}
    ),
}

Arrays = dict[str, np.ndarray]
OurArrays = dict[Ours, np.ndarray]


def at(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in box)


def to_ours(table: Conversion, theirs: Mapping[str, np.ndarray]) -> OurArrays:
    """Every tensor of ours from theirs, element by element of every link; NaN where nothing was moved."""
    ours = {key: np.full(shape, np.nan, np.float32) for key, shape in table.ours.items()}
    for link in table.links:
        ours[link.ours][at(link.our_box)] = link.to_ours(theirs[link.theirs][at(link.their_box)])
    for padding in table.paddings:
        ours[padding.ours][at(padding.our_box)] = 0.0
    return ours


def to_theirs(table: Conversion, ours: Mapping[Ours, np.ndarray]) -> Arrays:
    """The inverse of `to_ours`."""
    theirs = {name: np.full(shape, np.nan, np.float32) for name, shape in table.theirs.items()}
    for link in table.links:
        theirs[link.theirs][at(link.their_box)] = link.to_theirs(ours[link.ours][at(link.our_box)])
    for constant in table.constants:
        theirs[constant.theirs][:] = constant.value
    for duplicate in table.duplicates:
        theirs[duplicate.theirs][:] = theirs[duplicate.original]
    return theirs


def as_weights(ours: Mapping[Ours, np.ndarray]) -> dict[str, torch.Tensor]:
    """The weights by name, as the plain reference takes them."""
    return {name: torch.from_numpy(values) for (kind, name), values in ours.items() if kind == WEIGHT}


def random_ours(table: Conversion, seed: int = 5) -> OurArrays:
    generator = np.random.default_rng(seed)
    return {key: generator.normal(size=shape).astype(np.float32) for key, shape in table.ours.items()}


def tokens(num_sequences: int = 3) -> torch.Tensor:
    return torch.randint(0, VOCAB, (num_sequences, SEQ), generator=torch.Generator().manual_seed(3))


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    tree = config.model_dump()
    for section, changes in sections.items():
        tree[section] |= changes
    return Config.model_validate(tree)
