"""Causal attention by torch's scaled_dot_product_attention: flash kernels on GPU and CPU, no [s, s] matrix.

    s sequence   b micro-batch   n query heads   g key/value heads   d head dimension (heads: of this tensor rank)
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn

from megamoe.model.decoding import Decoding


class CausalAttention(nn.Module):
    """The core-attention slot of Megatron's SelfAttention."""

    def __init__(
        self, config: Any, layer_number: int, decoding: Decoding, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.layer_number, self.decoding = layer_number, decoding
        self.dropout = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.scale = softmax_scale  # None: d ** -0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query [s, b, n, d], key and value [s, b, g, d] -> [s, b, n * d]."""
        length, batch, num_heads, head_dim = query.shape
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        mask, is_causal = None, True
        if self.decoding.cache is not None:
            key, value, mask, is_causal = self.decoding.cache.extend(self.layer_number, key, value)
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            out = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                scale=self.scale,
                enable_gqa=key.shape[1] != num_heads,
            )
        return out.permute(2, 0, 1, 3).reshape(length, batch, num_heads * head_dim)

    def _random_state(self, dropout: float) -> AbstractContextManager[None]:
        """Tensor ranks hold different heads and must drop differently: the state of tensor-parallel regions.

        Under sequence parallelism Megatron's block runs in that state already.
        """
        if dropout == 0.0 or self.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()
