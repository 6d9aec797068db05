"""JSON Lines files of a task's examples, one object a line. No tokens here.

{"text": …, "label": …} for classification; {"prompt": …, "completion": …} or {"text": …} for a language model. Keys
besides are left alone, as are empty lines.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.config.schema import Config
from megamoe.data.json_text import check_text, json_object, text_of
from megamoe.errors import DataError

_SHOWN_LABELS = 12
MAX_CLASSES = 1 << 20  # more are no classes but a mistake, such as an identifier in place of a label


@dataclass(frozen=True)
class Record:
    """An example as it was read. `where`: file and line. `text`: what follows the prompt. `label`: a class's number."""

    where: str
    prompt: str
    text: str
    label: int | None


@dataclass(frozen=True)
class Summary:
    """How many examples files hold, and the labels in them where they were asked for: names in alphabetical order, or
    numbers up to the largest as texts."""

    num_examples: int
    labels: tuple[str, ...]
    are_numbers: bool


def read_records(paths: Sequence[str], config: Config) -> Iterator[Record]:
    """Every example of the files, in order. Raises DataError, naming file and line, for what is none of the task."""
    if config.finetune.objective != "classification":
        for where, tree in _objects(paths):
            yield _of_language_model(where, tree)
        return
    numbers = {name: number for number, name in enumerate(config.finetune.labels)}
    for where, tree in _objects(paths):
        text = text_of(where, tree, "text")
        yield Record(where, "", text, _number_of(where, tree, numbers, config.model.num_labels))


def summarize(paths: Sequence[str], *, with_labels: bool) -> Summary:
    """Count the examples and collect their labels. Raises DataError for files that cannot be read, or hold none, and,
    with_labels, for a line without a label or with one that is none, and for labels that are no two classes."""
    count, found = 0, {}
    for where, tree in _objects(paths):
        count += 1
        if with_labels:
            label = _label(where, tree)
            if isinstance(label, int) and label >= MAX_CLASSES:
                raise DataError(
                    f"{where}: the label {label} is too large: numbers count the classes from 0, of which there may be "
                    f"{MAX_CLASSES}; write names as texts"
                )
            if found.setdefault(str(label), label) != label:
                raise DataError(
                    f"{where}: the label {json.dumps(label)} stands in an earlier line as "
                    f"{json.dumps(found[str(label)])}: write it always as a number, or always as a text"
                )
    are_numbers = bool(found) and all(isinstance(label, int) for label in found.values())
    names = [str(number) for number in range(max(found.values()) + 1)] if are_numbers else sorted(found)
    if with_labels and len(names) < 2:
        raise DataError(
            f'every line of {", ".join(paths)} has the label "{names[0]}": write examples of another class, too, or '
            "name all classes in finetune.labels"
        )
    return Summary(count, tuple(names), are_numbers)


def _objects(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not empty."""
    for path in paths:
        is_empty = True
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        is_empty = False
                        yield f"{path}, line {number}", json_object(f"{path}, line {number}", line)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not a text file in UTF-8: give a JSON Lines file") from None
        if is_empty:
            raise DataError(f"{path} holds no examples: write one JSON object a line")


def _of_language_model(where: str, tree: dict[str, Any]) -> Record:
    if "prompt" not in tree and "completion" not in tree:
        if "text" not in tree:
            keys = ", ".join(tree) or "none"
            raise DataError(f'{where} has neither "text" nor "prompt" and "completion": its keys are {keys}')
        return Record(where, "", _filled(where, tree, "text"), None)
    return Record(where, text_of(where, tree, "prompt"), _filled(where, tree, "completion"), None)


def _filled(where: str, tree: dict[str, Any], key: str) -> str:
    text = text_of(where, tree, key)
    if not text:
        raise DataError(f'{where}: "{key}" is empty: there is nothing to learn')
    return text


def _label(where: str, tree: dict[str, Any]) -> int | str:
    if "label" not in tree:
        raise DataError(f'{where} has no "label": its keys are {", ".join(tree) or "none"}')
    label = tree["label"]
    if isinstance(label, bool) or not isinstance(label, int | str) or (isinstance(label, int) and label < 0):
        raise DataError(f'{where}: "label" is {json.dumps(label)[:80]}: it must be a name, or a number from 0')
    if isinstance(label, str):
        check_text(where, "label", label)
    return label


def _number_of(where: str, tree: dict[str, Any], numbers: dict[str, int], num_labels: int) -> int:
    label = _label(where, tree)
    if numbers:
        if str(label) in numbers:
            return numbers[str(label)]
        known = [*numbers][:_SHOWN_LABELS] + (["…"] if len(numbers) > _SHOWN_LABELS else [])
        raise DataError(f'{where}: the label "{label}" is unknown: finetune.labels names {", ".join(known)}')
    if isinstance(label, str) or label >= num_labels:
        raise DataError(
            f"{where}: the label {json.dumps(label)} is not a number from 0 to {num_labels - 1} (model.num_labels "
            f"{num_labels}): mend the file, or name the classes in finetune.labels"
        )
    return label
