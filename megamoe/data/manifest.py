"""PREFIX.json beside a dataset: how it was made, so that runs can check that it fits them."""

import json
import os
from pathlib import Path
from typing import Any

from megamoe.errors import DataError

FORMAT_VERSION = 1


def manifest_path(prefix: str | Path) -> Path:
    """Where the description of a dataset lies."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path) -> dict[str, Any] | None:
    """The description of a dataset, or None where there is none: datasets made by Megatron's tools have none.

    Raises:
        DataError: the file is there but is no such description.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; remove it or run tools/preprocess_data.py again") from error
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} does not describe a dataset of format version {FORMAT_VERSION}: remove or rebuild it")
    return content


def write_manifest(prefix: str | Path, content: dict[str, Any]) -> None:
    """Write the description in one step: readers see the old one or the new one."""
    path = manifest_path(prefix)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2, ensure_ascii=False)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_vocabulary(prefix: str | Path, vocab_size: int) -> None:
    """Refuse a dataset whose tokenizer has more ids than the model; pass where nothing is known.

    Raises:
        DataError: the model's vocabulary is too small.
    """
    content = read_manifest(prefix) or {}
    written = content.get("tokenizer", {}).get("vocab_size", 0)
    if written > vocab_size:
        raise DataError(
            f"{prefix} was written with a tokenizer of {written} ids, but model.vocab_size is {vocab_size}: "
            f"set model.vocab_size to {written} or more"
        )


def check_tokenizer(prefix: str | Path, description: dict[str, Any]) -> None:
    """Refuse a tokenizer that is not the one a dataset was written with; pass where nothing is known.

    Args:
        prefix: the dataset.
        description: `tokenizer.describe()`.

    Raises:
        DataError: kind, files or vocabulary differ.
    """
    content = read_manifest(prefix)
    if content is None:
        return
    written = content["tokenizer"]
    for key in ("kind", "vocab_size", "sha256"):
        if written.get(key) != description[key]:
            raise DataError(
                f"{prefix} was written with another tokenizer than data.tokenizer: its {key} is "
                f"{written.get(key)}, here it is {description[key]}"
            )


def same_inputs(written: dict[str, Any] | None, wanted: dict[str, Any]) -> tuple[bool, str]:
    """Whether an output that `written` describes is what `wanted` would make, and the first difference if not.

    Input files count as the same when name, size and hash (of large ones: time of last change) agree, whatever their
    folder.
    """
    if written is None:
        return False, "nothing says how it was made"
    for key, value in wanted.items():
        if _comparable(key, written.get(key)) != _comparable(key, value):
            return False, f"{key} differ" if key.endswith("s") else f"{key} differs"
    return True, ""


def _comparable(key: str, value: Any) -> Any:
    if key != "sources" or not isinstance(value, list):
        return value
    return [{**source, "path": Path(source["path"]).name} for source in value]
