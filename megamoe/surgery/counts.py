"""Numbers of experts by layer, as arguments and as settings."""

from collections.abc import Sequence
from typing import Any

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import ConfigError, ConversionError
from megamoe.surgery.sources import Sources
from megamoe.topology.parameters import experts_by_layer

Counts = int | tuple[int, ...]


def counts_of(num_experts: int | Sequence[int]) -> Counts:
    """One number for all layers, or one for each. Raises ConfigError for numbers below 1."""
    given = (num_experts,) if isinstance(num_experts, int) else tuple(num_experts)
    if not given or min(given) < 1:
        raise ConfigError(f"{list(given)} is no number of experts: use 1 or more")
    return num_experts if isinstance(num_experts, int) else given


def moe_counts(counts: Counts) -> dict[str, Any]:
    """The keys of the section `moe` that say so."""
    if isinstance(counts, int):
        return {"num_experts": counts, "num_experts_by_layer": None}
    return {"num_experts": max(counts), "num_experts_by_layer": counts}


def validated(config: Config) -> Config:
    """The configuration, no pyramid where all numbers are one. Raises ConfigError as `validation.validate` does."""
    validate(config)
    counts = config.moe.num_experts_by_layer
    if counts is None or len(set(counts)) > 1:
        return config
    return config.model_copy(update={"moe": config.moe.model_copy(update={"num_experts_by_layer": None})})


def old_and_new(sources: Sources, counts: Counts) -> dict[int, tuple[int, int]]:
    """MoE layer -> its experts before and after.

    Raises ConversionError for a dense model, ConfigError for a list that does not name each MoE layer once.
    """
    old = old_counts(sources)
    new = (counts,) * len(old) if isinstance(counts, int) else counts
    if len(new) != len(old):
        raise ConfigError(
            f"{len(new)} numbers of experts are given, but {len(old)} layers have experts: give one for each, or one "
            "for all"
        )
    return {layer: (before, after) for (layer, before), after in zip(old.items(), new, strict=True)}


def old_counts(sources: Sources) -> dict[int, int]:
    """MoE layer -> its experts. Raises ConversionError for a dense model."""
    config: Config = sources.config
    if config.moe.num_experts == 0:
        raise ConversionError(f"{sources.folders[0]} is a dense model: there are no experts to change")
    return experts_by_layer(config.model, config.moe)
