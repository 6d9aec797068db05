"""Lines that people bring, one JSON object each: what is wrong with one is said in a sentence that names it."""

import json
from typing import Any

from megamoe.errors import DataError

MAX_SHOWN_KEYS = 10


def json_object(where: str, line: str) -> dict[str, Any]:
    """The object that a line holds. Raises DataError."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a JSON {type(entry).__name__} where an object is expected")
    return entry


def text_of(where: str, entry: dict[str, Any], key: str, *, advice: str = "") -> str:
    """What the object holds under `key`. Raises DataError for what is no text; `advice` follows where there is no such
    key."""
    if key not in entry:
        keys = ", ".join(sorted(entry)[:MAX_SHOWN_KEYS]) or "none"
        raise DataError(f"{where}: no key {key!r} (keys here: {keys}){advice}")
    text = entry[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} holds a {type(text).__name__} where text is expected")
    check_text(where, key, text)
    return text


def check_texts(where: str, entry: dict[str, Any]) -> None:
    """Raises DataError where a text of the object, however deep it lies, cannot be written as UTF-8; it is named by its
    path, as in "choices.0.text"."""
    left: list[tuple[str, Any]] = [("", entry)]  # no recursion: lines may be nested deeper than calls
    while left:
        path, value = left.pop()
        if isinstance(value, str):
            check_text(where, path, value)
        elif isinstance(value, dict | list):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            head = f"{path}." if path else ""
            left += [(f"{head}{name}", part) for name, part in parts if isinstance(part, str | dict | list)]


def check_text(where: str, key: str, text: str) -> None:
    """Raises DataError for half of a surrogate pair, which JSON may spell and which is no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} holds a lone surrogate at character {error.start}") from None
