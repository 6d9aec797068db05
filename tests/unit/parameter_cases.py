"""Small models of both families."""

from megamoe.config.schema import ModelConfig

TINY = ModelConfig(num_layers=4, hidden_size=8, num_attention_heads=4, vocab_size=30, vocab_size_multiple=16)
MODERN = ModelConfig(
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=6,
    vocab_size=32,
    vocab_size_multiple=16,
    normalization="rmsnorm",
    activation="swiglu",
    position_embedding="rope",
    qk_norm="full",
    use_bias=False,
    tie_embeddings=False,
    scale_embeddings=False,
    init="normal",
)
