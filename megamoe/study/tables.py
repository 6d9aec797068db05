"""Tables beside the pictures."""

import math
import statistics
from collections.abc import Sequence
from html import escape

import numpy as np

from megamoe.report.values import bytes_text, count_text, duration
from megamoe.study.curves import PowerLaw
from megamoe.study.pictures import METHOD_NAMES, colour_of, domain_name, flops_text
from megamoe.study.points import Point, domains_of
from megamoe.study.schema import StudySettings
from megamoe.study.speedup import Speedup

FEW_TARGETS = 5


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """Cells are escaped; those of `numbers` stand to the right."""
    kinds = [' class="n"' if place in numbers else "" for place in range(len(head))]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for kind, name in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def factor_table(study: StudySettings, factors: Sequence[Speedup]) -> str:
    """The factor in compute by every method, at targets spread over what both families reach."""
    rows = []
    for each in factors:
        if each.cost != "paper_flops":
            continue
        if not len(each.targets):
            rows.append((METHOD_NAMES[each.method], "–", "–", "–", "–", each.reason))
            continue
        for place in np.unique(np.linspace(0, len(each.targets) - 1, FEW_TARGETS).round().astype(int)).tolist():
            factor = float(each.factors[place])
            rows.append(
                (
                    METHOD_NAMES[each.method], f"{each.targets[place]:.4f}", _flops(float(each.baseline_costs[place])),
                    _flops(float(each.compared_costs[place])), f"{factor:.2f}" if math.isfinite(factor) else "–",
                    each.interval_text(place) or "none: replicates bound it on no side",
                )
            )  # fmt: skip
    names = [f"{family} FLOPs" for family in (study.analysis.baseline, study.analysis.compared)]
    head = ("method", "target, nats a token", *names, "factor", f"{study.analysis.confidence:.0%} interval")
    return table(head, rows, numbers=(1, 2, 3, 4))


def _flops(value: float) -> str:
    return flops_text(value) if math.isfinite(value) else "–"


def fit_table(fits: Sequence[tuple[str, PowerLaw]]) -> str:
    rows = []
    for family, law in fits:
        residuals = f"{law.misfit:.4f}, largest {np.abs(law.residuals).max():.4f}"
        rows.append(
            (
                family, f"{law.num_points}", f"{law.offset:.3f}", f"{law.exponent:.4f}",
                flops_text(law.unit * law.scale ** (1 / law.exponent)), residuals,
            )
        )  # fmt: skip
    head = ("family", "points", "offset, nats a token", "exponent", "unit, FLOPs", "residuals' deviation, nats a token")
    return table(head, rows, numbers=(1, 2, 3, 4))


def model_table(points: Sequence[Point]) -> str:
    """Every model at the end of its training: sizes; costs and losses by domain, means of its seeds."""
    domains = domains_of(points)
    head = ("model", "seeds", "parameters", "active", "paper FLOPs", "model FLOPs", "time", "tokens/s", "peak memory",
            *(f"{domain_name(domain)}, nats a token" for domain in domains))  # fmt: skip
    rows = []
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model and point.is_final]
        if own:
            first = own[0]
            seconds = [point.train_seconds for point in own if point.train_seconds]
            memory = [point.peak_memory_bytes for point in own if point.peak_memory_bytes]
            peak = bytes_text(round(statistics.fmean(memory))) if memory else "–"
            mean = statistics.fmean(seconds) if seconds else math.nan
            rows.append(
                (
                    model, f"{len(own)}", count_text(first.num_parameters), count_text(first.num_active_parameters),
                    flops_text(first.paper_flops), flops_text(first.model_flops), duration(mean) if seconds else "–",
                    f"{first.tokens / mean:,.0f}" if seconds else "–", peak,
                    *(_losses(own, domain) for domain in domains),
                )
            )  # fmt: skip
    made = table(head, rows, numbers=range(1, len(head)))
    for model in dict.fromkeys(point.model for point in points):
        family = next(point.family for point in points if point.model == model)
        swatch = f'<span class="swatch {colour_of(family, points)}"></span>'
        made = made.replace(f"<td>{escape(model)}</td>", f"<td>{swatch}{escape(model)}</td>")
    return made


def _losses(points: Sequence[Point], domain: str) -> str:
    losses = [loss[0] for point in points if (loss := point.loss(domain)) is not None]
    if not losses:
        return "–"
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread}"


def set_table(points: Sequence[Point]) -> str:
    """By set: nats a token and bits a byte with standard errors, of the first seed of each model."""
    head = ("set", "domain", "model", "tokens", "nats a token", "standard error", "bits a byte", "standard error")
    rows, told = [], set()
    finals = [point for point in points if point.is_final]
    for name in dict.fromkeys(name for point in finals for name in point.sets):
        for point in finals:
            score = point.sets.get(name)
            if score is None or (name, point.model) in told:
                continue
            told.add((name, point.model))
            rows.append(
                (
                    name, domain_name(score.domain), f"{point.model}, seed {point.seed}", f"{score.tokens:,}",
                    f"{score.nats_per_token:.4f}", _known(score.nats_per_token_se), _known(score.bits_per_byte),
                    _known(score.bits_per_byte_se),
                )
            )  # fmt: skip
    return table(head, rows, numbers=(3, 4, 5, 6, 7))


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
