"""README.md and generation_config.json of an exported model: what it is, what it was trained on, what it is not."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megamoe import __version__
from megamoe.config.schema import Config
from megamoe.convert.hf_tokenizers import SpecialIds
from megamoe.topology.parameters import (
    dimensions,
    experts_by_layer,
    num_active_parameters,
    num_parameters,
    padded_vocab_size,
    param_table,
)

_CUSTOM = "Megamoe"


def generation_config(special: SpecialIds | None) -> bytes:
    """generation_config.json: greedy unless asked otherwise; special ids where a tokenizer says which they are."""
    ids = special.settings() if special is not None else {}
    return (json.dumps({**ids, "do_sample": False}, indent=2) + "\n").encode()


def model_card(
    config: Config,
    *,
    name: str,
    architecture: str,
    dtype: str,
    state: Mapping[str, Any],
    checksums: Mapping[str, str],
    has_tokenizer: bool,
    notes: Iterable[str] = (),
) -> str:
    """The text of README.md.

    Args:
        config: of the checkpoint's manifest.
        name: the heading.
        architecture: the class of transformers that the folder is for.
        dtype: of the stored weights: float32, bfloat16 or float16.
        state: of the manifest; `step`, `samples` and `skipped_steps` are read.
        checksums: file name -> algorithm and digest, such as "sha256:...".
        notes: sentences of the conversion about what it changed.
    """
    flag = ", trust_remote_code=True" if architecture.startswith(_CUSTOM) else ""
    is_classifier = config.model.num_labels > 0
    auto = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    load = [f"from transformers import {auto}, AutoTokenizer", ""]
    load.append(f'model = {auto}.from_pretrained(FOLDER, dtype="auto"{flag})')
    if has_tokenizer:
        load.append(f"tokenizer = AutoTokenizer.from_pretrained(FOLDER{flag})")
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: "
        + ("text-classification" if is_classifier else "text-generation")
        + "\ntags:\n- megamoe\n"
        + ("- moe\n" if config.moe.num_experts else "")
        + "---",
        f"# {name}",
        _summary(config, architecture),
        "## Use\n```python\n" + "\n".join(load) + "\n```",
        "## Model\n" + _table(_model_rows(config, dtype)),
        "## Data\n" + _data(config),
        "## Training\n" + _table(_training_rows(config, state)),
        "## Limits\n" + "\n".join(f"- {limit}" for limit in [*_limits(config, has_tokenizer), *notes]),
        "## Files\n" + _table([(f"`{file}`", f"`{digest}`") for file, digest in sorted(checksums.items())]),
        f"Written by megamoe {__version__}.",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(config: Config, architecture: str) -> str:
    table = param_table(config.model, config.moe)
    total, active = num_parameters(table), num_active_parameters(table, config.moe)
    what = f"classifier of {config.model.num_labels} labels" if config.model.num_labels else "language model"
    kind = f"A mixture-of-experts {what}" if config.moe.num_experts else f"A dense {what}"
    passed = f", of which a token passes {active:,}" if active != total else ""
    return f"{kind} for `{architecture}`, with {total:,} parameters{passed}."


def _model_rows(config: Config, dtype: str) -> list[tuple[str, str]]:
    model, moe, sizes = config.model, config.moe, dimensions(config.model, config.moe)
    rows = [
        ("layers", str(model.num_layers)),
        ("hidden size", str(sizes.hidden)),
        ("attention heads", f"{sizes.heads} of {sizes.head_dim}, {sizes.query_groups} for keys and values"),
        ("FFN size", str(sizes.ffn)),
        ("vocabulary", f"{model.vocab_size} ids, {padded_vocab_size(model)} rows"),
        ("context", f"{model.seq_length} tokens"),
        ("norm, activation, positions", f"{model.normalization}, {model.activation}, {model.position_embedding}"),
        ("weights", dtype),
    ]
    counts = experts_by_layer(model, moe)
    if counts:
        rows += [
            ("layers with experts (from 0)", ", ".join(map(str, counts))),
            ("experts of a layer", ", ".join(map(str, dict.fromkeys(counts.values())))),
            ("experts a token passes", f"{moe.top_k}, by {moe.score_function}"),
            ("FFN size of an expert", str(sizes.expert_ffn)),
        ]
        if sizes.shared_expert_ffn:
            rows.append(("FFN size of the shared expert", f"{sizes.shared_expert_ffn}, {moe.shared_expert_mix}"))
    return rows


def _data(config: Config) -> str:
    """Corpora by their files' names: whole paths are about a machine."""
    if not config.data.train and config.finetune.train_files:
        names = ", ".join(f"`{Path(path).name}`" for path in config.finetune.train_files)
        return f"Fine-tuned on the examples of {names}."
    if not config.data.train:
        return "The checkpoint names no training data."
    total = sum(corpus.weight for corpus in config.data.train)
    return _table([(f"`{Path(corpus.path).name}`", f"{corpus.weight / total:.1%}") for corpus in config.data.train])


def _training_rows(config: Config, state: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, optimizer = config.run, config.optimizer
    rows = []
    if "step" in state:
        skipped = state.get("skipped_steps", 0)
        rows.append(("optimizer steps", f"{state['step']:,}" + (f", {skipped:,} of them skipped" if skipped else "")))
    if "samples" in state:
        tokens = state["samples"] * config.model.seq_length
        rows.append(("seen", f"{state['samples']:,} sequences, {tokens:,} tokens"))
    return [
        *rows,
        ("global batch", f"{run.global_batch_size} sequences of {config.model.seq_length} tokens"),
        ("precision", run.precision),
        ("optimizer", f"{optimizer.name}, learning rate {optimizer.lr:g}, schedule {optimizer.schedule}"),
    ]


def _limits(config: Config, has_tokenizer: bool) -> list[str]:
    model, moe = config.model, config.moe
    limits = []
    if moe.num_experts and not moe.dropless:
        limits.append(
            f"In training an expert took a limited number of tokens (capacity factor {moe.capacity_factor:g}) and "
            "dropped the rest. Here no token is dropped: answers do not depend on what else is in the batch."
        )
    if padded_vocab_size(model) != model.vocab_size and not model.num_labels:
        limits.append(
            f"Rows {model.vocab_size} to {padded_vocab_size(model) - 1} of the vocabulary are padding. Their logits "
            "count in the softmax, as they did in training."
        )
    limits.append(f"It was trained on sequences of {model.seq_length} tokens; longer texts were never seen.")
    if has_tokenizer:
        limits.append(
            "The tokenizer adds no special tokens, and reads special tokens in a text as text like any other "
            "(`split_special_tokens`). What ends a document is also what begins one."
        )
    if model.num_labels:
        limits.append("Its answer stands at the last token: pad texts on the right, with the tokenizer's own token.")
        return limits
    limits.append("It continues text. It was trained neither to follow instructions nor to avoid harm.")
    return limits


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])
