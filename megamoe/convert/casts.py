"""From one floating-point format to another. What the narrower format can only call infinite is refused by name."""

from collections.abc import Callable

import numpy as np

from megamoe.checkpoint.floats import FLOATS, narrowed, overflows, widened
from megamoe.errors import ConversionError


def check_cast(name: str, source: str, target: str) -> None:
    """Raises ConversionError, naming the tensor, unless `cast` can go from one dtype to the other."""
    if source != target and not (source in FLOATS and target in FLOATS and target != "F64"):
        raise ConversionError(f"{name} is of dtype {source}, which cannot become {target}")


def cast(values: np.ndarray, source: str, target: str, element: Callable[[int], str]) -> np.ndarray:
    """Elements of dtype `source`, as stored, in dtype `target`; the same array where the two are one.

    Raises ConversionError on overflow, with what `element(number)` calls the first that does not fit.
    """
    if source == target:
        return values
    check_cast("a tensor", source, target)
    numbers = widened(values, source)
    result = narrowed(numbers, target)
    too_large = overflows(numbers, result, target).reshape(-1)
    if too_large.any():
        where = int(np.argmax(too_large))
        number = float(numbers.reshape(-1)[where])
        raise ConversionError(f"{element(where)} is {number:g}, which {target} cannot hold: convert to another dtype")
    return result
