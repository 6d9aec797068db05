"""Templates of a task: text with named fields of a data line, "{activity_label}: {ctx_a} {ctx_b|capitalize} {choice}".

A field is a path into the line: names, or numbers in a list, joined by dots. Behind `|` stand filters, applied in
order. `{choice}` is where a choice goes; `{sentence|fill:_}` puts it in place of each `_` of a field. `{{` is a brace.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHOICE = "\0"  # stands for the choice in a rendered text; no text holds it
FILTERS = {
    "capitalize": "the first letter as a capital",
    "strip": "no space before and behind",
    "drop:TEXT": "without each TEXT",
    "fill:MARK": "the choice in place of each MARK",
}
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|([^{}]+)|([{}])")


class FieldError(Exception):
    """A line has not what a template asks for; the message does not say which line."""


@dataclass(frozen=True)
class _Field:
    path: str
    filters: tuple[tuple[str, str], ...]  # (name, argument)


@dataclass(frozen=True)
class Template:
    """A parsed template. `text` is how it was written."""

    text: str
    parts: tuple[str | _Field, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Raises ValueError for a brace without its other, an empty name, an unknown filter, or one on the choice."""
        if CHOICE in text:
            raise ValueError(f"{text!r} holds a NUL character")
        parts: list[str | _Field] = []
        for match in _PIECE.finditer(text):
            if match[3]:
                brace = match[3]
                raise ValueError(f'"{text}" has a {brace} without its other: write {brace * 2} for one of the text')
            parts.append(match[0][0] if match[0] in ("{{", "}}") else match[2] or _parse_field(match[1], text))
        return cls(text, tuple(parts))

    @property
    def has_choice(self) -> bool:
        return any(part.path == "choice" or _fills(part) for part in self.parts if isinstance(part, _Field))

    @property
    def ends_with_choice(self) -> bool:
        last = self.parts[-1] if self.parts else ""
        others = self.parts[:-1]
        ends = isinstance(last, _Field) and last.path == "choice"
        return ends and not any(isinstance(part, _Field) and (part.path == "choice" or _fills(part)) for part in others)

    def render(self, line: Mapping[str, Any]) -> str:
        """The text of `line`, CHOICE where the choice goes. Raises FieldError."""
        return "".join(part if isinstance(part, str) else _value(part, line) for part in self.parts)


def lookup(line: Mapping[str, Any], path: str) -> Any:
    """What lies at `path`; "choices[].text" is the text of each of the choices. Raises FieldError."""
    return _descend(line, path.split("."), path)


def text_of(value: Any, path: str) -> str:
    """A field's value as text. Raises FieldError for what is neither text nor a number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FieldError(f'field "{path}" is no text: {str(value)[:40]!r}')
    if CHOICE in str(value):
        raise FieldError(f'field "{path}" holds a NUL character')
    return str(value)


def texts_of(line: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """A list of texts. Raises FieldError."""
    values = lookup(line, path)
    if not isinstance(values, list):
        raise FieldError(f'field "{path}" is no list')
    return tuple(text_of(value, path) for value in values)


def _parse_field(inner: str, text: str) -> _Field:
    path, *filters = inner.split("|")
    if not path.strip():
        raise ValueError(f'"{text}" has a field without a name')
    found = []
    for each in filters:
        name, _, argument = each.partition(":")
        if name not in ("capitalize", "strip") and not (name in ("drop", "fill") and argument):
            raise ValueError(f'"{text}" has an unknown filter "{each}"; valid: {", ".join(FILTERS)}')
        if path.strip() == "choice":
            raise ValueError(f'"{text}" has a filter on {{choice}}, which takes none')
        found.append((name, argument.replace("\\n", "\n")))
    return _Field(path.strip(), tuple(found))


def _fills(part: _Field) -> bool:
    return any(name == "fill" for name, _ in part.filters)


def _value(part: _Field, line: Mapping[str, Any]) -> str:
    if part.path == "choice":
        return CHOICE
    value = text_of(lookup(line, part.path), part.path)
    for name, argument in part.filters:
        if name == "capitalize":
            value = value[:1].upper() + value[1:]
        elif name == "strip":
            value = value.strip()
        elif name == "drop":
            value = value.replace(argument, "")
        else:
            if argument not in value:
                raise FieldError(f'field "{part.path}" has no "{argument}" to fill')
            value = value.replace(argument, CHOICE)
    return value


def _descend(value: Any, names: list[str], path: str) -> Any:
    for place, name in enumerate(names):
        each = name.endswith("[]")
        key = name.removesuffix("[]")
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            valid = ", ".join(map(str, value)) if isinstance(value, Mapping) else "none"
            raise FieldError(f'no field "{path}"; valid: {valid}')
        if each:
            if not isinstance(value, list):
                raise FieldError(f'field "{path}" is no list at "{name}"')
            rest = names[place + 1 :]
            return [_descend(item, rest, path) for item in value]
    return value
