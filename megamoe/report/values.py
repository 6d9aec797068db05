"""Values out of what files say, and telling them in few characters. A file's word is data: nothing is trusted."""

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

MAX_TEXT = 600  # characters of a message that are shown


def number_at(tree: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, else None."""
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def count_at(tree: Mapping[str, Any], key: str) -> int | None:
    """The whole number of at least 0 under `key`, else None."""
    value = number_at(tree, key)
    return int(value) if value is not None and 0 <= value < 1e18 else None


def text_at(tree: Mapping[str, Any], key: str) -> str:
    """The text under `key` as `plain` leaves it, else ""."""
    value = tree.get(key)
    return plain(value) if isinstance(value, str) else ""


def plain(text: str) -> str:
    """One line without control characters, escape sequences' first bytes and direction marks among them; cut short."""
    clean = "".join(
        character if unicodedata.category(character)[0] != "C" else " " for character in text[: 2 * MAX_TEXT]
    )
    clean = " ".join(clean.split())
    return clean if len(clean) <= MAX_TEXT else clean[: MAX_TEXT - 1] + "…"


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a configuration that may be of any shape."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def short(value: float) -> str:
    """1234567 -> 1.23M; four digits at most."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit * 0.99995:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.4g}{unit}" if abs(scaled) < 1e4 else f"{scaled:.2e}{unit}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.3g}"


def count_text(value: float) -> str:
    """12345678 -> "12.3 M"; whole numbers below 100,000 in full."""
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g} {unit}"
    return f"{value:,.0f}"


def bytes_text(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 / 10 else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """42 s, 12 min, 3 h 05 min, 2 d 04 h."""
    if seconds < 0 or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
