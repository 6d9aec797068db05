"""Checks of the routing settings among themselves, which `validation` runs for models with experts."""

from megamoe.config.schema import MoEConfig
from megamoe.config.structure import common_divisor_of_experts, expert_counts
from megamoe.errors import ConfigError


def check_router(moe: MoEConfig) -> None:
    """Raises ConfigError for routing settings that contradict each other or mean nothing together."""
    if moe.score_function == "sigmoid" and moe.gate_order == "select_then_softmax":
        raise ConfigError(
            "gate_order select_then_softmax means nothing to score_function sigmoid: use gate_order "
            "softmax_then_select, or score_function softmax"
        )
    if moe.top_k == 1 and moe.gate_order == "select_then_softmax":
        raise ConfigError(
            "top_k 1 with gate_order select_then_softmax makes every gate 1, so that the router never learns from the "
            "language loss: use gate_order softmax_then_select"
        )
    if moe.balance_bias_update_rate > 0 and moe.score_function != "sigmoid":
        raise ConfigError(
            f"balance_bias_update_rate {moe.balance_bias_update_rate:g} needs score_function sigmoid, but it is "
            f"{moe.score_function}: use score_function sigmoid, or balance_bias_update_rate 0"
        )
    if moe.normalize_when == "before_drops" and not moe.normalize_gates:
        raise ConfigError(
            "normalize_when before_drops means nothing with normalize_gates false: use normalize_gates true, or "
            "normalize_when after_drops"
        )
    _check_groups(moe)
    if moe.dropless:
        _check_dropless(moe)


def _check_groups(moe: MoEConfig) -> None:
    groups, selected = moe.num_expert_groups, moe.num_selected_groups
    if groups is None and selected is None:
        return
    if groups is None or selected is None:
        present, absent = ("num_selected_groups", "num_expert_groups")[:: 1 if groups is None else -1]
        raise ConfigError(f"{present} {selected or groups} needs {absent}, which is not set: set both or neither")
    for name, count in expert_counts(moe).items():
        if count % groups:
            common = common_divisor_of_experts(moe)
            valid = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ConfigError(f"num_expert_groups {groups} does not divide {name} {count}: use {valid}")
    if selected > groups:
        raise ConfigError(
            f"num_selected_groups {selected} is more than num_expert_groups {groups}: use 1 to {groups}"
        )
    size = min(expert_counts(moe).values()) // groups  # of the layer with the fewest experts
    if selected * size < moe.top_k:
        raise ConfigError(
            f"num_selected_groups {selected} of {size} experts each hold fewer than top_k {moe.top_k} experts: "
            f"use num_selected_groups {-(-moe.top_k // size)} to {groups}"
        )


def _check_dropless(moe: MoEConfig) -> None:
    if moe.normalize_when == "before_drops":
        raise ConfigError(
            "normalize_when before_drops means nothing with dropless true: use normalize_when after_drops, or "
            "dropless false"
        )
    if moe.drop_policy == "probability":
        raise ConfigError(
            "drop_policy probability means nothing with dropless true: use drop_policy position, or dropless false"
        )
