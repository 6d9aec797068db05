"""The tokenizer of a Hugging Face folder as files that megamoe's own tokenizers read, or the reason why it is none."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from megamoe.config.schema import TokenizerConfig
from megamoe.convert.hf_tokenizers import PROBES, byte_vocabulary, prove
from megamoe.data.tokenizers import GPT2_END_OF_DOCUMENT, build_tokenizer
from megamoe.errors import ConversionError

_GPT2_CLASSES = {None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
_USUAL_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def import_tokenizer(folder: Path, out: Path, *, texts: Iterable[str] = ()) -> TokenizerConfig:
    """Write the tokenizer of `folder` into `out` (made where it is missing) and say how megamoe is to load it.

    tokenizer.model is a sentencepiece model; a tokenizer.json, or vocab.json and merges.txt, may be GPT-2's byte-level
    BPE, or the byte tokenizer that megamoe exports. Where there is a tokenizer.json, ids of `PROBES` and `texts` are
    compared.

    Raises:
        DataError: a file is damaged, or marks no ends of documents.
        ConversionError: the folder has no tokenizer, or one whose ids megamoe cannot give; the message says why.
    """
    tree = _read_json(folder / "tokenizer.json")
    settings = _read_json(folder / "tokenizer_config.json") or {}
    if (folder / "tokenizer.model").exists():
        kind, files = "sentencepiece", {"tokenizer.model": (folder / "tokenizer.model").read_bytes()}
        vocabulary = None
    elif tree is not None and (tree.get("model") or {}).get("vocab") == byte_vocabulary():
        kind, files, vocabulary = "byte", {}, byte_vocabulary()
    else:
        kind, (files, vocabulary) = "gpt2_bpe", _gpt2_files(folder, tree, settings)
    if tree is not None:
        _check_added(folder, tree, vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_bytes(content)
    path = {"byte": None, "sentencepiece": str(out / "tokenizer.model"), "gpt2_bpe": str(out)}[kind]
    config = TokenizerConfig(kind=kind, path=path)
    ours = build_tokenizer(config)
    if tree is not None:
        prove(ours, json.dumps(tree), chain(PROBES, texts))
    return config


def _gpt2_files(folder: Path, tree: Any, settings: dict[str, Any]) -> tuple[dict[str, bytes], dict[str, int]]:
    pair = (folder / "vocab.json", folder / "merges.txt")
    if tree is not None:
        vocabulary, merges = _of_json(folder, tree)
    elif all(path.exists() for path in pair):
        given = settings.get("tokenizer_class")
        if given not in _GPT2_CLASSES or settings.get("add_prefix_space"):
            raise ConversionError(f"{folder} has a {given}, which splits texts in another way than GPT-2's: bring a "
                                  "folder with a tokenizer.model, or train a tokenizer")  # fmt: skip
        vocabulary, merges = _read_json(pair[0]), None
    else:
        raise ConversionError(
            f"{folder} holds no tokenizer that megamoe reads: neither tokenizer.model, nor tokenizer.json, nor "
            "vocab.json with merges.txt"
        )
    if GPT2_END_OF_DOCUMENT not in vocabulary:
        raise ConversionError(
            f"the tokenizer of {folder} has no {GPT2_END_OF_DOCUMENT}, which marks ends of documents in megamoe's"
        )
    lines = pair[1].read_bytes() if merges is None else ("#version: 0.2\n" + "".join(merges)).encode()
    return {"vocab.json": json.dumps(vocabulary, ensure_ascii=False).encode(), "merges.txt": lines}, vocabulary


def _of_json(folder: Path, tree: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and lines of merges of a tokenizer.json that does as GPT-2 does."""
    model, where = tree.get("model") or {}, f"the tokenizer.json of {folder}"
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        kind = f"{model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
        raise ConversionError(
            f"{where} is of the kind {kind} and has no tokenizer.model beside it: only GPT-2's byte-level BPE can be "
            "read from a tokenizer.json"
        )
    if tree.get("normalizer") is not None:
        raise ConversionError(
            f"{where} changes texts by {tree['normalizer'].get('type')} before it splits them, GPT-2's does not"
        )
    if {**_USUAL_STEP, **(tree.get("pre_tokenizer") or {"type": None}), "trim_offsets": None} != {
        **_USUAL_STEP,
        "trim_offsets": None,
    }:
        kind = (tree.get("pre_tokenizer") or {}).get("type")
        raise ConversionError(f"{where} splits texts by {kind} with settings of its own, not as GPT-2's does")
    vocabulary = dict(model["vocab"])
    for token in tree.get("added_tokens") or []:
        if token.get("special"):  # never in a text, but an id that the model has
            vocabulary.setdefault(token["content"], token["id"])
    return vocabulary, [(line if isinstance(line, str) else " ".join(line)) + "\n" for line in model["merges"]]


def _check_added(folder: Path, tree: dict[str, Any], vocabulary: dict[str, int] | None) -> None:
    """Tokens beside the vocabulary that are looked up in texts; those of a sentencepiece model (None) are its own."""
    for token in tree.get("added_tokens") or []:
        if vocabulary is not None and not token.get("special"):
            raise ConversionError(
                f"the tokenizer.json of {folder} looks for the added token {token['content']!r} in texts, which "
                "megamoe's tokenizer cannot"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
