"""The numbers of a step that the host must know, and so waits for the device to have made: all pass through here.

Tensors without values have no numbers either: who runs a step on such (megamoe.dry_run) answers in their place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

Purpose = Literal["rows", "gradient norm"]
Reader = Callable[[Tensor, Purpose], Any]


def _from_device(values: Tensor, _: Purpose) -> Any:
    return values.tolist()


_reader: Reader = _from_device


def read_numbers(values: Tensor, purpose: Purpose) -> Any:
    """`values` as nested lists of numbers, as `Tensor.tolist` gives them. `purpose` is for a substitute to know."""
    return _reader(values, purpose)


@contextmanager
def numbers_from(reader: Reader) -> Iterator[None]:
    """Inside, `reader` answers instead of the device, with lists of the same shape."""
    global _reader
    before, _reader = _reader, reader
    try:
        yield
    finally:
        _reader = before
