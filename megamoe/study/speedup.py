"""The speedup factor of the paper: s(t) = c_baseline(t) / c_compared(t), where c(t) is what a family spends to reach t.

    c(t)       by three methods. trained: between the fully trained models of the ladder, as the paper does; envelope:
               along the best checkpoints of all runs; fit: a power law with offset for each family.
    intervals  a parametric bootstrap. Each replicate moves every model's loss by what other seeds and other texts would
               do to it, and everything is computed again. Seeds: the deviation between a model's seeds is pooled over
               the models that have several, checkpoints of one number of tokens together, and a mean of n seeds moves
               by Student's t with the pooled degrees of freedom times deviation / sqrt(n). Texts: by the standard error
               that the evaluation gives; all models read the same texts, so that one draw moves them all ("shared"),
               or each has its own ("independent": wider than the truth).
    no number  outside of the losses that both families reach; no interval where replicates often have no number.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megamoe.study.curves import Curve, Numbers, PowerLaw, fit_power_law, lower_envelope
from megamoe.study.points import Point, domains_of
from megamoe.study.schema import AnalysisSettings

METHODS = ("trained", "envelope", "fit")
COSTS = ("paper_flops", "model_flops", "train_seconds", "peak_memory_bytes", "num_parameters")
_METHODS_OF = {"paper_flops": METHODS, "model_flops": METHODS[:2], "train_seconds": METHODS[:2]}  # others: trained
LEAST_SHARE = 0.9  # of the replicates must have a number, or there is no interval
LEAST_TRAINED_FOR_FIT = 4  # fewer models would be met exactly by three parameters: then the envelope's points are taken


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
    """One factor over a grid of targets. NaN: no number, or no interval. `reason`: why there is none at all."""

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


@dataclass(frozen=True)
class Noise:
    """Between seeds, in nats a token: the pooled deviation by tokens, and the degrees of freedom behind the last."""

    deviations: dict[int, float]
    degrees: int


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
    return Noise(deviations, degrees[max(degrees)] if degrees else 0)


def analyse(points: Sequence[Point], settings: AnalysisSettings) -> list[Speedup]:
    """Every factor: by domain, cost and method. The same points and settings give the same numbers, to the bit."""
    found = []
    for domain in domains_of(points):
        candidates = candidates_of(points, domain)
        moved = _moved_losses(candidates, settings, domain)
        for cost in COSTS:
            for method in _METHODS_OF.get(cost, METHODS[:1]):
                found.append(_speedup(candidates, moved, settings, (domain, cost, method)))
    return found


def factor(points: Sequence[Point], settings: AnalysisSettings, domain: str, cost: str, method: str) -> Speedup:
    """One of those that `analyse` gives."""
    candidates = candidates_of(points, domain)
    return _speedup(candidates, _moved_losses(candidates, settings, domain), settings, (domain, cost, method))


def family_curve(
    candidates: Sequence[Candidate], family: str, cost: str, method: str, *, compared: Sequence[str] = ()
) -> Curve | PowerLaw | None:
    """What a family spends to reach a loss, without noise; None where it has no such costs, or no law is found.

    compared: the families that a law is compared between, which go by points of one kind.
    """
    uses_trained = fits_trained(candidates, compared or (family,), cost)
    chosen = _chosen(candidates, family, cost, method, fits_trained_models=uses_trained)
    return _curve(chosen, [each.loss for each in chosen], cost, method) if chosen else None


def fits_trained(candidates: Sequence[Candidate], compared: Sequence[str], cost: str) -> bool:
    """Whether power laws go by trained models: each of the families has enough of them. Else all go by the best of all
    checkpoints: laws of unlike points must not be divided by each other."""
    known = [each for each in candidates if each.is_final and each.cost(cost) is not None]
    return all(sum(each.family == family for each in known) >= LEAST_TRAINED_FOR_FIT for family in compared)


def _chosen(
    candidates: Sequence[Candidate], family: str, cost: str, method: str, *, fits_trained_models: bool
) -> list[Candidate]:
    """The points of a family that a method goes by."""
    own = [each for each in candidates if each.family == family and each.cost(cost) is not None]
    trained = [each for each in own if each.is_final]
    if method == "trained" or (method == "fit" and fits_trained_models):
        return trained
    if method == "fit" and own:
        kept = set(lower_envelope([_cost(each, cost) for each in own], [each.loss for each in own]).losses.tolist())
        return [each for each in own if each.loss in kept]
    return own


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
    candidates: Sequence[Candidate], moved: Numbers, settings: AnalysisSettings, key: tuple[str, str, str]
) -> Speedup:
    domain, cost, method = key
    place = {id(each): index for index, each in enumerate(candidates)}
    compared = (settings.baseline, settings.compared)
    uses_trained = fits_trained(candidates, compared, cost)
    sides = [_chosen(candidates, each, cost, method, fits_trained_models=uses_trained) for each in compared]
    curves = [_curve(side, [each.loss for each in side], cost, method) if side else None for side in sides]
    reason = _no_number(curves, settings, cost, method)
    if reason:
        none = np.empty(0)
        return Speedup(domain, cost, method, none, none, none, none, none, none, reason)
    base, other = (curve for curve in curves if curve is not None)
    targets = np.linspace(min(base.worst, other.worst), max(base.best, other.best), settings.num_targets)
    columns = [[place[id(each)] for each in side] for side in sides]
    logs = np.full((len(moved), len(targets)), math.nan)
    for row, losses in enumerate(moved):
        pair = [_curve(side, losses[column], cost, method) for side, column in zip(sides, columns, strict=True)]
        if pair[0] is not None and pair[1] is not None:
            logs[row] = np.log(pair[0].cost_at(targets)) - np.log(pair[1].cost_at(targets))
    low, high, shares = _interval(logs, settings.confidence)
    return Speedup(domain, cost, method, targets, base.cost_at(targets), other.cost_at(targets), low, high, shares)


def _no_number(
    curves: Sequence[Curve | PowerLaw | None], settings: AnalysisSettings, cost: str, method: str
) -> str:
    for curve, family in zip(curves, (settings.baseline, settings.compared), strict=True):
        if curve is None and method == "fit":
            return f"{family} has no power law: it takes three costs at least, and losses that fall"
        if curve is None:
            return f"{family} has no point whose {cost.replace('_', ' ')} are known"
    base, other = (curve for curve in curves if curve is not None)
    if min(base.worst, other.worst) <= max(base.best, other.best):
        return (
            f"no loss is reached by both: {settings.baseline} goes from {base.worst:.4f} to {base.best:.4f} nats a "
            f"token, {settings.compared} from {other.worst:.4f} to {other.best:.4f}"
        )
    return ""


def _interval(logs: Numbers, confidence: float) -> tuple[Numbers, Numbers, Numbers]:
    """Percentiles of each column's numbers, as factors; [replicates, targets] -> three of [targets]."""
    shares = np.isfinite(logs).mean(axis=0) if len(logs) else np.zeros(logs.shape[1])
    low, high = np.full(logs.shape[1], math.nan), np.full(logs.shape[1], math.nan)
    for column in np.flatnonzero(shares >= LEAST_SHARE):
        known = logs[np.isfinite(logs[:, column]), column]
        low[column], high[column] = np.exp(np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return low, high, shares


def _moved_losses(candidates: Sequence[Candidate], settings: AnalysisSettings, domain: str) -> Numbers:
    """[replicates, candidates]: losses as other seeds and texts might have given them."""
    models = list(dict.fromkeys(each.model for each in candidates))
    column = np.array([models.index(each.model) for each in candidates], dtype=np.int64)
    generator = np.random.default_rng([settings.seed, zlib.crc32(domain.encode())])
    noise, count = noise_of(candidates), settings.num_replicates
    draws: Callable[..., Numbers] = generator.standard_normal
    text = draws((count, len(models)))
    if settings.text_noise == "shared":
        text = np.repeat(text[:, :1], len(models), axis=1)
    seeds = generator.standard_t(noise.degrees, (count, len(models))) if noise.degrees else np.zeros_like(text)
    of_seeds = np.array([noise.deviations.get(each.tokens, 0.0) / math.sqrt(len(each.losses)) for each in candidates])
    of_text = np.array([each.text_se for each in candidates])
    losses = np.array([each.loss for each in candidates])
    return losses + of_seeds * seeds[:, column] + of_text * text[:, column]
