"""The least cost at which a family of models reaches a loss: a monotone interpolation, and a power law beside it.

Losses are in nats a token, costs in any unit above 0. Outside of what was seen there is no number: NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MIN_FIT_COSTS = 4  # three would be met exactly by three parameters: nothing would say how well the law fits
_EXPONENTS = np.geomspace(0.005, 3.0, 161)
_REFINEMENTS = 3


@dataclass(frozen=True)
class Curve:
    """The points of a family that are better than every cheaper one; costs rise, losses fall.

    Between two of them log cost is a straight line over the loss.
    """

    costs: Numbers  # [points]
    losses: Numbers  # [points]

    @property
    def best(self) -> float:
        return float(self.losses[-1])

    @property
    def worst(self) -> float:
        return float(self.losses[0])

    def cost_at(self, targets: Numbers) -> Numbers:
        """The cost of reaching each target; NaN above the worst and below the best loss."""
        logs = np.interp(targets, self.losses[::-1], np.log(self.costs[::-1]), left=math.nan, right=math.nan)
        return np.exp(logs)

    def bounds_at(self, targets: Numbers) -> tuple[Numbers, Numbers]:
        """Between what the cost of each target lies. Beyond what was seen: what the dearest point does not reach takes
        more than that one; what the cheapest is better than, less."""
        known, is_beyond, is_before = self.cost_at(targets), targets < self.best, targets > self.worst
        low = np.where(is_beyond, self.costs[-1], np.where(is_before, 0.0, known))
        return low, np.where(is_beyond, math.inf, np.where(is_before, self.costs[0], known))


def lower_envelope(costs: Sequence[float] | Numbers, losses: Sequence[float] | Numbers) -> Curve:
    """The curve through those of the points that no cheaper or equally dear one equals or beats. At least one point."""
    costs, losses = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    order = np.lexsort((losses, costs))
    costs, losses = costs[order], losses[order]
    before = np.minimum.accumulate(np.concatenate([[math.inf], losses[:-1]]))
    kept = losses < before
    return Curve(costs[kept], losses[kept])


@dataclass(frozen=True)
class PowerLaw:
    """loss = offset + scale (cost / unit)^-exponent, and how far the points are from it."""

    offset: float
    scale: float
    exponent: float
    unit: float
    best: float  # losses of the points that it was fitted to: beyond them it says nothing
    worst: float
    residuals: Numbers  # [points] nats a token, of the points in the order given
    num_points: int

    @property
    def degrees(self) -> int:
        """Of freedom, that the three parameters leave."""
        return self.num_points - 3

    @property
    def misfit(self) -> float:
        """How far a point deviates from the law, by the residuals and their degrees of freedom."""
        return math.sqrt(float((self.residuals**2).sum()) / self.degrees)

    def loss_at(self, costs: Numbers) -> Numbers:
        return self.offset + self.scale * (np.asarray(costs) / self.unit) ** -self.exponent

    def cost_at(self, targets: Numbers) -> Numbers:
        """NaN beyond the losses of the points, and where the law does not reach."""
        costs = self.bounds_at(targets)[0]
        return np.where((targets >= self.best) & (targets <= self.worst) & np.isfinite(costs), costs, math.nan)

    def bounds_at(self, targets: Numbers) -> tuple[Numbers, Numbers]:
        """The law's own cost, twice; infinite where it never gets there. A little beyond the points it is taken at its
        word: where they end is chance."""
        with np.errstate(divide="ignore", over="ignore"):
            costs = self.unit * (np.maximum(targets - self.offset, 0.0) / self.scale) ** (-1.0 / self.exponent)
        return costs, costs


def fit_power_law(costs: Sequence[float] | Numbers, losses: Sequence[float] | Numbers) -> PowerLaw | None:
    """Least squares in the loss, with an offset of at least 0; None with too few costs or without a fall.

    The law is linear in scale and offset once the exponent is known: that one is searched, on a grid that is made finer
    around its best value.
    """
    costs, losses = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(np.unique(costs)) < MIN_FIT_COSTS:
        return None
    unit = float(np.exp(np.log(costs).mean()))
    logs, exponents = np.log(costs / unit), _EXPONENTS
    for _ in range(_REFINEMENTS + 1):
        offsets, scales, errors = _linear_parts(np.exp(-exponents[:, None] * logs), losses)
        best = int(np.argmin(errors))
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, len(exponents) - 1)]
        found = float(offsets[best]), float(scales[best]), float(exponents[best]), float(errors[best])
        exponents = np.geomspace(low, high, 41)
    offset, scale, exponent, error = found
    if not (scale > 0.0 and math.isfinite(error)):
        return None
    residuals = losses - (offset + scale * np.exp(-exponent * logs))
    return PowerLaw(offset, scale, exponent, unit, float(losses.min()), float(losses.max()), residuals, len(costs))


def _linear_parts(powers: Numbers, losses: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """For each row of cost^-exponent [exponents, points]: offset, scale, and the sum of squares that they leave."""
    centred = powers - powers.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scales = centred @ (losses - losses.mean()) / (centred**2).sum(axis=1)
        offsets = losses.mean() - scales * powers.mean(axis=1)
        through_zero = powers @ losses / (powers**2).sum(axis=1)
    scales = np.where(offsets < 0.0, through_zero, scales)
    offsets = np.maximum(offsets, 0.0)
    errors = ((losses - offsets[:, None] - scales[:, None] * powers) ** 2).sum(axis=1)
    return offsets, scales, np.where((scales > 0.0) & np.isfinite(errors), errors, math.inf)
