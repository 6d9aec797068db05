"""Configurations and tables for the Hugging Face classes, both ways. Arithmetic on dictionaries: no torch, no models.

A conversion to them keeps what the model computes in evaluation with drops off; what a class cannot express is
refused by name. Settings that matter in training alone are kept where the class has a key for them, and named in the
notes where it has not.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.convert.hf_families import custom, modern, xglm
from megamoe.convert.hf_families.computed import differences
from megamoe.convert.hf_families.family import Family
from megamoe.convert.hf_families.keys import Keys
from megamoe.convert.hf_families.notes import notes_of
from megamoe.convert.hf_families.tensors import build_tables
from megamoe.convert.links import Conversion
from megamoe.errors import ConfigError, ConversionError
from megamoe.topology.parameters import padded_vocab_size

NATIVE = (xglm.FAMILY, *modern.FAMILIES)  # in order of preference, where several fit
_CLASSIFIERS = tuple(family.classifier() for family in (*NATIVE, custom.FAMILY) if family.has_classifier)
FAMILIES: Mapping[str, Family] = {family.architecture: family for family in (*NATIVE, custom.FAMILY, *_CLASSIFIERS)}
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_VOCAB_MULTIPLE = 128


def choose_architecture(config: Config) -> tuple[str, dict[str, list[str]]]:
    """The class for this model, a native one where one computes exactly the same, and why each other was refused.

    The reasons are by class, one clause each. MegamoeForCausalLM fits every language model, and its kin for sequence
    classification every classifier.
    """
    refused: dict[str, list[str]] = {}
    wants_classifier = config.model.num_labels > 0
    for family in NATIVE:
        chosen = family.classifier() if wants_classifier and family.has_classifier else family
        refused[chosen.architecture] = chosen.all_refusals(config)
        if not refused[chosen.architecture]:
            return chosen.architecture, {name: reasons for name, reasons in refused.items() if reasons}
    ours = custom.FAMILY.classifier() if wants_classifier else custom.FAMILY
    return ours.architecture, refused


def to_hf_config(
    config: Config, *, dtype: str, architecture: str | None = None, drops_off: bool = False,
    cut_vocabulary: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """config.json of this model. `dtype` is float32, bfloat16 or float16 (or F32, BF16, F16); None chooses the class.

    `drops_off` accepts that no token is dropped any more where this model drops tokens over capacity. `cut_vocabulary`
    leaves out the rows that fill the vocabulary up: the softmax is then over tokens alone. The ids of special tokens
    are null: they are the tokenizer's to give. Raises ConversionError with what the class cannot express.
    """
    name = DTYPES.get(dtype, dtype)
    if name not in DTYPES.values():
        raise ConversionError(f"dtype {dtype!r} is unknown: use {', '.join(DTYPES.values())}")
    family = _family(choose_architecture(config)[0] if architecture is None else architecture)
    _check_drops(config, drops_off)
    reasons = family.all_refusals(config)
    if reasons:
        raise ConversionError(f"{family.architecture} cannot express {'; '.join(reasons)}")
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": name,
        "vocab_size": config.model.vocab_size if cut_vocabulary else padded_vocab_size(config.model),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
        **family.write(config),
        **(family.write_labels(config) if family.is_classifier else {}),
    }


def from_hf_config(
    their_config: Mapping[str, Any], *, vocab_multiple: int | None = None, ignored: Collection[str] = ()
) -> Config:
    """A configuration of the same model, everything but the sections `model` and `moe`, and a classifier's labels, at
    its defaults.

    `vocab_multiple`: pad the rows of the vocabulary to a multiple of it; None pads none. `ignored`: keys of theirs that
    the user says change nothing. Raises ConversionError for what megamoe cannot express, unknown keys included.
    """
    family = family_of(their_config)
    keys = Keys(family.architecture, their_config, family.defaults)
    vocab_size = keys.take("vocab_size")
    tree = family.read(keys)
    keys.finish(ignored)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConversionError(f"config.json of {family.architecture} says vocab_size {vocab_size!r}: use 1 or more")
    multiple = math.gcd(vocab_size, _VOCAB_MULTIPLE) if vocab_multiple is None else vocab_multiple
    tree["model"] |= {"vocab_size": vocab_size, "vocab_size_multiple": multiple}
    if family.is_classifier:
        labels = family.read_labels(their_config)
        tree["model"]["num_labels"] = len(labels)
        tree["finetune"] = {"objective": "classification", "labels": labels}
    try:
        config = Config.model_validate(tree)
        validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConversionError(f"config.json of {family.architecture}: {where}: {first['msg']}") from None
    except ConfigError as error:
        raise ConversionError(f"config.json of {family.architecture}: {error}") from None
    return config


def conversion(
    config: Config,
    their_config: Mapping[str, Any],
    *,
    stored: Collection[str] | None = None,
    drops_off: bool = False,
    ignored: Collection[str] = (),
) -> Conversion:
    """The whole table for one model in both formats, proved; `config` and `their_config` compute the same.

    `stored` are the tensor names found in their folder, where there is one: experts may be stacked there, and tied
    weights stored twice. Without it the names are those that save_pretrained writes. Raises ConversionError where the
    two configurations differ in what they compute, and as `from_hf_config` does.
    """
    family = family_of(their_config)
    theirs = from_hf_config(their_config, ignored=ignored)
    _check_drops(config, drops_off)
    found = differences(config, theirs)
    if found:
        raise ConversionError(
            f"the configuration and config.json of {family.architecture} are not of one model: {'; '.join(found)}"
        )
    vocab_size = theirs.model.vocab_size
    tables = build_tables(config, family.names(config), vocab_size, stored)
    made = Conversion(
        config=config,
        their_config=their_config,
        ours=tables.ours,
        theirs=tables.theirs,
        links=tuple(tables.links),
        constants=tuple(tables.constants),
        duplicates=tuple(tables.duplicates),
        paddings=tuple(tables.paddings),
        notes=notes_of(config, family, their_config, vocab_size),
    )
    made.prove()
    return made


def family_of(their_config: Mapping[str, Any]) -> Family:
    """The class that a config.json names. Raises ConversionError for one that is not converted."""
    listed = their_config.get("architectures")
    model_type = their_config.get("model_type")
    if listed is None:
        found = [family for family in FAMILIES.values() if family.model_type == model_type]
        if not found:
            raise ConversionError(f"config.json names no architecture, and its model_type {model_type!r} is unknown")
        return found[0]
    if not isinstance(listed, list) or len(listed) != 1:
        raise ConversionError(f"config.json says architectures {listed!r}: one class is needed")
    family = _family(listed[0])
    if model_type not in (None, family.model_type):
        raise ConversionError(
            f"config.json says architectures {listed!r} but model_type {model_type!r}, which is another model's"
        )
    return family


def _family(architecture: str) -> Family:
    if architecture not in FAMILIES:
        raise ConversionError(f"{architecture} is not converted: use {', '.join(FAMILIES)}")
    return FAMILIES[architecture]


def _check_drops(config: Config, drops_off: bool) -> None:
    if config.moe.num_experts and not config.moe.dropless and not drops_off:
        raise ConversionError(
            "moe.dropless is false: in evaluation, too, tokens over capacity are dropped, which no Hugging Face class "
            "does; ask for the conversion with drops off to have the same weights drop none"
        )
