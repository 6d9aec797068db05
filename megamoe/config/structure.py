"""Checks of how MoE layers are made up: how many experts each has, and the FFN beside them."""

import math
from collections.abc import Mapping

from megamoe.config.schema import Config, MoEConfig
from megamoe.errors import ConfigError


def expert_counts(moe: MoEConfig) -> Mapping[str, int]:
    """Every number of experts that some layer has, by the name that a message gives it; of equal ones the first."""
    if moe.num_experts_by_layer is None:
        return {"num_experts": moe.num_experts}
    counts = moe.num_experts_by_layer
    return {f"num_experts_by_layer[{counts.index(count)}]": count for count in counts}


def common_divisor_of_experts(moe: MoEConfig) -> int:
    """The largest number that divides the experts of every layer."""
    return math.gcd(*expert_counts(moe).values())


def num_moe_layers(config: Config) -> int:
    """Layers with experts, of a configuration whose num_experts is above 0 and whose layer_pattern is valid."""
    pattern = config.moe.layer_pattern
    return config.model.num_layers // pattern if isinstance(pattern, int) else len(pattern)


def check_dense(moe: MoEConfig) -> None:
    """Raises ConfigError for settings that mean nothing to a model without experts."""
    if moe.num_experts_by_layer is not None:
        raise ConfigError(
            f"num_experts_by_layer needs num_experts {max(moe.num_experts_by_layer, default=1)}, the largest of its "
            "entries, but num_experts is 0: set it, or use num_experts_by_layer null"
        )
    if moe.shared_expert_ffn_hidden_size is not None:
        raise ConfigError(
            f"shared_expert_ffn_hidden_size {moe.shared_expert_ffn_hidden_size} needs experts to stand beside, but "
            "num_experts is 0: use shared_expert_ffn_hidden_size null"
        )


def check_structure(config: Config) -> None:
    """Raises ConfigError for a pyramid or a shared expert that does not fit the model; layer_pattern is valid."""
    moe = config.moe
    if moe.shared_expert_mix != "add" and moe.shared_expert_ffn_hidden_size is None:
        raise ConfigError(
            f"shared_expert_mix {moe.shared_expert_mix} needs shared_expert_ffn_hidden_size, which is not set: set it, "
            "or use shared_expert_mix add"
        )
    counts, num_layers = moe.num_experts_by_layer, num_moe_layers(config)
    if counts is None:
        return
    if len(counts) != num_layers:
        raise ConfigError(
            f"num_experts_by_layer has {len(counts)} entries, but layer_pattern puts experts in {num_layers} layers: "
            f"list {num_layers}"
        )
    if max(counts) != moe.num_experts:
        raise ConfigError(
            f"num_experts {moe.num_experts} is not the largest of num_experts_by_layer {list(counts)}: "
            f"use num_experts {max(counts)}"
        )
