"""A few neighbouring layers of a large model as a model of their own, between the same embedding and output.

What a whole model computes cannot always be held in memory; what each of its layers computes can, window by window.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from megamoe.checkpoint.reader import Checkpoint
from megamoe.config.schema import Config
from megamoe.topology.parameters import experts_by_layer, num_parameters, param_table

_LAYER = re.compile(r"(?<![A-Za-z0-9_])layers\.(\d+)(?=\.)")


def windows(config: Config, most_parameters: int) -> list[tuple[int, int]]:
    """[first, last) of as many neighbouring layers as fit, all layers once; nothing where such a window is too large.

    Of a mixture of experts each window has a layer with experts: many classes cannot express a model without.
    """
    found: list[tuple[int, int]] = []
    for first, last in _smallest_windows(config):
        if _size(config, first, last) > most_parameters:
            return []
        if found and _size(config, found[-1][0], last) <= most_parameters:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def _smallest_windows(config: Config) -> list[tuple[int, int]]:
    """Each layer; of a mixture of experts each layer with experts and the dense ones before it, the last ones after."""
    num_layers = config.model.num_layers
    moe = [*experts_by_layer(config.model, config.moe)] or range(num_layers)
    ends = [layer + 1 for layer in moe]
    ends[-1] = num_layers
    return list(zip([0, *ends], ends, strict=False))


def window_config(config: Config, first: int, last: int) -> Config:
    """The configuration of layers [first, last) alone."""
    counts = {i - first: n for i, n in experts_by_layer(config.model, config.moe).items() if first <= i < last}
    is_uneven = config.moe.num_experts_by_layer is not None
    moe = config.moe.model_copy(
        update={
            "num_experts": max(counts.values(), default=0),
            "layer_pattern": tuple(counts) if counts else config.moe.layer_pattern,
            "num_experts_by_layer": tuple(counts.values()) if counts and is_uneven else None,
        }
    )
    model = config.model.model_copy(update={"num_layers": last - first})
    return config.model_copy(update={"model": model, "moe": moe})


def renamed(first: int, last: int) -> Callable[[str], str | None]:
    """Name of a tensor in the whole model -> its name in the window; None for a tensor of another layer."""

    def rename(name: str) -> str | None:
        found = _LAYER.search(name)
        if found is None:
            return name
        layer = int(found[1])
        return f"{name[: found.start(1)]}{layer - first}{name[found.end(1) :]}" if first <= layer < last else None

    return rename


def window_of(checkpoint: Checkpoint, config: Config, first: int, last: int) -> Checkpoint:
    """The checkpoint as one of the window: the same files, other names."""
    rename, old = renamed(first, last), checkpoint.manifest
    tensors = {
        (kind, name): replace(entry, name=name)
        for (kind, whole_name), entry in old.tensors.items()
        if (name := rename(whole_name)) is not None
    }
    tree = window_config(config, first, last).model_dump(mode="json")
    return Checkpoint(checkpoint.folder, replace(old, tensors=tensors, config=tree))


def _size(config: Config, first: int, last: int) -> int:
    part = window_config(config, first, last)
    return num_parameters(param_table(part.model, part.moe))
