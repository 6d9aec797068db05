"""The side that is written, tensor by tensor: which link fills which box, and windows of it in whatever order suits.

Every window is a range of elements of a whole tensor. Of any link it holds one range, too: so a window costs its own
size in memory, however large the tensor. Only what a transposition turns around has to be there at once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megamoe.checkpoint.slices import STORAGE, Box, boxes_of, intersection, volume, whole_box, within
from megamoe.convert.casts import cast
from megamoe.convert.links import Link

# fetch(link, first, last): elements [first, last) of the link's box on the written side, in its dtype and order
Fetch = Callable[[Link, int, int], np.ndarray]


class Part(NamedTuple):
    """A box of a written tensor, and the link that fills it, or the one value that its elements have."""

    box: Box
    filler: Link | float


class Window(NamedTuple):
    """Elements from `first` on of the region with that number."""

    region: int
    first: int
    values: np.ndarray


@dataclass(frozen=True)
class Region:
    """One tensor of the written side."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[Part, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * STORAGE[self.dtype].itemsize

    @cached_property
    def stretches(self) -> list[tuple[int, int, Part]] | None:
        """(first, last, part) in order, where every part's box is one range of elements; else None."""
        found = []
        for part in self.parts:
            first, last = flat_range(part.box, whole_box(self.shape))
            if last - first != volume(part.box):
                return None
            found.append((first, last, part))
        return sorted(found, key=lambda stretch: stretch[0])

    @cached_property
    def _edges(self) -> np.ndarray:
        """[parts, dimensions, 2]"""
        return np.array([part.box for part in self.parts], np.int64).reshape(len(self.parts), -1, 2)

    def window(self, first: int, last: int, fetch: Fetch) -> np.ndarray:
        """Elements [first, last), contiguous, as stored."""
        out: np.ndarray | None = None
        filled = 0
        for box, offset in boxes_of(whole_box(self.shape), first, last):
            for part, common in self._touching(box):
                begin, end = flat_range(common, part.box)  # one range: a full box that another cuts
                assert end - begin == volume(common)
                values = self._values(part, begin, end, fetch)
                if end - begin == last - first:
                    return values.reshape(-1)
                if out is None:
                    out = np.empty(last - first, STORAGE[self.dtype])
                goal = out[offset : offset + volume(box)].reshape(tuple(b - a for a, b in box))
                goal[within(common, box)] = values.reshape(tuple(b - a for a, b in common))
                filled += end - begin
        assert filled == last - first, self.name  # Conversion.prove has shown that every element has one source
        return out

    def _values(self, part: Part, begin: int, end: int, fetch: Fetch) -> np.ndarray:
        if isinstance(part.filler, Link):
            return fetch(part.filler, begin, end)
        return np.full(end - begin, stored_value(part.filler, self.dtype), STORAGE[self.dtype])

    def _touching(self, box: Box) -> Iterator[tuple[Part, Box]]:
        wanted = np.array(box, np.int64).reshape(len(box), 2)
        touched = ((self._edges[:, :, 0] < wanted[:, 1]) & (self._edges[:, :, 1] > wanted[:, 0])).all(axis=1)
        for index in np.flatnonzero(touched):
            part = self.parts[index]
            yield part, intersection(part.box, box)


class Fetcher:
    """Fetches elements of links from the side that is read, turning round what a view turns round."""

    def __init__(self, read: Fetch, *, to_theirs: bool, window_elements: int) -> None:
        """read(link, first, last): elements of the link's box on the read side, in the order and dtype of that side."""
        self._read, self._to_theirs, self._window_elements = read, to_theirs, window_elements
        self._turned: tuple[Link, int, np.ndarray] | None = None  # the chunk that was turned round last

    def __call__(self, link: Link, first: int, last: int) -> np.ndarray:
        if link.view is None:
            return self._read(link, first, last)
        # Axes that stay in front do not move: what they number are chunks, each turned round by itself.
        kept = next((axis for axis, place in enumerate(link.order) if axis != place), len(link.order))
        chunk = math.prod(link.view[kept:])
        if chunk <= self._window_elements:
            low = first // chunk * chunk
            return self._turn(link, low, -(-last // chunk) * chunk, kept)[first - low : last - low]
        out = []
        for low in range(first // chunk * chunk, last, chunk):
            if self._turned is None or self._turned[0] is not link or self._turned[1] != low:
                self._turned = None  # its memory first
                self._turned = (link, low, self._turn(link, low, low + chunk, kept))
            out.append(self._turned[2][max(first - low, 0) : last - low])
        return np.concatenate(out) if len(out) > 1 else out[0]

    def _turn(self, link: Link, low: int, high: int, kept: int) -> np.ndarray:
        sizes, order = link.view[kept:], [place - kept for place in link.order[kept:]]
        if not self._to_theirs:
            sizes, order = tuple(sizes[place] for place in order), list(np.argsort(order))
        values = self._read(link, low, high).reshape(-1, *sizes)
        return values.transpose(0, *(place + 1 for place in order)).reshape(-1)


def in_order_of_source(regions: Sequence[Region], fetch: Fetch, window_bytes: int) -> Iterator[Window]:
    """Every element of every region once. Regions that one tensor of ours fills come together, in the order in which
    it lies there, so that its blocks are read once; windows of each region always come in order, too."""
    together: dict[object, list[int]] = defaultdict(list)
    for number, region in enumerate(regions):
        together[_only_source(region) or number].append(number)
    for numbers in together.values():
        runs = []
        for number in numbers:
            region = regions[number]
            if _only_source(region) is None:
                runs.append((0, number, 0, region.num_elements))
            else:
                runs += [(part.filler.our_box, number, first, last) for first, last, part in region.stretches]
        for _, number, first, last in sorted(runs, key=lambda run: run[0]) if len(runs) > 1 else runs:
            region = regions[number]
            step = max(1, window_bytes // STORAGE[region.dtype].itemsize)
            for begin in range(first, last, step):
                end = min(begin + step, last)
                yield Window(number, begin, region.window(begin, end, fetch))


def element_name(name: str, box: Box, number: int) -> str:
    """What element `number` of a box, in row-major order, is called: `name[3, 5]`."""
    place = np.unravel_index(number, tuple(stop - start for start, stop in box))
    return f"{name}{[int(at) + start for at, (start, _) in zip(place, box, strict=True)]}"


def stored_value(value: float, dtype: str) -> np.generic:
    """A number in the bits of a dtype."""
    return cast(np.array([value], np.float32), "F32", dtype, lambda _: f"the constant {value}")[0]


def flat_range(inner: Box, outer: Box) -> tuple[int, int]:
    """The first element of `inner` and the one behind its last, as `outer` counts them in row-major order."""
    sizes = [stop - start for start, stop in outer]
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    first = sum((a - c) * stride for (a, _), (c, _), stride in zip(inner, outer, strides, strict=True))
    last = sum((b - 1 - c) * stride for (_, b), (c, _), stride in zip(inner, outer, strides, strict=True))
    return first, last + 1


def _only_source(region: Region) -> tuple[str, str] | None:
    """The tensor of ours that fills the region, if it is one and fills it from its beginning on; else None."""
    if region.stretches is None or not all(isinstance(part.filler, Link) for part in region.parts):
        return None
    sources = {part.filler.ours for part in region.parts}
    boxes = [part.filler.our_box for _, _, part in region.stretches]
    return next(iter(sources)) if len(sources) == 1 and boxes == sorted(boxes) else None
