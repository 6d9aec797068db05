"""A small model with the names and the computation of Megatron-DeepSpeed, around DeepSpeed's own MoE layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, HEAD_DIM, FFN, ROWS, LAYERS, EXPERTS = 16, 4, 4, 24, 48, 4, 4
ARGS = {
    "num_layers": LAYERS, "hidden_size": D, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "kv_channels": HEAD_DIM, "num_key_value_heads": HEADS, "padded_vocab_size": ROWS, "seq_length": 12,
    "max_position_embeddings": 12, "use_rotary_position_embeddings": True, "rotary_percent": 1.0,
    "rotary_position_embeddings_theta": 500, "normalization": "layernorm", "layernorm_epsilon": 1e-5, "swiglu": False,
    "openai_gelu": False, "onnx_safe": False, "bias_gelu_fusion": True, "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False, "num_experts": [EXPERTS], "expert_interval": 2, "topk": 2,
    "mlp_type": "residual", "moe_token_dropping": False, "moe_top2_2nd_expert_sampling": False,
    "enable_expert_tensor_parallelism": False, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(D, FFN), nn.Linear(FFN, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


def turned(x: Tensor, theta: float) -> Tensor:
    """x [s, b, heads, head_dim]: the halves of a head rotate against each other."""
    rates = 1.0 / theta ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    angles = torch.outer(torch.arange(x.shape[0]).float(), rates)
    angles = torch.cat([angles, angles], -1)[:, None, None]
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        s, b, _ = x.shape
        q, k, v = self.query_key_value(x).view(s, b, HEADS, 3 * HEAD_DIM).chunk(3, -1)
        q, k = turned(q, 500), turned(k, 500)
        scores = torch.einsum("sbhd,tbhd->bhst", q, k) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), -torch.inf).softmax(-1)
        return self.dense(torch.einsum("bhst,tbhd->sbhd", scores, v).flatten(2))


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.self_attention, self.mlp = Attention(), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        out = self.mlp(self.post_attention_layernorm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


class Model(nn.Module):
    def __init__(self, expert_parallel_size: int, *, residual: bool) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        def moe() -> nn.Module:
            return MoE(
                D, Mlp(), EXPERTS, expert_parallel_size, k=2, drop_tokens=False, use_residual=residual,
                top2_2nd_expert_sampling=False,
            )  # fmt: skip

        language_model = self.language_model = nn.Module()
        language_model.embedding = nn.Module()
        language_model.embedding.word_embeddings = nn.Embedding(ROWS, D)
        language_model.encoder = nn.Module()
        language_model.encoder.layers = nn.ModuleList(Layer(moe() if i % 2 else Mlp()) for i in range(LAYERS))
        language_model.encoder.final_layernorm = nn.LayerNorm(D)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, s, V]."""
        weight = self.language_model.embedding.word_embeddings.weight
        x = F.embedding(tokens, weight).transpose(0, 1)
        for layer in self.language_model.encoder.layers:
            x = layer(x)
        return (self.language_model.encoder.final_layernorm(x) @ weight.T).transpose(0, 1)


def nested(flat: dict[str, Tensor]) -> dict:
    """The dicts that Megatron-DeepSpeed makes of the names; experts move to the top under a name of their own."""
    top, encoder = {}, {}
    for name, value in flat.items():
        inner = name.removeprefix("language_model.encoder.")
        if inner != name and "expert" in inner and "moe.gate.wg.weight" not in inner:
            top[f"encoder{inner}"] = value
        elif inner != name:
            encoder[inner] = value
    words = {"word_embeddings": {"weight": flat["language_model.embedding.word_embeddings.weight"]}}
    return top | {"language_model": {"embedding": words, "encoder": encoder}}
