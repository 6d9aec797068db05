"""What commands say of the tokenizer that they read texts with. No torch."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megamoe.config.loading import layers_of


class HasIds(Protocol):
    """What is asked of a tokenizer here."""

    kind: str
    vocab_size: int


def names_tokenizer(overrides: Sequence[str]) -> bool:
    """Whether settings say which tokenizer it is: data.tokenizer.kind, or a group with it.

    A path alone is of the model's own kind. Raises ConfigError for a setting that cannot be read.
    """
    for layer in layers_of(None, [each for each in overrides if each.lstrip().startswith("data.tokenizer")]):
        tokenizer: Any = layer.tree["data"].get("tokenizer")
        if isinstance(tokenizer, Mapping) and "kind" in tokenizer:
            return True
    return False


def notes_of_tokenizer(tokenizer: HasIds, vocab_size: int) -> list[str]:
    """What the user should hear where a tokenizer has far fewer ids than the model, which a foreign one may have."""
    if tokenizer.vocab_size >= vocab_size // 2:
        return []
    return [
        f"the tokenizer (data.tokenizer.kind {tokenizer.kind}) has {tokenizer.vocab_size} ids, the model {vocab_size}: "
        "if it is not the model's own, results mean nothing"
    ]
