"""What is added up while a set is scored, and the figures that come of it. No torch.

Everything is summed in one order, in double precision, and JSON keeps every bit of it: an evaluation that goes on from
its sums ends as one that was never broken off. JSON has no infinities and no NaN: what is not finite is null there.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from megamoe.evaluation.windows import Window

MAX_NATS = 700.0  # exp does not overflow
_MAY_DIVERGE = ("nats", "nats_square", "nats_tokens", "open_nats")


@dataclass
class Sums:
    """Of one set, so far. A unit is a document or a block; its sums are closed when its last window is scored."""

    nats: float = 0.0
    num_tokens: int = 0
    num_units: int = 0
    nats_square: float = 0.0  # over units: of a unit's nats, of its tokens, and their product
    tokens_square: float = 0.0
    nats_tokens: float = 0.0
    open_nats: float = 0.0
    open_tokens: int = 0
    num_bytes: int | None = 0  # by ids: see `OpenSet.bytes_between`
    num_computed_tokens: int = 0  # inputs of all windows, those that only give context included
    num_windows: int = 0
    seconds: float = 0.0
    loads: dict[str, list[float]] = field(default_factory=dict)  # by layer: choices, and those dropped

    def add(self, windows: Sequence[Window], nats: Iterable[float]) -> None:
        """Neighbouring windows, in order, each with the nats of its scored tokens."""
        for window, value in zip(windows, nats, strict=True):
            self.nats += value
            self.num_tokens += window.scored
            self.num_computed_tokens += window.length
            self.num_windows += 1
            self.open_nats += value
            self.open_tokens += window.scored
            if window.ends_unit:
                self.num_units += 1
                self.nats_square += self.open_nats**2
                self.tokens_square += float(self.open_tokens) ** 2
                self.nats_tokens += self.open_nats * self.open_tokens
                self.open_nats, self.open_tokens = 0.0, 0

    def add_bytes(self, num_bytes: int | None) -> None:
        """What is not known once is not known of the whole."""
        self.num_bytes = None if num_bytes is None or self.num_bytes is None else self.num_bytes + num_bytes

    def add_loads(self, loads: Mapping[int, Sequence[float]]) -> None:
        """Choices of experts, and those dropped, by layer."""
        for layer, counts in loads.items():
            before = self.loads.get(str(layer), [0.0, 0.0])
            self.loads[str(layer)] = [old + new for old, new in zip(before, counts, strict=True)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {key: finite(getattr(self, key)) for key in _MAY_DIVERGE}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Sums":
        """What `to_json` gave. Raises KeyError where one is missing."""
        kept = {each.name: tree[each.name] for each in fields(cls)}
        return cls(**kept | {key: math.nan for key in _MAY_DIVERGE if kept[key] is None})

    @property
    def standard_error(self) -> float | None:
        """Of the nats per token, taking units as drawn independently: that of a ratio of two means.

        None for fewer than two units, and where the nats are not finite.
        """
        if self.num_units < 2 or not math.isfinite(self.nats):
            return None
        mean = self.nats / self.num_tokens
        spread = self.nats_square - 2 * mean * self.nats_tokens + mean**2 * self.tokens_square
        return math.sqrt(max(0.0, spread) * self.num_units / (self.num_units - 1)) / self.num_tokens


def finite(value: float) -> float | None:
    """None for an infinity and for NaN."""
    return value if math.isfinite(value) else None


def figures(
    nats: float | None, num_tokens: int, num_bytes: int | None, standard_error: float | None
) -> dict[str, float | None]:
    """The figures of one set or of several together. `nats` None: no finite number, and all figures are None."""
    if nats is None:
        num_bytes = standard_error = None
    per_token = None if nats is None else nats / num_tokens
    perplexity = math.exp(per_token) if per_token is not None and per_token < MAX_NATS else None
    return {
        "nats_per_token": per_token,
        "nats_per_token_standard_error": standard_error,
        "perplexity": perplexity,
        "perplexity_standard_error": None if None in (standard_error, perplexity) else perplexity * standard_error,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
    }


def set_result(sums: Sums, *, num_documents: int, num_text_bytes: int | None) -> dict[str, Any]:
    """What results.json says of a set that is done."""
    nats = finite(sums.nats)
    found: dict[str, Any] = figures(nats, sums.num_tokens, num_text_bytes, sums.standard_error)
    found |= {
        "num_tokens": sums.num_tokens, "num_documents": num_documents, "num_units": sums.num_units,
        "num_text_bytes": num_text_bytes, "nats": nats, "num_computed_tokens": sums.num_computed_tokens,
        "seconds": sums.seconds,
        "tokens_per_second": sums.num_computed_tokens / sums.seconds if sums.seconds > 0 else None,
    }  # fmt: skip
    if sums.loads:
        found["dropped_share_by_layer"] = {layer: dropped / all_ for layer, (all_, dropped) in sums.loads.items()}
    return found


def together(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several sets as one: nats by all tokens, bits by all bytes. Sets are independent of each other."""
    num_tokens = sum(each["num_tokens"] for each in results)
    each_nats = [each["nats"] for each in results]
    nats = None if None in each_nats else sum(each_nats)
    counted = [each["num_text_bytes"] for each in results]
    num_bytes = None if None in counted else sum(counted)
    errors = [each["nats_per_token_standard_error"] for each in results]
    error = None
    if None not in errors:
        squares = [(each * one["num_tokens"]) ** 2 for each, one in zip(errors, results, strict=True)]
        error = math.sqrt(sum(squares)) / num_tokens
    found: dict[str, Any] = figures(nats, num_tokens, num_bytes, error)
    documents = sum(each["num_documents"] for each in results)
    return found | {
        "num_sets": len(results), "num_tokens": num_tokens, "num_documents": documents, "num_text_bytes": num_bytes
    }  # fmt: skip


def summary(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`domains` and `overall` of a model's sets, which are all done."""
    domains: dict[str, list[Mapping[str, Any]]] = {}
    for each in sets:
        domains.setdefault(each["domain"], []).append(each)
    return {"domains": {name: together(members) for name, members in domains.items()}, "overall": together(sets)}
