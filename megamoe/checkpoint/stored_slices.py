"""The slices of one tensor in a manifest, checked all at once: a large one has hundreds of thousands."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamoe.checkpoint.slices import MAX_BYTES, STORAGE, Box, Slice
from megamoe.errors import CheckpointError

_HEX = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One tensor file: a plain name, its size, and the bytes and checksum of its safetensors header."""

    name: str
    size: int
    header_bytes: int  # 8 bytes of length and the header itself: where the tensors begin
    header_checksum: str


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """Where elements [first, last) of `box` lie: byte `offset` of file number `file`; a checksum for each block."""

    file: int
    offset: int
    box: Box
    first: int
    last: int
    checksums: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SliceReader:
    """Reads the slices of one tensor, (kind, name) of `dtype` and `shape`, that lie in `files`."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    files: Sequence[FileEntry]
    block_bytes: int
    where: str

    def read(self, items: list[Any]) -> tuple[StoredSlice, ...]:
        """Slices from [file, offset, box, first, last, checksums] each. Raises CheckpointError, naming the tensor, for
        anything but pieces of it that lie inside their files."""
        if not self._all_are_good(items):
            return tuple(self._one(columns) for columns in items)  # says what is wrong
        return tuple(
            StoredSlice(file, offset, tuple([(start, stop) for start, stop in box]), first, last, tuple(checksums))
            for file, offset, box, first, last, checksums in items
        )

    def _all_are_good(self, items: list[Any]) -> bool:
        """Whether `_one` would take every one of them."""
        if not items:
            return True
        dims = len(self.shape)
        if not all(type(columns) is list and len(columns) == 6 for columns in items):
            return False
        if not all(type(columns[2]) is list and len(columns[2]) == dims for columns in items):
            return False
        if not all(type(pair) is list and len(pair) == 2 for columns in items for pair in columns[2]):
            return False
        numbers = [n for columns in items for n in (columns[0], columns[1], columns[3], columns[4])]
        edges = [edge for columns in items for pair in columns[2] for edge in pair]
        if not {*map(type, numbers), *map(type, edges)} <= {int} or not all(0 <= n <= MAX_BYTES for n in numbers):
            return False
        if not all(0 <= edge <= MAX_BYTES for edge in edges):
            return False
        if not all(type(columns[5]) is list for columns in items):
            return False
        if not all(type(digits) is str and _HEX.fullmatch(digits) for columns in items for digits in columns[5]):
            return False
        placed = np.array(numbers, np.int64).reshape(-1, 4)
        boxes = np.array(edges, np.int64).reshape(len(items), dims, 2)
        return self._lie_inside(placed, boxes, np.array([len(columns[5]) for columns in items]))

    def _lie_inside(self, placed: np.ndarray, boxes: np.ndarray, num_checksums: np.ndarray) -> bool:
        """`placed` [slices, 4] has file, offset, first and last; `boxes` [slices, dimensions, 2]."""
        file, offset, first, last = placed.T
        starts, stops = boxes[:, :, 0], boxes[:, :, 1]
        if not ((starts < stops) & (stops <= np.array(self.shape, np.int64))).all() or file.max() >= len(self.files):
            return False
        volumes = (stops - starts).prod(axis=1)  # no overflow: boxes lie inside the tensor, whose bytes are counted
        if not ((first < last) & (last <= volumes)).all():
            return False
        num_bytes = (last - first) * STORAGE[self.dtype].itemsize
        begin = np.array([entry.header_bytes for entry in self.files], np.int64)[file]
        end = np.array([entry.size for entry in self.files], np.int64)[file]
        inside = (begin <= offset) & (offset <= end) & (num_bytes <= end - offset)
        return bool((inside & (num_checksums == -(-num_bytes // self.block_bytes))).all())

    def _one(self, columns: Any) -> StoredSlice:
        what = f"{self.where}: {self.kind} {self.name}"
        if not isinstance(columns, list) or len(columns) != 6:
            raise CheckpointError(f"{what} has a slice that is no list of six")
        file, offset, box, first, last, checksums = columns
        if not isinstance(box, list) or not isinstance(checksums, list):
            raise CheckpointError(f"{what} has a slice without box or checksums")
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in box):
            raise CheckpointError(f"{what} has a slice whose box is no list of pairs")
        for number in (file, offset, first, last, *(edge for pair in box for edge in pair)):
            check_integer(number, "a number of a slice", what, 0, MAX_BYTES)
        if file >= len(self.files):
            raise CheckpointError(f"{what} has a slice in file number {file}, of {len(self.files)}")
        ranges = tuple((start, stop) for start, stop in box)
        stored = StoredSlice(file, offset, ranges, first, last, tuple(check_hex(digits, what) for digits in checksums))
        piece = Slice(self.kind, self.name, self.dtype, self.shape, ranges, first, last)
        piece.check(f"{self.where}: ")
        if offset < self.files[file].header_bytes or offset + piece.num_bytes > self.files[file].size:
            raise CheckpointError(f"{what} has a slice outside its file {self.files[file].name}")
        if len(checksums) != -(-piece.num_bytes // self.block_bytes):
            raise CheckpointError(f"{what} has {len(checksums)} checksums for {piece.num_bytes} bytes")
        return stored


def check_integer(value: Any, what: str, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:  # True is an int, and a float is none
        raise CheckpointError(f"{where} is damaged: {what} is {str(value)[:40]}")
    return value


def check_hex(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise CheckpointError(f"{where} is damaged: {str(value)[:40]!r} is no checksum")
    return value
