"""What one forward pass is given.

    b texts of a micro-batch   s tokens of each   n results of each
"""

from dataclasses import dataclass

from torch import Tensor

from megamoe.model.decoding import KeyValueCache


@dataclass(frozen=True)
class TokenRows:
    """One micro-batch, on the host. `labels` [b, n]: their losses are wanted; `kept` [b, n]: of these places alone.

    `cache` is what the texts go on from, and is extended. Padding is on the right; `num_new` [b] counts what is no
    padding (None: all is text).
    """

    tokens: Tensor  # int64 [b, s]
    labels: Tensor | None = None
    kept: Tensor | None = None
    cache: KeyValueCache | None = None
    num_new: Tensor | None = None
