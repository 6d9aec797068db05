"""What the converter knows of one Hugging Face class, and what families share in reading and writing config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megamoe.config.schema import Config, MoEConfig
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.names import Names
from megamoe.topology.parameters import experts_by_layer, moe_layers

Tree = dict[str, dict[str, Any]]  # sections "model" and "moe" of our configuration
_DIGITS = 12  # of coefficients that are multiplied on the way: enough for them, few enough to come back equal


@dataclass(frozen=True)
class Family:
    """One class.

    `read` makes our settings of its keys and raises ConversionError for what we cannot express; `refusals` says what
    of ours it cannot express, one clause each; `write` makes its keys of a configuration without refusals.
    """

    architecture: str
    model_type: str
    defaults: Mapping[str, Any]  # of its configuration class, for the keys that `read` takes
    names: Callable[[Config], Names]
    read: Callable[[Keys], Tree]
    refusals: Callable[[Config], list[str]]
    write: Callable[[Config], dict[str, Any]]
    trained: Mapping[str, str] = field(default_factory=dict)  # our training-only settings it keeps: key -> theirs
    keeps_gate_order: bool = False


def uniform_experts(config: Config) -> int | None:
    """The number of experts that every MoE layer has; None for a pyramid; 0 without experts."""
    counts = set(experts_by_layer(config.model, config.moe).values()) or {0}
    return counts.pop() if len(counts) == 1 else None


def pattern_of(layers: tuple[int, ...], num_layers: int) -> int | list[int]:
    """The 0-based MoE layers as a period where they have one, or as they are."""
    if layers:
        period = layers[0] + 1
        if layers == tuple(range(period - 1, num_layers, period)):
            return period
    return list(layers)


def to_our_loss_coefficient(theirs: float, top_k: int, num_moe_layers: int) -> float:
    """router_aux_loss_coef -> balance_loss_coeff with balance_loss all_choices.

    Theirs weighs a mean over layers in which each of a token's top_k choices counts whole; ours is a sum over layers
    in which they count 1 / top_k each.
    """
    return float(f"{theirs * top_k / num_moe_layers:.{_DIGITS}g}") if num_moe_layers else 0.0


def their_loss_coefficient(config: Config) -> float:
    """The inverse; 0 where our balance loss is not theirs."""
    moe = config.moe
    if moe.balance_loss != "all_choices":
        return 0.0
    return float(f"{moe.balance_loss_coeff * len(moe_layers(config.model, moe)) / moe.top_k:.{_DIGITS}g}")


def normalizes(moe: MoEConfig) -> bool:
    """Whether the gates of a token that loses no expert sum to 1."""
    return moe.normalize_gates or moe.gate_order == "select_then_softmax"
