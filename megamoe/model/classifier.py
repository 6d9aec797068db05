"""The head of a classifier: one linear map without a bias, where a language model has its output matrix.

    s positions   b sequences   h hidden   L labels   t tensor parallel size

It gives logits at every position, as a vocabulary of L words would; which position of a sequence counts, its last real
token, is the data's to say, by what weighs the losses. Each tensor rank computes the same, on whole sequences.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn


class ClassificationHead(nn.Module):
    """x [s, b, h], or [s/t, b, h] where sequences are cut -> losses [b, s] of labels [b, s] in nats, or logits
    [b, s, L] without labels."""

    def __init__(
        self,
        hidden_size: int,
        num_labels: int,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, hidden_size, dtype=dtype))
        self.group, self.sequence_parallel = group, sequence_parallel

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if self.sequence_parallel:
            # Every rank goes on with the whole, and alike: the gradient of its own slice is all that goes back.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.group)
        logits = F.linear(x.transpose(0, 1), self.weight)
        if labels is None:
            return logits
        return F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
