"""Configuration of the megamoe architecture for transformers 5. The file travels with models: it imports no megamoe.

Names are megamoe's own, from the sections `model` and `moe`, but where transformers has a name that its tools look
for. That name is the real one, and megamoe's (in `attribute_map`, and `top_k`) is understood as well.
"""

from transformers import PreTrainedConfig

CHOICES = {
    "normalization": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "gelu_tanh", "swiglu"),
    "position_embedding": ("sinusoidal", "rope"),
    "qk_norm": ("none", "head", "full"),
    "shared_expert_mix": ("add", "sigmoid_gate", "residual"),
    "score_function": ("softmax", "sigmoid"),
    "gate_order": ("softmax_then_select", "select_then_softmax"),
}


class MegamoeConfig(PreTrainedConfig):
    """A decoder with dense and mixture-of-experts layers; the defaults are the paper's family, dense.

    Raises:
        ValueError: a choice is unknown, or sizes do not fit together.
    """

    model_type = "megamoe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_layers": "num_hidden_layers",
        "num_query_groups": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "seq_length": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    }

    vocab_size: int = 51_200  # rows of the embedding, padding included
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None  # None: one per attention head
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    intermediate_size: int | None = None  # None: 4 * hidden_size
    max_position_embeddings: int = 256  # tokens of context in training
    normalization: str = "layernorm"
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    position_embedding: str = "sinusoidal"
    rope_base: float = 10_000.0
    qk_norm: str = "none"  # head: one RMSNorm for every head; full: over all heads together
    use_bias: bool = True
    tie_word_embeddings: bool = True
    scale_embeddings: bool = True  # token embeddings are multiplied by sqrt(hidden_size)

    num_experts: int = 0  # 0: dense
    num_experts_by_layer: list[int] | None = None  # one for each layer with experts, lowest first
    num_experts_per_tok: int = 2  # megamoe's top_k, which transformers would take for a setting of sampling
    layer_pattern: int | list[int] = 2  # period p: experts where (i + 1) % p == 0; or the 0-based layers
    expert_ffn_hidden_size: int | None = None  # None: intermediate_size
    shared_expert_ffn_hidden_size: int | None = None  # None: there is no shared expert
    shared_expert_mix: str = "add"
    score_function: str = "softmax"
    gate_order: str = "softmax_then_select"
    normalize_gates: bool = True
    routed_scaling_factor: float = 1.0
    num_expert_groups: int | None = None
    num_selected_groups: int | None = None
    balance_bias_update_rate: float = 0.0  # above 0: routers have a selection bias; only training moves it

    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        top_k = kwargs.pop("top_k", None)
        super().__post_init__(**kwargs)
        if top_k is not None:
            self.num_experts_per_tok = top_k
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.expert_ffn_hidden_size = self.expert_ffn_hidden_size or self.intermediate_size
        self._check()

    def experts_by_layer(self) -> dict[int, int]:
        """0-based layer -> its number of experts, for the layers that hold any."""
        if not self.num_experts:
            return {}
        pattern = self.layer_pattern
        if isinstance(pattern, int):
            pattern = [i for i in range(self.num_hidden_layers) if (i + 1) % pattern == 0]
        layers = sorted(set(pattern))
        counts = self.num_experts_by_layer or [self.num_experts] * len(layers)
        if len(counts) != len(layers):
            raise ValueError(f"num_experts_by_layer has {len(counts)} entries for {len(layers)} layers with experts")
        return dict(zip(layers, counts, strict=True))

    def _check(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}: use {', '.join(valid)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )
        for layer, count in self.experts_by_layer().items():
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"layer_pattern names layer {layer}, but num_hidden_layers is {self.num_hidden_layers}"
                )
            if count < self.num_experts_per_tok:
                raise ValueError(f"layer {layer} has {count} experts, fewer than num_experts_per_tok")
            if self.num_expert_groups and count % self.num_expert_groups:
                raise ValueError(f"num_expert_groups {self.num_expert_groups} does not divide {count} experts")


__all__ = ["MegamoeConfig"]
