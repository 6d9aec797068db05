"""What the readers of old formats share: settings read by name, and links of attention and vocabulary."""

import argparse
import math
from collections.abc import Iterable, Mapping
from typing import Any

from megamoe.checkpoint.slices import Box, whole_box
from megamoe.config.schema import Config, ModelConfig
from megamoe.convert.links import WEIGHT, Link, Ours, Padding
from megamoe.errors import ConversionError, MegamoeError
from megamoe.topology.parameters import param_table


class Settings:
    """The settings a checkpoint was trained with, by name, with what the user says in their place."""

    def __init__(self, values: Any, where: str, overrides: Mapping[str, Any] | None = None) -> None:
        """`values`: a dict or an argparse.Namespace. Raises ConversionError where it is neither."""
        if isinstance(values, argparse.Namespace):
            values = vars(values)
        if not isinstance(values, Mapping):
            raise ConversionError(f"{where} should be settings by name, but is {type(values).__name__}")
        self.where, self.values = where, {**values, **(overrides or {})}

    def get(self, name: str, default: Any) -> Any:
        """The value; `default` where it is absent or None."""
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str, kind: type) -> Any:
        """Raises ConversionError where the setting is absent or no `kind`."""
        value = self.values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ConversionError(
                f"{self.where} should say {name} as {kind.__name__}, but has {value!r}: give it as an override"
            )
        return value

    def refuse(self, name: str, allowed: Iterable[Any], reason: str) -> None:
        """Raises ConversionError unless the setting is absent or one of `allowed`."""
        value = self.values.get(name)
        if value is not None and value not in tuple(allowed):
            raise ConversionError(f"{self.where} has {name} {value!r}, which megamoe cannot express: {reason}")


def vocabulary(num_rows: int, multiple: int | None) -> dict[str, int]:
    """vocab_size and vocab_size_multiple of a model whose embedding has `num_rows`, padded to `multiple` if given."""
    return {"vocab_size": num_rows, "vocab_size_multiple": multiple or math.gcd(num_rows, 128)}


def vocabulary_padding(names: Iterable[str], num_rows: int, shapes: Mapping[Ours, tuple[int, ...]]) -> list[Padding]:
    """Our rows of the embeddings `names` that lie past their `num_rows`."""
    found = []
    for name in names:
        rows, hidden = shapes[WEIGHT, name]
        if rows > num_rows:
            box = ((num_rows, rows), (0, hidden))
            found.append(Padding((WEIGHT, name), box, f"the rows from {num_rows} on belong to no token"))
    return found


PADDING_NOTE = (
    "the embedding is padded from {theirs} to {ours} rows of zeros: the softmax counts the new rows, so that every "
    "probability changes a little"
)


def our_shapes(config: Config) -> dict[Ours, tuple[int, ...]]:
    return {(WEIGHT, parameter.name): parameter.shape for parameter in param_table(config.model, config.moe)}


def whole(ours: str, theirs: str, shape: tuple[int, ...]) -> Link:
    """A name for a name."""
    return Link((WEIGHT, ours), whole_box(shape), theirs, whole_box(shape))


def head_links(model: ModelConfig, layer: str, theirs: Mapping[str, str], *, bias: bool) -> list[Link]:
    """Links of separate q, k and v (`theirs` maps "q", "k", "v" to names) of one head each to our fused rows."""
    heads = model.num_attention_heads
    size = model.head_dim or model.hidden_size // heads
    rest: Box = () if bias else ((0, model.hidden_size),)
    ours = (WEIGHT, f"{layer}.attention.qkv.{'bias' if bias else 'weight'}")
    return [
        Link(ours, ((row, row + size), *rest), theirs[part], ((head * size, (head + 1) * size), *rest))
        for head in range(heads)
        for part, row in zip("qkv", range(3 * head * size, 3 * (head + 1) * size, size), strict=True)
    ]


def valid_config(sections: Mapping[str, Mapping[str, Any]], where: str) -> Config:
    """A Config of these sections. Raises ConversionError with what megamoe's own check has against it."""
    try:
        config = Config.model_validate(sections)
        param_table(config.model, config.moe)
    except (MegamoeError, ValueError) as error:
        text = "; ".join(str(item["msg"]) for item in error.errors()) if hasattr(error, "errors") else str(error)
        raise ConversionError(f"{where} describes no model of megamoe: {text}") from None
    return config
