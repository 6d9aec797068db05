"""What a forward pass without gradients goes on from, and which of its results are wanted.

    b texts of a micro-batch   s new tokens of each   n results of each   L positions so far
    g key/value heads of this tensor rank   d head dimension   h hidden
"""

from dataclasses import dataclass

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of `b` texts in this rank's layers. What is at position p of a text lies in slot p.

    The texts may differ in length: new tokens of text i go to positions starts[i], starts[i] + 1, ... and see what lies
    before them. A batch is padded on the right: a padding token's slot is behind all that a real one sees, and the
    text's next tokens overwrite it.
    """

    def __init__(self, num_texts: int, num_slots: int, device: torch.device) -> None:
        self.num_slots, self.device = num_slots, device
        self.starts = torch.zeros(num_texts, dtype=torch.int64)  # on the host: shapes depend on it
        self._by_layer: dict[int, tuple[Tensor, Tensor]] = {}  # keys, values: [b, g, num_slots, d] each
        self._positions = self.starts[:, None].to(device)
        self._mask: Tensor | None = None
        self._length = 0

    def begin(self, num_tokens: int) -> None:
        """Make ready for a pass over `num_tokens` new tokens of each text. Raises ValueError if slots are too few."""
        self._length = int(self.starts.max()) + num_tokens
        if self._length > self.num_slots:
            raise ValueError(f"{self._length} positions do not fit into {self.num_slots} slots")
        self._positions = (self.starts[:, None] + torch.arange(num_tokens)).to(self.device)
        if self._starts_texts or (num_tokens == 1 and self._is_even):
            self._mask = None
        else:
            slots = torch.arange(self._length, device=self.device)
            self._mask = (slots <= self._positions[..., None])[:, None]  # [b, 1, s, L]

    @property
    def positions(self) -> Tensor:
        """[b, s] of the pass that has begun."""
        return self._positions

    @property
    def _is_even(self) -> bool:
        return bool((self.starts == self.starts[0]).all())

    @property
    def _starts_texts(self) -> bool:
        return not self.starts.any()

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Keep what `layer` computed for the new tokens, [b, g, s, d] each; returns what their queries attend to.

        That is keys and values [b, g, L, d], the mask [b, 1, s, L] (None: there is none) and whether it is the plain
        causal one.
        """
        if layer not in self._by_layer:
            shape = (*key.shape[:2], self.num_slots, key.shape[3])
            self._by_layer[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._by_layer[layer]
        if self._is_even:
            slots = slice(self._length - key.shape[2], self._length)
            keys[:, :, slots], values[:, :, slots] = key, value
        else:
            rows = torch.arange(len(self.starts), device=self.device)[:, None]
            keys[rows, :, self._positions] = key.transpose(1, 2)
            values[rows, :, self._positions] = value.transpose(1, 2)
        if self._starts_texts:
            return key, value, None, True
        return keys[:, :, : self._length], values[:, :, : self._length], self._mask, False

    def advance(self, num_tokens: int | Tensor) -> None:
        """The texts have grown by `num_tokens` (of each, or an int64 [b] on the host): padding is not counted."""
        self.starts = self.starts + num_tokens

    def rows(self, rows: Tensor, num_slots: int) -> "KeyValueCache":
        """A cache of texts `rows` (int64 on the host; a text may be there more than once) with so many slots."""
        made = KeyValueCache(len(rows), num_slots, self.device)
        made.starts = self.starts[rows]
        length, where = int(made.starts.max()), rows.to(self.device)
        for layer, pair in self._by_layer.items():
            kept = []
            for old in pair:
                new = old.new_zeros((len(rows), old.shape[1], num_slots, old.shape[3]))
                new[:, :, :length] = old[:, :, :length].index_select(0, where)
                kept.append(new)
            made._by_layer[layer] = (kept[0], kept[1])
        return made


@dataclass
class Decoding:
    """How the next forward pass runs; one instance is shared by the modules of a rank. As made: as in training."""

    cache: KeyValueCache | None = None
    kept: Tensor | None = None  # [b, n] places among the s new tokens whose results are wanted; None: of all
    hides_padding: bool = False  # rows that fill the vocabulary up are no tokens: their logits are -inf


def keep_places(hidden: Tensor, kept: Tensor) -> Tensor:
    """hidden [s, b, h], kept int64 [b, n] -> hidden at those places, [n, b, h]."""
    index = kept.transpose(0, 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return hidden.gather(0, index)
