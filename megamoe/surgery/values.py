"""The elements of a region, one window in memory at a time. Sums are fp64, in the order of the terms, rounded once."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.slices import STORAGE, Slice, volume
from megamoe.checkpoint.writer import Blocks
from megamoe.surgery.numbers import CHUNK, chunks_of, decode, draw, encode
from megamoe.surgery.recipes import Region, Target, Term
from megamoe.surgery.sources import Sources
from megamoe.topology.initial import Normal


class Kitchen:
    """Makes windows of regions; keeps the root mean squares it has measured. For one thread."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._rms: dict[tuple[object, ...], float] = {}
        self._scratch = np.empty(0, np.uint8)

    def blocks(self, target: Target, region: Region, piece: Slice, progress: Callable[[int], None] | None) -> Blocks:
        """The bytes of `piece`, a part of the region, block by block; `progress` hears of each."""

        def made() -> Iterator[memoryview]:
            storage = STORAGE[piece.dtype]
            step = manifests.BLOCK_BYTES // storage.itemsize
            window = np.empty(min(step, piece.num_elements), storage)
            for first in range(piece.first, piece.last, step):
                last = min(first + step, piece.last)
                self.fill(target, region, first, last, window[: last - first])
                yield memoryview(window[: last - first].view(np.uint8))
                if progress is not None:
                    progress((last - first) * storage.itemsize)

        return made

    def fill(self, target: Target, region: Region, first: int, last: int, out: np.ndarray) -> None:
        """out [last - first], as stored: elements [first, last) of the region in row-major order."""
        if _is_copy(target, region):
            term = region.terms[0]
            self._sources.read(term.source, term.part(first, last), out)
            return
        values = np.zeros(last - first)
        for term in region.terms:
            self._add(term, first, values)
        if region.draw is not None:
            for _, begin, end in chunks_of(first, last):
                fresh = region.draw
                values[begin - first : end - first] = draw(fresh.initial, fresh.seed, fresh.key, begin, end)
        if region.noise is not None:
            noise, std = region.noise, region.noise.relative_std * self._rms_of(region.terms[0])
            for _, begin, end in chunks_of(first, last):
                values[begin - first : end - first] += draw(Normal(std), noise.seed, f"noise/{noise.key}", begin, end)
        for _, begin, end in chunks_of(first, last):
            part = slice(begin - first, end - first)
            out[part] = encode(values[part], target.dtype, f"{target.kind} {target.name}")

    def _add(self, term: Term, first: int, values: np.ndarray) -> None:
        stored = self._read(term, first, first + len(values))
        for _, begin, end in chunks_of(0, len(values)):
            values[begin:end] += term.factor * decode(stored[begin:end], term.entry.dtype)

    def _read(self, term: Term, first: int, last: int) -> np.ndarray:
        """Elements as stored, in memory that the next call uses again."""
        storage = STORAGE[term.entry.dtype]
        num_bytes = (last - first) * storage.itemsize
        if len(self._scratch) < num_bytes:
            self._scratch = np.empty(num_bytes, np.uint8)
        stored = self._scratch[:num_bytes].view(storage)
        self._sources.read(term.source, term.part(first, last), stored)
        return stored

    def _rms_of(self, term: Term) -> float:
        """Root mean square of a term, in one pass over it; sums are of fixed chunks, then exact."""
        key = (term.source, term.entry.kind, term.entry.name, term.box)
        if key not in self._rms:
            size, sums = volume(term.box), []
            window = max(1, manifests.BLOCK_BYTES // STORAGE[term.entry.dtype].itemsize // CHUNK) * CHUNK
            for start in range(0, size, window):
                stored = self._read(term, start, min(start + window, size))
                for _, begin, end in chunks_of(start, start + len(stored)):
                    part = decode(stored[begin - start : end - start], term.entry.dtype)
                    sums.append(float(np.square(part).sum()))
            self._rms[key] = math.sqrt(math.fsum(sums) / size)
        return abs(term.factor) * self._rms[key]


def _is_copy(target: Target, region: Region) -> bool:
    """Bits that only move."""
    terms = region.terms
    return (
        len(terms) == 1 and terms[0].factor == 1.0 and terms[0].entry.dtype == target.dtype
        and region.noise is None and region.draw is None
    )  # fmt: skip
