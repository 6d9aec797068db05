"""Where an axis has its marks, and what stands there."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, even or by powers, onto 0 to 1."""

    low: float
    high: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        if self.is_log:
            if value <= 0.0:
                return -1.0  # below every power: outside of the picture
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


def make_scale(low: float, high: float, *, is_log: bool = False, from_zero: bool = False) -> Scale:
    """A scale that holds both, with some room, and never of no extent."""
    if is_log and low > 0.0:
        decades = math.log10(high) - math.log10(low)  # their quotient may be beyond every float
        if decades < 0.02:
            return Scale(low / 1.5, high * 1.5, True)
        room = 10 ** min(0.04 * decades, 0.5)
        return Scale(low / room, high * room, True)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(high) * 0.1 or 1.0
        return Scale(0.0 if from_zero and low >= 0.0 else low - room, high + room)
    room = 0.04 * (high - low)
    return Scale(low if from_zero and low == 0.0 else low - room, high + room)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values between low and high."""
    extent = high - low
    if not (extent > 0.0 and math.isfinite(extent)):
        return [low]
    step = 10.0 ** math.floor(math.log10(extent / most))
    step *= next(factor for factor in (1, 2, 5, 10) if extent / (factor * step) <= most)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten, and what lies between them where there is room for it."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3 * most:
        step = -(-(last - first) // most)
        return [10.0**power for power in range(first, last + 1, step) if low <= 10.0**power <= high]
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= most:
            break
    while len(found) > most:
        found = found[::2]
    return found if len(found) >= 2 else linear_ticks(low, high, most)


def scale_ticks(scale: Scale, most: int) -> list[float]:
    return (log_ticks if scale.is_log else linear_ticks)(scale.low, scale.high, most)
