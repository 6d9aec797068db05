"""Token embeddings, scaled and given sinusoidal positions where the model asks for them."""

import math
from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import get_cuda_rng_tracker, scatter_to_sequence_parallel_region
from torch import Tensor

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

    def __init__(self, *, scale: float, sinusoidal: bool, tensor_rank: int, **kwargs: Any) -> None:
        super().__init__(position_embedding_type="none", **kwargs)
        self.scale, self.sinusoidal, self.tensor_rank = scale, sinusoidal, tensor_rank
        self._positions: Tensor | None = None

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: int | None = None) -> Tensor:
        x = self.word_embeddings(input_ids)
        if not self.reduce_scatter_embeddings:
            x = x.transpose(0, 1).contiguous()
        if self.scale != 1.0:
            x = x * self.scale
        if self.sinusoidal:
            x = x + self._position_slice(input_ids.shape[1], x).unsqueeze(1)
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

    def _position_slice(self, length: int, like: Tensor) -> Tensor:
        """The positions of the rows of `like` [rows, b, h], which may be a sequence slice of `length`."""
        if self._positions is None or self._positions.shape[0] < length or self._positions.device != like.device:
            self._positions = sinusoid(length, like.shape[-1]).to(like.device)
        start = self.tensor_rank * like.shape[0] if like.shape[0] < length else 0
        return self._positions[start : start + like.shape[0]].to(like.dtype)
