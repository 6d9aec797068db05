"""JSON that says what it means, sealed: no duplicate keys, no NaN, no surprise, and a checksum over every byte.

A sealed file is one JSON object on one line whose last key is "checksum": xxh3_64, as 16 hex digits, of every byte
before the comma in front of that key.
"""

import json
import math
from typing import Any

import xxhash

from megamoe.errors import CheckpointError

_HEAD, _TAIL = b',"checksum":"', b'"}\n'
_SEAL_BYTES = len(_HEAD) + 16 + len(_TAIL)


def checksum(data: Any) -> str:
    """xxh3_64 of anything with a buffer, as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def dumps(tree: Any) -> str:
    """Compact JSON. Raises CheckpointError for what JSON has no word for, NaN included."""
    try:
        return json.dumps(tree, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"this state cannot be written as JSON: {error}") from None


def seal(tree: dict[str, Any]) -> bytes:
    """`tree`, which is not empty, as the bytes of a sealed file."""
    body = dumps(tree)[:-1].encode("ascii")
    return body + _HEAD + checksum(body).encode("ascii") + _TAIL


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The object in a sealed file, without its checksum. Raises CheckpointError beginning with `where`."""
    body, tail = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if not (tail.startswith(_HEAD) and tail.endswith(_TAIL)):
        raise CheckpointError(f"{where} is damaged: it does not end with its checksum")
    verify_seal(body, tail[len(_HEAD) : -len(_TAIL)], where)
    tree = loads(body + b"}", where)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where} is damaged: it holds no JSON object")
    return tree


def verify_seal(body: bytes, digits: bytes, where: str) -> None:
    if checksum(body).encode("ascii") != digits:
        raise CheckpointError(f"{where} is damaged: its checksum is not that of its content")


def loads(data: bytes, where: str) -> Any:
    """Strict JSON. Raises CheckpointError for duplicate keys, NaN, infinities, numbers or nesting beyond reason."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except (ValueError, RecursionError) as error:  # a JSONDecodeError and a UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{where} is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return "its JSON is nested too deep" if isinstance(error, RecursionError) else str(error).split("\n")[0][:200]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return tree


def _constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond every number")
    return value
