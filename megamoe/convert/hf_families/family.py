"""What the converter knows of one Hugging Face class, and what families share in reading and writing config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megamoe.config.schema import Config, MoEConfig
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.names import Names
from megamoe.errors import ConversionError
from megamoe.topology.parameters import experts_by_layer, moe_layers

Tree = dict[str, dict[str, Any]]  # sections "model" and "moe" of our configuration
_LANGUAGE_MODEL, _CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
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
    has_classifier: bool = True  # whether transformers has the class with a head in place of the output matrix
    is_classifier: bool = False

    def classifier(self) -> "Family":
        """The class of the same model with a head of labels."""
        name = self.architecture.replace(_LANGUAGE_MODEL, _CLASSIFIER)
        return replace(self, architecture=name, is_classifier=True)

    def all_refusals(self, config: Config) -> list[str]:
        """`refusals`, and whether it is a language model or a classifier."""
        if bool(config.model.num_labels) == self.is_classifier:
            return self.refusals(config)
        if self.is_classifier:
            return ["model.num_labels 0: it is a classifier"]
        why = "a language model" + ("" if self.has_classifier else ", and transformers has no classifier of its kind")
        return [f"model.num_labels {config.model.num_labels}: it is {why}", *self.refusals(config)]

    def read_labels(self, their_config: Mapping[str, Any]) -> list[str]:
        """The names of a classifier's classes, in order. Raises ConversionError where they are not numbered from 0."""
        names = their_config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # two, where none are written
        try:
            return [names[str(number)] for number in range(len(names))]
        except KeyError:
            raise ConversionError(
                f"config.json of {self.architecture}: id2label has the numbers {', '.join(names)}: they must count "
                "from 0"
            ) from None

    def write_labels(self, config: Config) -> dict[str, Any]:
        """The keys of a classifier beside those of its model."""
        names = config.finetune.labels or [f"LABEL_{number}" for number in range(config.model.num_labels)]
        return {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }


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
