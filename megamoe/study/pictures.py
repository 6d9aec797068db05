"""From points and factors to pictures: which series each one holds."""

import math
from collections.abc import Sequence

import numpy as np

from megamoe.report.values import count_text, duration
from megamoe.study.charts import Picture, Series
from megamoe.study.curves import Curve, PowerLaw
from megamoe.study.points import Point
from megamoe.study.schema import AnalysisSettings
from megamoe.study.speedup import Candidate, Speedup, candidates_of, family_curve

METHOD_NAMES = {
    "trained": "between fully trained models", "envelope": "along the best of all checkpoints", "fit": "power laws",
}  # fmt: skip
_METHOD_STYLES = {"trained": ("c2", ""), "envelope": ("c3", "7 4"), "fit": ("c4", "2 3")}  # no colours of families
_DASHES = ("", "8 4", "2 3", "9 3 2 3", "5 2", "1 4")
AXES = {"paper_flops": "training FLOPs as the paper counts", "train_seconds": "seconds of training"}


def domain_name(domain: str) -> str:
    return domain.replace("_", " ")


def loss_text(value: float) -> str:
    return f"{value:.4g}"


def flops_text(value: float) -> str:
    """1.2e15, as a mark is read: 1.2e15, 3e15."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def families(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.family for point in points))


def colour_of(family: str, points: Sequence[Point]) -> str:
    return f"c{families(points).index(family) % 8}"


def cost_picture(points: Sequence[Point], domain: str, cost: str = "paper_flops") -> Picture | None:
    """Loss over what it costs: the fully trained models with their seeds, and the best of all checkpoints."""
    candidates, series = candidates_of(points, domain), []
    for family in families(points):
        colour = colour_of(family, points)
        trained = family_curve(candidates, family, cost, "trained")
        envelope = family_curve(candidates, family, cost, "envelope")
        if not (isinstance(trained, Curve) and isinstance(envelope, Curve)):
            continue
        seeds = [
            (point, float(value), loss[0])
            for point in points
            if point.family == family and point.is_final and (loss := point.loss(domain)) is not None
            and (value := getattr(point, cost)) is not None
        ]  # fmt: skip
        hints = [f"{point.model}, seed {point.seed}: {loss:.4f} at {flops_text(x)}" for point, x, loss in seeds]
        every = [(each.cost(cost) or 0.0, each.loss) for each in candidates if each.family == family]
        series += [
            Series(family, colour, every, has_line=False, dot=3.5, is_open=True, in_legend=False),
            Series(family, colour, _pairs(envelope), dash="4 4", width=1.2, in_legend=False),
            Series(family, colour, _pairs(trained)),
            Series(
                family, colour, [(x, y) for _, x, y in seeds], has_line=False, dot=7, hints=hints, in_legend=False
            ),
        ]  # fmt: skip
    if not series:
        return None
    series += [
        Series("a trained model, each seed", "ink", (), has_line=False, dot=7),
        Series("a checkpoint on the way", "ink", (), has_line=False, dot=5, is_open=True),
        Series("the best of all checkpoints", "ink", (), dash="4 4"),
    ]
    is_time = cost == "train_seconds"
    return Picture(
        f"Loss {domain_name(domain)}", "nats a token, lower is better", AXES[cost], "nats a token", series,
        duration if is_time else flops_text, loss_text, x_log=True,
    )  # fmt: skip


def _pairs(curve: Curve) -> list[tuple[float, float]]:
    return list(zip(curve.costs.tolist(), curve.losses.tolist(), strict=True))


def speedup_picture(factors: Sequence[Speedup], settings: AnalysisSettings, domain: str, cost: str) -> Picture | None:
    """The factor over the target, from the worst loss on the left to the best."""
    series = []
    for each in factors:
        if each.domain == domain and each.cost == cost and len(each.targets):
            colour, dash = _METHOD_STYLES[each.method]
            targets, values = each.targets.tolist(), each.factors.tolist()
            has_band = each.method != "fit" and not np.isnan(each.low).all()
            low = np.where(each.low == 0.0, -math.inf, each.low)  # open below, on an axis of powers too
            series.append(
                Series(
                    METHOD_NAMES[each.method], colour, [(-t, s) for t, s in zip(targets, values, strict=True)], dash,
                    low=low.tolist() if has_band else (), high=each.high.tolist() if has_band else (),
                )
            )  # fmt: skip
    if not series:
        return None
    what = {"paper_flops": "Compute", "train_seconds": "Time"}[cost]
    return Picture(
        f"{what} saved {domain_name(domain)}",
        f"{settings.baseline} over {settings.compared}; bands: {settings.confidence:.0%} intervals, "
        "open where they meet the edge",
        "target, nats a token: harder to the right", f"times less {what.lower()}", series,
        lambda value: loss_text(-value), lambda value: f"{value:.3g}×", y_log=True, y_line=1.0, y_from=(1.0,),
    )  # fmt: skip


def learning_picture(points: Sequence[Point], domain: str) -> Picture | None:
    """Loss by tokens, a line a model: the mean of its seeds."""
    series, places = [], dict.fromkeys(families(points), 0)
    by_model: dict[str, list[Candidate]] = {}
    for each in candidates_of(points, domain):
        by_model.setdefault(each.model, []).append(each)
    for model, own in by_model.items():
        family = own[0].family
        dash = _DASHES[places[family] % len(_DASHES)]
        places[family] += 1
        pairs = [(float(each.tokens), each.loss) for each in own]
        series.append(
            Series(model, colour_of(family, points), pairs, dash, dot=4, end_label=model, in_legend=False)
        )
    if not series:
        return None
    return Picture(
        f"Learning curves {domain_name(domain)}", "mean of the seeds at each checkpoint", "tokens trained",
        "nats a token", series, count_text, loss_text,
    )  # fmt: skip


def fits_of(points: Sequence[Point], domain: str) -> list[tuple[str, PowerLaw]]:
    """The power law of each family that has one."""
    candidates, found = candidates_of(points, domain), []
    for family in families(points):
        law = family_curve(candidates, family, "paper_flops", "fit")
        if isinstance(law, PowerLaw):
            found.append((family, law))
    return found
