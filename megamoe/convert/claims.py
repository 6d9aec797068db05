"""What a table claims of tensors of theirs that none of ours keeps: all one value, or equal to another to the bit."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megamoe.checkpoint.slices import STORAGE, Box, boxes_of, whole_box
from megamoe.convert.foreign import Source
from megamoe.convert.links import Conversion
from megamoe.convert.regions import element_name, stored_value
from megamoe.convert.workers import Task
from megamoe.errors import ConversionError

_WINDOW_BYTES = 8 << 20


@dataclass(frozen=True)
class Check:
    """A claim to test, and how many bytes its task speaks of."""

    task: Task
    num_bytes: int


def check_tasks(source: Source, conversion: Conversion) -> list[Check]:
    """A check for every constant and duplicate; each returns the number of bytes it has read, or raises ConversionError
    naming the first element that is otherwise."""
    checks = [_check(item.theirs, source, _constant(source, item.theirs, item.value)) for item in conversion.constants]
    return checks + [
        _check(item.theirs, source, _duplicate(source, item.theirs, item.original)) for item in conversion.duplicates
    ]


def _check(name: str, source: Source, run: Callable[[Callable[[int], None]], int]) -> Check:
    return Check(Task(f"the check of {name}", run), source.tensors[name].num_bytes)


def _constant(source: Source, name: str, value: float) -> Callable[[Callable[[int], None]], int]:
    def run(say: Callable[[int], None]) -> int:
        tensor = source.tensors[name]
        expected = np.float64(value) if tensor.dtype == "F64" else stored_value(value, tensor.dtype)
        for box in _windows(tensor.shape, STORAGE[tensor.dtype].itemsize):
            values = source.read(name, box)
            _compare(values, np.full_like(values, expected), name, box, f"{value} in every element")
            say(values.nbytes)
        return tensor.num_bytes

    return run


def _duplicate(source: Source, name: str, original: str) -> Callable[[Callable[[int], None]], int]:
    def run(say: Callable[[int], None]) -> int:
        tensor = source.tensors[name]
        if tensor != source.tensors[original]:
            raise ConversionError(f"{name} must repeat {original}, but has another dtype or shape")
        for box in _windows(tensor.shape, STORAGE[tensor.dtype].itemsize):
            values = source.read(name, box)
            _compare(values, source.read(original, box), name, box, f"equal to {original}")
            say(values.nbytes)
        return 2 * tensor.num_bytes

    return run


def _compare(values: np.ndarray, expected: np.ndarray, name: str, box: Box, must: str) -> None:
    bits = np.dtype(f"u{values.itemsize}")
    different = (values.view(bits) != expected.view(bits)).reshape(-1)
    if different.any():
        raise ConversionError(f"{element_name(name, box, int(np.argmax(different)))} is not what it must be: {must}")


def _windows(shape: tuple[int, ...], item_bytes: int) -> Iterator[Box]:
    step = _WINDOW_BYTES // item_bytes
    for first in range(0, math.prod(shape), step):
        for box, _ in boxes_of(whole_box(shape), first, min(first + step, math.prod(shape))):
            yield box
