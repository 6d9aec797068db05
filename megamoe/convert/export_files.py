"""The small files of a Hugging Face folder: configuration, generation defaults, tokenizer, code, card."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megamoe.checkpoint.manifest import Manifest
from megamoe.checkpoint.strict_json import checksum
from megamoe.config.schema import Config, TokenizerConfig
from megamoe.convert.custom_code import AUTO_MAP, custom_files
from megamoe.convert.hf_families import custom
from megamoe.convert.hf_tokenizers import TokenizerExport, export_tokenizer
from megamoe.convert.links import Conversion
from megamoe.convert.model_card import generation_config, model_card
from megamoe.errors import ConversionError, DataError
from megamoe.topology.parameters import padded_vocab_size

# transformers blanks the position of XGLM's pad_token_id, so that class keeps its ids out of config.json.
_IDS_ONLY_FOR_GENERATION = ("XGLMForCausalLM",)


def tokenizer_files(config: Config, *, path: str | None = None, texts: Iterable[str] = ()) -> TokenizerExport:
    """The tokenizer of the run, or the same kind at another `path`. Raises ConversionError where it is not found."""
    tokenizer: TokenizerConfig = config.data.tokenizer
    if path is not None:
        tokenizer = tokenizer.model_copy(update={"path": path})
    try:
        return export_tokenizer(
            tokenizer, model_rows=padded_vocab_size(config.model), max_length=config.model.seq_length, texts=texts
        )
    except DataError as error:
        raise ConversionError(
            f"the tokenizer cannot be exported: {error}; name its file with --tokenizer, or leave it out with "
            "--no-tokenizer"
        ) from None


def export_files(
    their_config: Mapping[str, Any],
    table: Conversion,
    manifest: Manifest,
    tokenizer: TokenizerExport | None,
    *,
    name: str,
    dtype: str,
) -> dict[str, bytes]:
    """File name -> content of everything in the folder that is no weight; checksums of those are in conversion.json."""
    architecture = their_config["architectures"][0]
    settings, files = dict(their_config), {}
    ids = {} if tokenizer is None else tokenizer.special.settings()
    if architecture not in _IDS_ONLY_FOR_GENERATION:
        settings |= ids
    if their_config["model_type"] == custom.MODEL_TYPE:
        settings["auto_map"] = AUTO_MAP
        files |= custom_files()
    if tokenizer is not None:
        files |= tokenizer.files
    files["config.json"] = _json(settings)
    if not table.config.model.num_labels:
        files["generation_config.json"] = generation_config(tokenizer and tokenizer.special)
    card = model_card(
        table.config, name=name, architecture=architecture, dtype=dtype, state=manifest.state,
        checksums={
            f"megamoe manifest of step {manifest.step}": f"xxh3_64:{manifest.checksum}",
            **{file: f"xxh3_64:{checksum(content)}" for file, content in files.items()},
        },
        has_tokenizer=tokenizer is not None, notes=table.notes,
    )  # fmt: skip
    return files | {"README.md": card.encode()}


def lines_of(path: Path) -> Iterable[str]:
    """Lines of a text file, without their ends. Raises ConversionError where it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read as text: {error}") from None


def _json(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, ensure_ascii=False) + "\n").encode()
