"""What a Hugging Face class calls its tensors on disk, and how its heads are turned: data, read by `tensors`.

Names of a layer stand without `model.layers.N.`; those of weights and biases without `.weight` and `.bias`. Experts
are stored one by one under the names that the hub uses, which is what save_pretrained writes, too; or stacked, as
save_pretrained(save_original_format=False) writes them. Source: transformers 5.23, the modelling files and
conversion_mapping.py.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class FfnNames:
    """The linear layers of one FFN. `gate` is None where the activation has no gate."""

    gate: str | None
    up: str  # the linear half, or fc1 where there is no gate
    down: str

    def under(self, prefix: str) -> "FfnNames":
        return FfnNames(None if self.gate is None else prefix + self.gate, prefix + self.up, prefix + self.down)


@dataclass(frozen=True)
class StackedNames:
    """One tensor for all experts of a layer: [E, 2 * f, h], gate rows first, and [E, h, f]."""

    router: str
    gate_up: str
    down: str
    zero_bias: str | None = None


@dataclass(frozen=True)
class Names:
    """One class. `zero_bias` [1, E] is added to the routers' scores; what we can express has zeros there."""

    ffn: FfnNames
    experts: FfnNames | None = None  # {expert} stands for the expert's number
    shared: FfnNames | None = None
    router: str = "mlp.gate"
    zero_bias: str | None = None
    shared_mix: str | None = None
    balance_bias: str | None = None
    stacked: StackedNames | None = None
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention_out: str = "self_attn.o_proj"
    final_norm: str = "model.norm"
    embedding: str = "model.embed_tokens.weight"
    output: str = "lm_head.weight"
    head: str = "score.weight"  # of a classifier
    interleaved_rope: bool = False  # pairs (2i, 2i + 1) turn together; ours are (i, i + head_dim / 2)


GATED = FfnNames("gate_proj", "up_proj", "down_proj")
PLAIN = FfnNames(None, "fc1", "fc2")
STACKED = StackedNames("mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")

LLAMA = Names(ffn=GATED.under("mlp."))
QWEN_MOE = replace(LLAMA, experts=GATED.under("mlp.experts.{expert}."), stacked=STACKED)
MIXTRAL = Names(
    ffn=GATED.under("mlp."),  # no layer has one
    experts=FfnNames("w1", "w3", "w2").under("block_sparse_moe.experts.{expert}."),
    router="block_sparse_moe.gate",
    stacked=STACKED,
)
ERNIE_MOE = replace(
    QWEN_MOE,
    shared=GATED.under("mlp.shared_experts."),
    zero_bias="mlp.moe_statics.e_score_correction_bias",
    stacked=replace(STACKED, zero_bias="mlp.gate.moe_statics.e_score_correction_bias"),
    interleaved_rope=True,
)
XGLM = Names(
    ffn=PLAIN,
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    attention_out="self_attn.out_proj",
    final_norm="model.layer_norm",
)


def custom_names(gated: bool) -> Names:
    """The class whose modelling file megamoe ships."""
    ffn = GATED if gated else PLAIN
    return replace(
        XGLM,
        ffn=ffn.under("mlp."),
        experts=ffn.under("mlp.experts.{expert}."),
        shared=ffn.under("mlp.shared_expert."),
        shared_mix="mlp.shared_expert_mix",
        balance_bias="mlp.gate.balance_bias",
    )
