"""A copy of the state in host memory, taken while training stands still and written while it goes on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megamoe.checkpoint.slices import Slice
from megamoe.training.state import Piece

_ALIGNMENT_BYTES = 64


class HostCopy:
    """Host memory for one copy of this rank's pieces: allocated once, filled at every save, pinned where CUDA is.

    It holds as many bytes as the pieces do, rounded up to 64 for each: that is all the memory a save takes.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.num_bytes = sum(_room(piece) for piece in pieces)
        self._bytes = torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._bytes.zero_()  # the pages are there before the first save waits for them

    @torch.no_grad()
    def take(self, pieces: Sequence[Piece]) -> list[tuple[Slice, np.ndarray]]:
        """Copy the pieces, as many and as large as at first. The arrays are bytes, valid until the next call."""
        arrays, start = [], 0
        for piece in pieces:
            target = self._bytes[start : start + piece.values.nbytes]
            target.view(piece.values.dtype).copy_(piece.values, non_blocking=True)
            arrays.append((piece.slice, target.numpy()))
            start += _room(piece)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return arrays


def live_arrays(pieces: Sequence[Piece]) -> list[tuple[Slice, np.ndarray]] | None:
    """The pieces as byte arrays over the state itself, or None where some lies on a GPU: for a save that training
    waits for."""
    if any(piece.values.is_cuda for piece in pieces):
        return None
    return [(piece.slice, as_bytes(piece.values)) for piece in pieces]


def as_bytes(values: Tensor) -> np.ndarray:
    """A contiguous 1-D CPU tensor as bytes over the same memory; numpy has no bfloat16."""
    return values.detach().view(torch.uint8).numpy()


def _room(piece: Piece) -> int:
    return -(-piece.values.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
