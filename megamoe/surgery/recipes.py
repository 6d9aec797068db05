"""What an operation is made of: regions of the new model's tensors, each a weighted sum of regions of old ones.

A recipe says where every element comes from; `megamoe.surgery.values` computes it, window by window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.slices import STORAGE, Box, Slice, whole_box
from megamoe.config.schema import Config
from megamoe.errors import ConversionError
from megamoe.surgery.sources import WEIGHT, Sources
from megamoe.topology.initial import Initial
from megamoe.topology.parameters import Parameter, param_table


@dataclass(frozen=True, slots=True)
class Term:
    """`factor` times the elements of `box` of a tensor of one source, in row-major order."""

    source: int
    entry: TensorEntry
    box: Box
    factor: float = 1.0

    def part(self, first: int, last: int) -> Slice:
        """Elements [first, last) of the box, to be read."""
        entry = self.entry
        return Slice(entry.kind, entry.name, entry.dtype, entry.shape, self.box, first, last)


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian noise on a region with one term: its standard deviation is `relative_std` times their root mean square.

    The draw belongs to `key` and the place in the region, under `seed`: windows and their order do not matter.
    """

    relative_std: float
    seed: int
    key: str


@dataclass(frozen=True, slots=True)
class Draw:
    """A region without terms: fresh values of a distribution, reproducible as `Noise` is."""

    initial: Initial
    seed: int
    key: str


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of `box` of a new tensor: the sum of the terms, element by element in row-major order."""

    box: Box
    terms: tuple[Term, ...] = ()
    noise: Noise | None = None
    draw: Draw | None = None


@dataclass(frozen=True)
class Target:
    """A tensor of the new checkpoint; its regions hold every element once."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize

    def slice_of(self, region: Region, first: int, last: int) -> Slice:
        return Slice(self.kind, self.name, self.dtype, self.shape, region.box, first, last)


@dataclass(frozen=True)
class Plan:
    """One operation, ready to be carried out by `megamoe.surgery.execute.apply`."""

    operation: str
    arguments: dict[str, Any]  # as JSON has them: with the sources they decide every byte of the result
    config: Config
    targets: tuple[Target, ...]
    preserves: str  # what of the old function the new model computes
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """To be written, for a progress bar."""
        return sum(target.num_bytes for target in self.targets)


Change = Callable[[Parameter], Sequence[Region] | None]


def build_targets(sources: Sources, config: Config, change: Change) -> tuple[Target, ...]:
    """The weights of the model of `config`: by `change` where that gives regions, else as the first source has them.

    A tensor is of the type of what it is made from. Raises ConversionError for a parameter that comes from nowhere.
    """
    targets = []
    for parameter in param_table(config.model, config.moe):
        regions = change(parameter)
        if regions is None:
            entry = sources.parameter_like(parameter, parameter.shape)
            regions = [Region(whole_box(entry.shape), (Term(0, entry, whole_box(entry.shape)),))]
        dtypes = {term.entry.dtype for region in regions for term in region.terms}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        targets.append(Target(WEIGHT, parameter.name, dtype, parameter.shape, tuple(regions)))
    return tuple(targets)


def rows(box: Box, start: int, stop: int) -> Box:
    """`box` with other edges in its first dimension."""
    return ((start, stop), *box[1:])


def check_regions(target: Target) -> None:
    """Raises ConversionError unless every term of a region has the region's sizes, but for dimensions of one."""
    for region in target.regions:
        for term in region.terms:
            if _sizes(term.box) != _sizes(region.box):
                raise ConversionError(
                    f"{target.name} {list(region.box)} is made from {list(term.box)}, of another size"
                )


def _sizes(box: Box) -> list[int]:
    return [stop - start for start, stop in box if stop - start > 1]
