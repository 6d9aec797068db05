"""Which texts are computed together: of like length, those of one example after a beginning that is computed once.

No torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamoe.priming.encoding import Prompt, Scored, common_prefix


@dataclass(frozen=True)
class Family:
    """Texts with a common beginning. `shared` tokens of it are computed once; none of them predicts what is scored."""

    texts: tuple[Scored, ...]
    shared: int

    @property
    def longest_ending(self) -> int:
        """Tokens that go through the model after the beginning; the last one scored predicts nothing."""
        return max(text.end - 1 for text in self.texts) - self.shared


def family_of(texts: Sequence[Scored]) -> Family:
    shared = min(common_prefix([text.tokens[: text.end - 1] for text in texts]), min(text.start for text in texts) - 1)
    return Family(tuple(texts), shared)


def families(prompts: Iterable[Prompt]) -> list[Family]:
    """Each prompt's texts, followed by its unconditional ones where it has them."""
    return [family_of(texts) for prompt in prompts for texts in (prompt.texts, prompt.unconditional) if texts]


def batches(of: Sequence[Family], size: int) -> list[list[int]]:
    """Numbers of families, up to `size` in each batch, alike in length; the longest first, so that what does not fit
    into memory is known at once."""
    order = sorted(range(len(of)), key=lambda i: (-of[i].shared, -of[i].longest_ending, -len(of[i].texts), i))
    return [order[start : start + size] for start in range(0, len(order), size)]
