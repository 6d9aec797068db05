"""Checkpoints of one model, averaged: such as the last ones of a run, or runs from one beginning (model soups)."""

import math
from collections.abc import Sequence
from pathlib import Path

from megamoe.checkpoint.slices import whole_box
from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.errors import ConfigError, ConversionError
from megamoe.surgery.recipes import Plan, Region, Target, Term
from megamoe.surgery.sources import BALANCE_BIAS, WEIGHT, Sources, changed_config
from megamoe.topology.parameters import moe_layers, param_table

# Keys of model and moe that say how a run trains and not what its weights mean.
_OF_TRAINING = {
    "seq_length", "attention_dropout", "hidden_dropout", "init", "init_std", "recompute_activation", "dropless",
    "capacity_factor", "drop_policy", "eval_capacity_factor", "eval_capacity_fraction", "normalize_when",
    "balance_bias_update_rate", "balance_loss", "balance_loss_scope", "balance_loss_coeff", "z_loss_coeff",
    "input_jitter",
}  # fmt: skip


def plan_average(sources: Sources, weights: Sequence[float] | None = None) -> Plan:
    """The average of all sources, in the order given: sums in fp64, rounded once, to fp32 whatever they are.

    weights: one for each, above 0; they are divided by their sum. None: all count the same. Balance biases are
    averaged, too. Settings are the first source's. Raises ConversionError for sources of different models, ConfigError
    for fewer than two of them or for weights that do not fit.
    """
    number = len(sources.folders)
    if number < 2:
        raise ConfigError("one checkpoint has no average: give two or more")
    shares = [1.0] * number if weights is None else [float(weight) for weight in weights]
    if len(shares) != number:
        raise ConfigError(f"{len(shares)} weights are given for {number} checkpoints: give one for each")
    if not all(0 < share < math.inf for share in shares):
        raise ConfigError(f"weights {shares} must all be above 0")
    for folder, config in zip(sources.folders[1:], sources.configs[1:], strict=True):
        _check_same_model(sources.config, config, sources.folders[0], folder)
    config = changed_config(sources, (), {})
    validate(config)
    factors = [share / math.fsum(shares) for share in shares]
    targets = [_target(sources, WEIGHT, p.name, factors) for p in param_table(config.model, config.moe)]
    for layer in moe_layers(config.model, config.moe):
        if any(sources.balance_bias(layer, source) is not None for source in range(number)):
            targets.append(_target(sources, BALANCE_BIAS, f"layers.{layer}.router", factors))
    notes = (f"factors {', '.join(f'{factor:.6g}' for factor in factors)}; weights are fp32",)
    preserves = "no function of theirs; the average of their weights"
    return Plan("average", {"factors": factors}, config, tuple(targets), preserves, notes)


def _target(sources: Sources, kind: str, name: str, factors: Sequence[float]) -> Target:
    terms = []
    for source, factor in enumerate(factors):
        if kind == WEIGHT:
            entry = sources.parameter(name, source)
        else:
            entry = sources.checkpoints[source].manifest.tensors.get((kind, name))
        if entry is None:
            raise ConversionError(f"{sources.folders[source]} has no {kind} {name}, which another of them has")
        terms.append(Term(source, entry, whole_box(entry.shape), factor))
    shape = terms[0].entry.shape
    return Target(kind, name, "F32", shape, (Region(whole_box(shape), tuple(terms)),))


def _check_same_model(one: Config, other: Config, one_folder: Path, other_folder: Path) -> None:
    for section in ("model", "moe"):
        here, there = getattr(one, section).model_dump(mode="json"), getattr(other, section).model_dump(mode="json")
        for key, value in here.items():
            if key not in _OF_TRAINING and there[key] != value:
                raise ConversionError(
                    f"{one_folder} and {other_folder} are different models ({section}.{key} {value} and {there[key]}): "
                    "only checkpoints of one model have an average"
                )
