"""The speedup factor of the paper: s(t) = c_baseline(t) / c_compared(t), where c(t) is what a family spends to reach t.

    c(t)       by three methods. trained: between the fully trained models of the ladder, as the paper does; envelope:
               along the best checkpoints of all runs; fit: a power law with offset for each family's trained models.
    intervals  a parametric bootstrap. Each replicate moves every model's loss by what other seeds and other texts would
               do to it, and everything is computed again. Seeds: the deviation between a model's seeds is pooled over
               the models that have several, checkpoints of one number of tokens together, and a mean of n seeds moves
               by Student's t with the pooled degrees of freedom times deviation / sqrt(n). Texts: by the standard error
               that the evaluation gives; all models read the same texts, so that one draw moves them all ("shared":
               narrower than the truth, for models do not err alike on every text), or each has its own ("independent":
               wider). A power law whose points lie further from it than seeds would move them takes that distance
               instead. Costs do not move: intervals of time and memory hold no noise of time or memory.
    open ends  a replicate in which a family does not reach the target, or is past it from its first point on, still
               bounds the factor from one side. A quantile takes these bounds; where it falls on one that is missing,
               the interval has no end there: 0.0 or infinity. NaN where both are missing: there is no interval.
    no number  outside of the losses that both families reach.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megamoe.study.curves import MIN_FIT_COSTS, Curve, Numbers, PowerLaw, fit_power_law, lower_envelope
from megamoe.study.points import Point, domains_of
from megamoe.study.schema import AnalysisSettings

METHODS = ("trained", "envelope", "fit")
COSTS = ("paper_flops", "model_flops", "train_seconds", "peak_memory_bytes", "num_parameters")
_METHODS_OF = {"paper_flops": METHODS, "model_flops": METHODS[:2], "train_seconds": METHODS[:2]}  # others: trained


@dataclass(frozen=True)
class Candidate:
    """All seeds of one model at one step, as one point of its family."""

    model: str
    family: str
    tokens: int
    is_final: bool
    losses: tuple[float, ...]  # by seed
    text_se: float
    points: tuple[Point, ...]

    @property
    def loss(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    def cost(self, name: str) -> float | None:
        """The mean over seeds; None where it is not known of all."""
        values = [getattr(point, name) for point in self.points]
        return None if None in values else math.fsum(values) / len(values)


@dataclass(frozen=True)
class Speedup:
    """One factor over a grid of targets. NaN: no number, or no interval; `low` 0 and `high` infinity: the interval is
    open on that side. `reason`: why there is no factor at all."""

    domain: str
    cost: str
    method: str
    targets: Numbers
    baseline_costs: Numbers
    compared_costs: Numbers
    low: Numbers
    high: Numbers
    shares: Numbers  # of the replicates that had a number
    reason: str = ""

    @property
    def factors(self) -> Numbers:
        return self.baseline_costs / self.compared_costs

    def interval_text(self, place: int) -> str:
        """At one target, in words; "" where there is none."""
        low, high = float(self.low[place]), float(self.high[place])
        if math.isnan(low):
            return ""
        if math.isinf(high):
            return f"{low:.2f} or more"
        return f"{low:.2f} to {high:.2f}" if low else f"{high:.2f} or less"


@dataclass(frozen=True)
class Noise:
    """Between seeds, in nats a token: the pooled deviation by tokens, where a model has several seeds.

    degrees: of freedom, behind the deviation at the last of these tokens.
    """

    deviations: dict[int, float]
    degrees: int

    @property
    def last_tokens(self) -> int:
        return max(self.deviations)

    def at(self, tokens: int) -> float:
        """The deviation at the nearest tokens that have one."""
        if not self.deviations:
            return 0.0
        return self.deviations[min(self.deviations, key=lambda known: abs(known - tokens))]


@dataclass(frozen=True)
class Luck:
    """What each replicate moves the losses by: [replicates, candidates]."""

    of_seeds: Numbers
    of_texts: Numbers
    seed_deviations: Numbers  # [candidates] of a mean over seeds


def candidates_of(points: Sequence[Point], domain: str) -> list[Candidate]:
    """In the order of the points."""
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        if point.loss(domain) is not None:
            groups.setdefault((point.model, point.step), []).append(point)
    found = []
    for (model, _), group in groups.items():
        scores = [score for point in group if (score := point.loss(domain)) is not None]
        losses, first = tuple(loss for loss, _ in scores), group[0]
        se = math.fsum(error for _, error in scores) / len(scores)
        found.append(Candidate(model, first.family, first.tokens, first.is_final, losses, se, tuple(group)))
    return found


def noise_of(candidates: Sequence[Candidate]) -> Noise:
    """Pooled over all models that have several seeds."""
    squares: dict[int, float] = {}
    degrees: dict[int, int] = {}
    for each in candidates:
        squares[each.tokens] = squares.get(each.tokens, 0.0) + sum((loss - each.loss) ** 2 for loss in each.losses)
        degrees[each.tokens] = degrees.get(each.tokens, 0) + len(each.losses) - 1
    deviations = {tokens: math.sqrt(squares[tokens] / degrees[tokens]) for tokens in squares if degrees[tokens]}
    return Noise(deviations, degrees[max(deviations)] if deviations else 0)


def analyse(points: Sequence[Point], settings: AnalysisSettings) -> list[Speedup]:
    """Every factor: by domain, cost and method. The same points and settings give the same numbers, to the bit."""
    found = []
    for domain in domains_of(points):
        candidates = candidates_of(points, domain)
        luck = _luck(candidates, settings, domain)
        for cost in COSTS:
            for method in _METHODS_OF.get(cost, METHODS[:1]):
                found.append(_speedup(candidates, luck, settings, (domain, cost, method)))
    return found


def factor(points: Sequence[Point], settings: AnalysisSettings, domain: str, cost: str, method: str) -> Speedup:
    """One of those that `analyse` gives."""
    candidates = candidates_of(points, domain)
    return _speedup(candidates, _luck(candidates, settings, domain), settings, (domain, cost, method))


def family_curve(
    candidates: Sequence[Candidate], family: str, cost: str, method: str
) -> Curve | PowerLaw | None:
    """What a family spends to reach a loss, without noise; None where it has no such costs, or no law is found."""
    chosen = _chosen(candidates, family, cost, method)
    return _curve(chosen, [each.loss for each in chosen], cost, method) if chosen else None


def _chosen(candidates: Sequence[Candidate], family: str, cost: str, method: str) -> list[Candidate]:
    """The points of a family that a method goes by."""
    own = [each for each in candidates if each.family == family and each.cost(cost) is not None]
    return own if method == "envelope" else [each for each in own if each.is_final]


def _cost(candidate: Candidate, name: str) -> float:
    value = candidate.cost(name)
    assert value is not None  # `_chosen` leaves the others out
    return value


def _curve(
    chosen: Sequence[Candidate], losses: Sequence[float] | Numbers, cost: str, method: str
) -> Curve | PowerLaw | None:
    costs = [_cost(each, cost) for each in chosen]
    return fit_power_law(costs, losses) if method == "fit" else lower_envelope(costs, losses)


def _speedup(
    candidates: Sequence[Candidate], luck: Luck, settings: AnalysisSettings, key: tuple[str, str, str]
) -> Speedup:
    domain, cost, method = key
    sides = [_chosen(candidates, each, cost, method) for each in (settings.baseline, settings.compared)]
    curves = [_curve(side, [each.loss for each in side], cost, method) if side else None for side in sides]
    reason = _no_number(curves, settings, cost, method)
    if reason:
        none = np.empty(0)
        return Speedup(domain, cost, method, none, none, none, none, none, none, reason)
    base, other = (curve for curve in curves if curve is not None)
    targets = np.linspace(min(base.worst, other.worst), max(base.best, other.best), settings.num_targets)
    place = {id(each): index for index, each in enumerate(candidates)}
    moved = [
        _moved_losses(side, curve, luck, [place[id(each)] for each in side], settings.seed)
        for side, curve in zip(sides, (base, other), strict=True)
    ]
    least = np.zeros((settings.num_replicates, len(targets)))
    most = np.full_like(least, math.inf)
    for row, losses in enumerate(zip(*moved, strict=True)):
        pair = [_curve(side, own, cost, method) for side, own in zip(sides, losses, strict=True)]
        if pair[0] is not None and pair[1] is not None:
            least[row], most[row] = _ratio(pair[0].bounds_at(targets), pair[1].bounds_at(targets))
    low, high = _interval(least, most, settings.confidence)
    has_number = (least == most) & np.isfinite(least)
    shares = has_number.mean(axis=0) if len(least) else np.zeros(len(targets))
    return Speedup(domain, cost, method, targets, base.cost_at(targets), other.cost_at(targets), low, high, shares)


def _no_number(
    curves: Sequence[Curve | PowerLaw | None], settings: AnalysisSettings, cost: str, method: str
) -> str:
    what = "trained models" if method == "trained" else "checkpoints"
    for curve, family in zip(curves, (settings.baseline, settings.compared), strict=True):
        if curve is None and method == "fit":
            return (
                f"{family} has no power law: it takes trained models of {MIN_FIT_COSTS} costs at least, and losses "
                "that fall"
            )
        if curve is None:
            return f"{family} has no point whose {cost.replace('_', ' ')} are known"
        if curve.best == curve.worst:
            return f"{family} is one point: a curve takes two {what} at least, the dearer one the better"
    base, other = (curve for curve in curves if curve is not None)
    if min(base.worst, other.worst) <= max(base.best, other.best):
        return (
            f"no loss is reached by both: {settings.baseline} goes from {base.worst:.4f} to {base.best:.4f} nats a "
            f"token, {settings.compared} from {other.worst:.4f} to {other.best:.4f}"
        )
    return ""


def _ratio(baseline: tuple[Numbers, Numbers], compared: tuple[Numbers, Numbers]) -> tuple[Numbers, Numbers]:
    """Between what the factor lies, from what the costs lie between; 0 and infinity where nothing is known."""
    with np.errstate(invalid="ignore", divide="ignore"):
        least, most = baseline[0] / compared[1], baseline[1] / compared[0]
    return np.where(np.isnan(least), 0.0, least), np.where(np.isnan(most), math.inf, most)


def _interval(least: Numbers, most: Numbers, confidence: float) -> tuple[Numbers, Numbers]:
    """The quantiles of what each column's factors are at least, and at most; [replicates, targets] -> two of [targets].

    Without interpolation: a bound that is missing is no number to go half way to.
    """
    if not len(least):
        return np.full(least.shape[1], math.nan), np.full(least.shape[1], math.nan)
    low = np.quantile(least, (1 - confidence) / 2, axis=0, method="lower")
    high = np.quantile(most, (1 + confidence) / 2, axis=0, method="higher")
    has_none = (low == 0.0) & np.isinf(high) | np.isinf(low)  # the law of a baseline may never get there at all
    return np.where(has_none, math.nan, low), np.where(has_none, math.nan, high)


def _moved_losses(
    side: Sequence[Candidate], curve: Curve | PowerLaw, luck: Luck, columns: Sequence[int], seed: int
) -> Numbers:
    """[replicates, points of a family]: losses as other seeds and texts might have given them."""
    losses = np.array([each.loss for each in side]) + luck.of_texts[:, columns]
    if not isinstance(curve, PowerLaw) or curve.misfit <= math.sqrt((luck.seed_deviations[columns] ** 2).mean()):
        return losses + luck.of_seeds[:, columns]
    generator = np.random.default_rng([seed, zlib.crc32(side[0].family.encode())])
    misfits = curve.misfit * np.sqrt(curve.degrees / generator.chisquare(curve.degrees, (len(losses), 1)))
    return losses + misfits * generator.standard_normal(losses.shape)


def _luck(candidates: Sequence[Candidate], settings: AnalysisSettings, domain: str) -> Luck:
    models = list(dict.fromkeys(each.model for each in candidates))
    column = np.array([models.index(each.model) for each in candidates], dtype=np.int64)
    generator = np.random.default_rng([settings.seed, zlib.crc32(domain.encode())])
    noise, count = noise_of(candidates), settings.num_replicates
    draws: Callable[..., Numbers] = generator.standard_normal
    text = draws((count, len(models)))
    if settings.text_noise == "shared":
        text = np.repeat(text[:, :1], len(models), axis=1)
    seeds = generator.standard_t(noise.degrees, (count, len(models))) if noise.degrees else np.zeros_like(text)
    of_seeds = np.array([noise.at(each.tokens) / math.sqrt(len(each.losses)) for each in candidates])
    of_text = np.array([each.text_se for each in candidates])
    return Luck(of_seeds * seeds[:, column], of_text * text[:, column], of_seeds)
