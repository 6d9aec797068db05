"""What the user should hear of: settings of training that have no counterpart, rows that are padding, drops."""

from collections.abc import Mapping
from typing import Any

from megamoe.config.schema import Config
from megamoe.convert.hf_families.family import Family
from megamoe.topology.parameters import padded_vocab_size


def notes_of(config: Config, family: Family, their_config: Mapping[str, Any], their_vocab: int) -> tuple[str, ...]:
    """One sentence each; nothing here changes what the model computes in evaluation with drops off."""
    found = [*_vocabulary(config, their_vocab), *_evaluation(config, family), *_our_training(config, family)]
    return (*found, *_their_training(config, family, their_config))


def _vocabulary(config: Config, their_vocab: int) -> list[str]:
    rows, vocab_size = padded_vocab_size(config.model), config.model.vocab_size
    if their_vocab < rows:
        return [
            f"rows {their_vocab} to {rows - 1} of the vocabulary are padding that megamoe adds: zeros at first, and "
            "counted in its softmax"
        ]
    if vocab_size < rows:
        return [
            f"rows {vocab_size} to {rows - 1} of the vocabulary are padding and are kept, since the softmax counts them"
        ]
    return []


def _evaluation(config: Config, family: Family) -> list[str]:
    moe, found = config.moe, []
    if not moe.num_experts:
        return found
    if not moe.dropless:
        found.append(
            "moe.dropless false: training dropped tokens over capacity; the other format drops none, so its outputs "
            "equal megamoe's with drops off"
        )
    if moe.gate_order == "select_then_softmax" and not family.keeps_gate_order:
        found.append(
            "moe.gate_order select_then_softmax: written as a softmax over all experts whose chosen gates are divided "
            "by their sum, which is the same but for rounding"
        )
    return found


def _our_training(config: Config, family: Family) -> list[str]:
    """Settings of ours away from what theirs means, without a key of theirs."""
    model, moe, kept, found = config.model, config.moe, family.trained, []
    for key in ("attention_dropout", "hidden_dropout"):
        if getattr(model, key) and f"model.{key}" not in kept:
            found.append(_lost(f"model.{key} {getattr(model, key):g}", family))
    if not moe.num_experts:
        return found
    if moe.balance_loss_coeff and "moe.balance_loss_coeff" in kept and moe.balance_loss != "all_choices":
        theirs = kept["moe.balance_loss_coeff"]
        found.append(
            f"moe.balance_loss {moe.balance_loss}: the loss of {family.architecture} counts all choices, so that "
            f"{theirs} is 0"
        )
    elif moe.balance_loss_coeff and "moe.balance_loss_coeff" not in kept:
        found.append(_lost(f"moe.balance_loss_coeff {moe.balance_loss_coeff:g}", family))
    if moe.z_loss_coeff:
        found.append(_lost(f"moe.z_loss_coeff {moe.z_loss_coeff:g}", family))
    if moe.input_jitter and "moe.input_jitter" not in kept:
        found.append(_lost(f"moe.input_jitter {moe.input_jitter:g}", family))
    elif moe.input_jitter:
        found.append(
            f"moe.input_jitter {moe.input_jitter:g}: {kept['moe.input_jitter']} jitters what enters the experts, too"
        )
    return found


def _lost(setting: str, family: Family) -> str:
    return f"{setting}: a setting of training that {family.architecture} has no key for"


def _their_training(config: Config, family: Family, their_config: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} {their_config[key]:g}: a setting of training that megamoe has no key for"
        for key in ("activation_dropout", "layerdrop")
        if key in family.defaults and their_config.get(key)
    ]
