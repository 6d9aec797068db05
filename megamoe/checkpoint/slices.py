"""Addressing: which elements of a global tensor a stretch of bytes holds. Integers and numpy only.

A rank's part of a tensor is a box of the global tensor (one range for each dimension). ZeRO cuts that part, laid flat
in row-major order, at arbitrary elements. So every piece that any layout holds is a box and a range [first, last) of
the elements of that box: exact for every layout, with no padding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megamoe.errors import CheckpointError

Box = tuple[tuple[int, int], ...]  # (start, stop) of every dimension, in coordinates of the global tensor

# safetensors' dtype names -> how numpy holds their bits (numpy has no bfloat16; both 16-bit floats travel as uint16)
STORAGE = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.uint16), "BF16": np.dtype(np.uint16),
    "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "U8": np.dtype(np.uint8),
}  # fmt: skip
MAX_DIMS = 8
MAX_BYTES = 1 << 62  # of one tensor: sums of a few such still fit numpy's int64

# What belongs to a parameter of the model, by the parameter's name and shape.
PARAMETER_KINDS = ("weight", "master", "exp_avg", "exp_avg_sq", "momentum_buffer")


def volume(box: Box) -> int:
    """Elements of a box."""
    return math.prod(stop - start for start, stop in box)


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, size) for size in shape)


def intersection(one: Box, other: Box) -> Box | None:
    """The common part of two boxes of one tensor, or None."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """Where `inner`, a part of `outer`, lies in an array of the shape of `outer`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements [first, last), in row-major order of `box`, of the global tensor (kind, name) of `shape`."""

    kind: str
    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    box: Box
    first: int
    last: int

    @property
    def num_elements(self) -> int:
        return self.last - self.first

    @property
    def num_bytes(self) -> int:
        return self.num_elements * STORAGE[self.dtype].itemsize

    def boxes(self) -> list[tuple[Box, int]]:
        """The full boxes, in global coordinates, that [first, last) falls into, in order and without overlap.

        Each comes with its offset in elements within the slice, where it lies contiguous in row-major order. There are
        at most 2 * dimensions - 1 of them.
        """
        return boxes_of(self.box, self.first, self.last)

    def part(self, first: int, last: int) -> "Slice":
        """Elements [first, last) of this slice (counted from its own beginning), as a slice."""
        return Slice(self.kind, self.name, self.dtype, self.shape, self.box, self.first + first, self.first + last)

    @property
    def label(self) -> str:
        """The name in a safetensors file: `layers.0.ffn.fc1.weight[0:64,0:32][128:512]`."""
        ranges = ",".join(f"{start}:{stop}" for start, stop in self.box)
        return f"{self.name}[{ranges}][{self.first}:{self.last}]"

    def check(self, where: str = "") -> None:
        """Raises CheckpointError, beginning with `where` and the tensor, unless this is a piece of such a tensor."""
        what = f"{where}{self.kind} {self.name}"
        if self.dtype not in STORAGE:
            raise CheckpointError(f"{what} has dtype {self.dtype!r}: it must be one of {', '.join(STORAGE)}")
        check_shape(what, self.shape, STORAGE[self.dtype].itemsize)
        if len(self.box) != len(self.shape):
            raise CheckpointError(f"{what} has {len(self.shape)} dimensions, its slice {len(self.box)}")
        for (start, stop), size in zip(self.box, self.shape, strict=True):
            if not 0 <= start < stop <= size:
                raise CheckpointError(f"{what} of shape {list(self.shape)} has a slice of {start}:{stop} of {size}")
        if not 0 <= self.first < self.last <= volume(self.box):
            raise CheckpointError(
                f"{what} has a slice of elements {self.first}:{self.last} of a box of {volume(self.box)}"
            )


def check_shape(what: str, shape: tuple[int, ...], item_bytes: int) -> None:
    """Raises CheckpointError for dimensions that no tensor of ours has: too many, below 1, or overflowing."""
    if len(shape) > MAX_DIMS or any(size < 1 for size in shape) or math.prod(shape) > MAX_BYTES // item_bytes:
        raise CheckpointError(f"{what} has the impossible shape {str(list(shape))[:200]}")


def boxes_of(box: Box, first: int, last: int) -> list[tuple[Box, int]]:
    """`Slice.boxes` of elements [first, last) of `box`."""
    sizes = tuple(stop - start for start, stop in box)
    found, offset = [], 0
    for ranges in _split(sizes, first, last):
        found.append((tuple((s + a, s + b) for (s, _), (a, b) in zip(box, ranges, strict=True)), offset))
        offset += math.prod(b - a for a, b in ranges)
    return found


def _split(sizes: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """Boxes, relative to the corner, of elements [first, last) of an array of `sizes`: head, full rows, tail."""
    if first >= last:
        return
    if not sizes:
        yield ()
        return
    inner = math.prod(sizes[1:])
    (head_row, head), (tail_row, tail) = divmod(first, inner), divmod(last, inner)
    rest = tuple((0, size) for size in sizes[1:])
    if head_row == tail_row:
        for ranges in _split(sizes[1:], head, tail):
            yield ((head_row, head_row + 1), *ranges)
        return
    if head:
        for ranges in _split(sizes[1:], head, inner):
            yield ((head_row, head_row + 1), *ranges)
        head_row += 1
    if head_row < tail_row:
        yield ((head_row, tail_row), *rest)
    for ranges in _split(sizes[1:], 0, tail):
        yield ((tail_row, tail_row + 1), *ranges)
