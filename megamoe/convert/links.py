"""What a conversion is made of: regions of their tensors that are regions of ours, element for element.

A conversion is a table of `Link`s over the parameter table. Every step the field needs is one: a name for a name; a
box for a box splits, joins, stacks and unstacks (QKV, gate and linear half, experts); `view` and `order` transpose and
interleave. A link moves elements and never computes, so every table can be read in both directions and gives the same
bits back. `Conversion.prove` shows, before a byte moves, that every element of both sides is accounted for once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamoe.checkpoint.coverage import check_coverage
from megamoe.checkpoint.slices import Box, volume, whole_box
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError, ConversionError

WEIGHT = "weight"  # the kind of ours that most links are about; "balance_bias" is the other
Ours = tuple[str, str]  # kind and name of a tensor in a megamoe checkpoint


@dataclass(frozen=True, slots=True)
class Link:
    """Elements of `our_box`, row by row, seen as an array of shape `view` with its axes in `order`, are `their_box`.

    Without `view` the elements stand in the same order on both sides; the boxes may differ in shape (ones, merged
    dimensions). `order` is as in numpy.transpose.
    """

    ours: Ours
    our_box: Box
    theirs: str
    their_box: Box
    view: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def to_theirs(self, values: np.ndarray) -> np.ndarray:
        """Our region [any shape, row-major] as their region [shape of `their_box`]; a view where one exists."""
        if self.view is not None:
            values = values.reshape(self.view).transpose(self.order)
        return values.reshape(shape_of(self.their_box))

    def to_ours(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `to_theirs`: their region as ours [shape of `our_box`]."""
        if self.view is not None:
            turned = tuple(self.view[axis] for axis in self.order)
            values = values.reshape(turned).transpose(np.argsort(self.order))
        return values.reshape(shape_of(self.our_box))

    def check(self) -> None:
        """Raises ConversionError, naming both tensors, unless the two regions have the same elements."""
        what = f"{self.ours[1]} {list(self.our_box)} and {self.theirs} {list(self.their_box)}"
        if volume(self.our_box) != volume(self.their_box):
            raise ConversionError(f"{what} have different numbers of elements")
        if (self.view is None) != (self.order is None):
            raise ConversionError(f"{what} are linked by a view without an order, or an order without a view")
        if self.view is not None and (
            math.prod(self.view) != volume(self.our_box) or sorted(self.order) != list(range(len(self.view)))
        ):
            raise ConversionError(f"{what} are linked by {list(self.view)} in the order {list(self.order)}")


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that they have and we do not, because its every element is `value` in what we can express."""

    theirs: str
    value: float


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A tensor of theirs that must be equal, to the bit, to another of theirs: tied weights stored twice."""

    theirs: str
    original: str


@dataclass(frozen=True, slots=True)
class Padding:
    """A region of ours that they do not have: zero when we read theirs, left out, for the stated reason, when we write.

    Only rows of the vocabulary that no token id uses are so.
    """

    ours: Ours
    our_box: Box
    reason: str


@dataclass(frozen=True)
class Conversion:
    """One model in two formats: their tensors and ours by shape, the links between them, and what has no counterpart.

    `config` is megamoe's; `their_config` is config.json of a Hugging Face folder, or what else the format keeps.
    """

    config: Config
    their_config: Mapping[str, Any]
    ours: Mapping[Ours, tuple[int, ...]]
    theirs: Mapping[str, tuple[int, ...]]
    links: tuple[Link, ...]
    constants: tuple[Constant, ...] = ()
    duplicates: tuple[Duplicate, ...] = ()
    paddings: tuple[Padding, ...] = ()
    notes: tuple[str, ...] = field(default=())  # what the user should hear of: no change of the function

    def prove(self) -> None:
        """Every element of ours has one source and every element of theirs, too: else a ConversionError by name."""
        for link in self.links:
            link.check()
        ours: dict[Ours, list[Box]] = defaultdict(list)
        theirs: dict[str, list[Box]] = defaultdict(list)
        for link in self.links:
            ours[link.ours].append(link.our_box)
            theirs[link.theirs].append(link.their_box)
        for padding in self.paddings:
            ours[padding.ours].append(padding.our_box)
        for name in [item.theirs for item in (*self.constants, *self.duplicates)]:
            if name in theirs:
                raise ConversionError(f"{name} is made twice: by a link and as a constant or duplicate")
            theirs[name].append(whole_box(self._their_shape(name)))
        for duplicate in self.duplicates:
            if not any(link.theirs == duplicate.original for link in self.links):
                raise ConversionError(f"{duplicate.theirs} repeats {duplicate.original}, which no link makes")
        _prove_side("megamoe", {name: self.ours[key] for key, name in _named(self.ours)}, _by_name(ours))
        _prove_side("the other format", self.theirs, theirs)

    def _their_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.theirs:
            raise ConversionError(f"{name} is made, but is no tensor of the other format")
        return self.theirs[name]


def check_names(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raises ConversionError naming what `where` lacks and what it has unasked: nothing is skipped."""
    wanted, present = set(expected), set(found)
    if wanted == present:
        return
    problems = [
        f"{verb} {_some(names)}"
        for verb, names in (("lacks", wanted - present), ("has the unknown", present - wanted))
        if names
    ]
    raise ConversionError(f"{where} {' and '.join(problems)}: a conversion uses each tensor once and skips none")


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _prove_side(side: str, shapes: Mapping[str, tuple[int, ...]], boxes: Mapping[str, list[Box]]) -> None:
    check_names(shapes, boxes, f"the table of {side}")
    for name, shape in shapes.items():
        for box in boxes[name]:
            if len(box) != len(shape) or not all(
                0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=False)
            ):
                raise ConversionError(f"{name} of shape {list(shape)} has no region {list(box)}")
        try:
            check_coverage(name, shape, ((box, 0, volume(box)) for box in boxes[name]))
        except CheckpointError as error:
            raise ConversionError(str(error)) from None


def _named(ours: Mapping[Ours, tuple[int, ...]]) -> list[tuple[Ours, str]]:
    return [(key, " ".join(key)) for key in ours]


def _by_name(boxes: Mapping[Ours, list[Box]]) -> dict[str, list[Box]]:
    return {" ".join(key): found for key, found in boxes.items()}


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
