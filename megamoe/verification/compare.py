"""Holding two sets of logits against each other."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megamoe.errors import ConversionError

# fp32 sums in another order: measured below 2e-6 for small models. A head, expert or half in the wrong place gives 1e-2
# and more.
RELATIVE_LIMIT = 1e-4


@dataclass(frozen=True)
class Agreement:
    """`largest_difference` is of logits, `largest_logit` their scale; `same_choice` the share of positions whose most
    likely token is the same."""

    num_sequences: int
    num_positions: int
    largest_difference: float
    largest_logit: float
    same_choice: float
    limit: float

    @property
    def is_good(self) -> bool:
        return self.largest_difference <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"is_good": self.is_good}


def fixed_token_ids(vocab_size: int, *, num_sequences: int = 4, seq_length: int = 64, seed: int = 20_211) -> np.ndarray:
    """The same ids in every verification: int64 [num_sequences, seq_length], each drawn from the whole vocabulary."""
    return np.random.default_rng(seed).integers(0, vocab_size, (num_sequences, seq_length))


def compare_logits(ours: np.ndarray, theirs: np.ndarray, what: str) -> Agreement:
    """Compare [n, s, V]. Raises ConversionError where shapes differ, a logit is not finite, or they disagree."""
    if ours.shape != theirs.shape:
        raise ConversionError(f"{what}: logits {list(ours.shape)} of one side, {list(theirs.shape)} of the other")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ConversionError(f"{what}: a logit is not finite")
    scale = float(np.abs(theirs).max())
    agreement = Agreement(
        num_sequences=ours.shape[0],
        num_positions=ours.shape[1],
        largest_difference=float(np.abs(ours - theirs).max()),
        largest_logit=scale,
        same_choice=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        limit=RELATIVE_LIMIT * max(1.0, scale),
    )
    if not agreement.is_good:
        raise ConversionError(
            f"{what}: logits differ by {agreement.largest_difference:.3g} where {agreement.limit:.3g} is allowed, and "
            f"{agreement.same_choice:.0%} of the positions choose the same token: the conversion is wrong"
        )
    return agreement
