"""What a study measured, one point for each checkpoint that was evaluated: study.jsonl. No torch.

A line:

    model, family, seed        which run; families are the study's own words, such as dense and moe
    step, tokens, is_final     of the run when the checkpoint was saved; is_final: the run had reached its last step
    paper_flops                training compute up to there by `megamoe.study.compute.paper_flops_per_token`
    model_flops                the same by `megamoe.topology.flops.model_flops_per_token`: no recompute, own vocabulary
    train_seconds              of the steps that count, without start, saves and what a restart did again; null: unknown
    peak_memory_bytes          of the fullest rank up to there; null: unknown
    num_parameters, num_active_parameters
    sets                       by name: domain, tokens, nats_per_token, nats_per_token_se, bits_per_byte,
                               bits_per_byte_se (standard errors over blocks or documents; null: unknown)
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.errors import ConfigError

POINTS_FILE = "study.jsonl"


@dataclass(frozen=True)
class SetScore:
    """One evaluation set, scored by one checkpoint."""

    domain: str
    tokens: int
    nats_per_token: float
    nats_per_token_se: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_se: float | None = None


@dataclass(frozen=True)
class Point:
    """One checkpoint: what it cost, and what it scores."""

    model: str
    family: str
    seed: int
    step: int
    tokens: int
    is_final: bool
    paper_flops: float
    model_flops: float
    train_seconds: float | None
    peak_memory_bytes: int | None
    num_parameters: int
    num_active_parameters: int
    sets: Mapping[str, SetScore]

    def loss(self, domain: str) -> tuple[float, float] | None:
        """(nats a token, its standard error) over the sets of a domain, by tokens; None where it has none.

        Texts of different sets are taken to be independent; an unknown standard error counts as 0.
        """
        found = [score for score in self.sets.values() if score.domain == domain]
        if not found:
            return None
        total = sum(score.tokens for score in found)
        mean = math.fsum(score.tokens * score.nats_per_token for score in found) / total
        variance = math.fsum((score.tokens / total * (score.nats_per_token_se or 0.0)) ** 2 for score in found)
        return mean, math.sqrt(variance)


def domains_of(points: Iterable[Point]) -> list[str]:
    """Every domain, in_domain first, then by name."""
    found = {score.domain for point in points for score in point.sets.values()}
    return sorted(found, key=lambda name: (name != "in_domain", name))


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Replace the file as one act. OSErrors pass."""
    text = "".join(json.dumps(asdict(point), allow_nan=False) + "\n" for point in points)
    replace_file(path, text.encode())


def read_points(path: Path) -> list[Point]:
    """Raises ConfigError naming the line that is no point."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as points of a study: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_point(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{path}, line {number} is no point of a study: make it anew from the runs") from None
    return found


def _point(tree: dict[str, Any]) -> Point:
    sets = {str(name): SetScore(**score) for name, score in tree.pop("sets").items()}
    return Point(**tree, sets=sets)
