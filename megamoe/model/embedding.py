"""Token embeddings, scaled and given sinusoidal positions where the model asks for them."""

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import get_cuda_rng_tracker, scatter_to_sequence_parallel_region
from torch import Tensor

from megamoe.model.decoding import Decoding

# fairseq counts positions from its padding id + 1, and its padding id is 1.
FIRST_SINUSOID_POSITION = 2


def sinusoid(num_positions: int, hidden_size: int, first_position: int = FIRST_SINUSOID_POSITION) -> Tensor:
    """[num_positions, hidden_size] fp32: sines in the first half of the features, cosines in the second.

    Frequencies fall geometrically from 1 to 1e-4, as in tensor2tensor and fairseq's SinusoidalPositionalEmbedding.
    """
    half = hidden_size // 2
    frequency = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10_000.0) / (half - 1)))
    position = torch.arange(first_position, first_position + num_positions, dtype=torch.float32)
    angle = position.unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class TokenEmbedding(LanguageModelEmbedding):
    """x = E[token] * scale (+ sinusoid(position)); [b, s] ids -> [s, b, h], or this rank's slice of s."""

    def __init__(
        self, *, scale: float, sinusoidal: bool, tensor_rank: int, decoding: Decoding, **kwargs: Any
    ) -> None:
        super().__init__(position_embedding_type="none", **kwargs)
        self.scale, self.sinusoidal, self.tensor_rank, self.decoding = scale, sinusoidal, tensor_rank, decoding
        self._positions: Tensor | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: int | None = None) -> Tensor:
        x = self.word_embeddings(input_ids)
        if not self.reduce_scatter_embeddings:
            x = x.transpose(0, 1).contiguous()
        if self.scale != 1.0:
            x = x * self.scale
        if self.sinusoidal:
            x = x + self._position_rows(input_ids.shape[1], x)
        if self.training and torch.is_grad_enabled() and not x.requires_grad:
            # The embedding is frozen, and what follows may be, too: a pipeline stage still has to hand back a gradient,
            # and recomputing hangs on an input that needs one.
            x.requires_grad_()
        if not self.config.sequence_parallel:
            return self.embedding_dropout(x)
        if not self.reduce_scatter_embeddings:
            x = scatter_to_sequence_parallel_region(x, group=self.tp_group)
        with get_cuda_rng_tracker().fork():
            return self.embedding_dropout(x)

    def _position_rows(self, length: int, like: Tensor) -> Tensor:
        """What is added to `like` [rows, b, h], which may be a sequence slice of `length`: [rows, 1 or b, h]."""
        if (cache := self.decoding.cache) is not None:
            table = self._position_table(cache.num_slots, like)
            return table[cache.positions.transpose(0, 1)].to(like.dtype)
        start = self.tensor_rank * like.shape[0] if like.shape[0] < length else 0
        return self._position_table(length, like)[start : start + like.shape[0]].to(like.dtype).unsqueeze(1)

    def _position_table(self, length: int, like: Tensor) -> Tensor:
        """[length or more, h] fp32."""
        if self._positions is None or self._positions.shape[0] < length or self._positions.device != like.device:
            self._positions = sinusoid(length, like.shape[-1]).to(like.device)
        return self._positions


class RotaryPositions(RotaryEmbedding):
    """Megatron's angles of rotary positions; of a text that goes on, those of its next positions."""

    def __init__(self, *, decoding: Decoding, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decoding = decoding

    def forward(self, max_seq_len: int, *arguments: Any, **options: Any) -> Tensor:
        """[s, 1, 1, d]; with a cache [s, b, 1, d]."""
        if self.decoding.cache is None:
            return super().forward(max_seq_len, *arguments, **options)
        self.inv_freq = self.inv_freq.to(self.decoding.cache.device)
        angles = self.decoding.cache.positions.transpose(0, 1).unsqueeze(-1) * self.inv_freq
        return torch.cat([angles, angles], dim=-1).unsqueeze(2)
