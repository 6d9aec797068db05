"""Reading: any slice of any tensor, from whatever slices it was written in, in memory that does not grow.

Bytes are read block by block, and a block's checksum is compared before one of its elements is used.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from megamoe.checkpoint.files import CHUNK_BYTES, OpenFiles, open_regular, read_into
from megamoe.checkpoint.manifest import (
    BLOCK_BYTES,
    MANIFEST,
    FileEntry,
    Manifest,
    StoredSlice,
    TensorEntry,
)
from megamoe.checkpoint.slices import STORAGE, Box, Slice, intersection, within
from megamoe.errors import CheckpointError


class Checkpoint:
    """One complete checkpoint, open for reading. Not to be shared between threads."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._files = OpenFiles()
        self._block = np.empty(0, np.uint8)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Read and check the manifest, and that the folder holds its files and no others, with their headers.

        Raises CheckpointError naming the file for anything missing, left over, of another size, or another save's.
        """
        checkpoint = cls(folder, Manifest.read(folder))
        checkpoint._check_folder()
        return checkpoint

    def close(self) -> None:
        """Close the files; reading opens them again."""
        self._files.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entry(self, kind: str, name: str) -> TensorEntry:
        """A tensor by kind and name. Raises CheckpointError when the checkpoint has none such."""
        try:
            return self.manifest.tensors[kind, name]
        except KeyError:
            raise CheckpointError(f"{self.folder} has no {kind} {name}") from None

    def read(self, target: Slice, out: np.ndarray, *, verify: bool = True) -> None:
        """Fill `out` with the elements of `target`.

        out: [target.num_elements], contiguous, of the stored dtype (16-bit floats as uint16 or float16). Raises
        CheckpointError naming file and tensor when a block it touches is damaged (with `verify`), a file ends early,
        or the checkpoint has no such tensor of that shape and dtype. What `out` then holds is not to be used.
        """
        entry = self.entry(target.kind, target.name)
        target.check()
        if (entry.shape, entry.dtype) != (target.shape, target.dtype):
            raise CheckpointError(
                f"{self.folder} holds {target.kind} {target.name} as {entry.dtype} {list(entry.shape)}, "
                f"not as {target.dtype} {list(target.shape)}"
            )
        storage = STORAGE[entry.dtype]
        if out.dtype.itemsize != storage.itemsize or out.shape != (target.num_elements,) or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, not {storage} ({target.num_elements},)")
        goals = [
            (box, out[offset : offset + _size(box)].view(storage).reshape(_shape(box)))
            for box, offset in target.boxes()
        ]
        filled = sum(
            self._copy_blocks(entry, stored, goals, verify) for stored in touching(entry, [box for box, _ in goals])
        )
        if filled != target.num_elements:
            raise CheckpointError(
                f"{self.folder} fills {filled} of {target.num_elements} elements of {target.kind} {target.label}"
            )

    def verify(self, *, sampled: float = 1.0, progress: Callable[[int], None] | None = None) -> None:
        """Compare the checksum of every block of every file, or of a random share of the blocks.

        `progress` is called with the number of bytes of each block. Raises CheckpointError naming file and tensor.
        """
        for entry in self.manifest.tensors.values():
            for stored in entry.slices:
                piece = entry.slice_of(stored)
                for index, (start, stop) in enumerate(self._block_ranges(piece)):
                    if sampled >= 1.0 or random.random() < sampled:
                        data = self._buffer((stop - start) * STORAGE[entry.dtype].itemsize)
                        self._read_block(entry, stored, index, start, data, True)
                    if progress is not None:
                        progress((stop - start) * STORAGE[entry.dtype].itemsize)

    def _block_ranges(self, piece: Slice) -> Iterator[tuple[int, int]]:
        """Element ranges of a stored slice that have a checksum each, counted from its beginning."""
        step = self.manifest.block_bytes // STORAGE[piece.dtype].itemsize
        for start in range(0, piece.num_elements, step):
            yield start, min(start + step, piece.num_elements)

    def _copy_blocks(
        self, entry: TensorEntry, stored: StoredSlice, goals: list[tuple[Box, np.ndarray]], verify: bool
    ) -> int:
        """Copy what the stored slice holds of the goals; returns the number of elements."""
        piece, copied = entry.slice_of(stored), 0
        storage = STORAGE[entry.dtype]
        for index, (start, stop) in enumerate(self._block_ranges(piece)):
            block = piece.part(start, stop)
            moves = [
                (box, offset, common, array[within(common, goal)])
                for box, offset in block.boxes()
                for goal, array in goals
                if (common := intersection(box, goal)) is not None
            ]
            if not moves:
                continue
            straight = len(moves) == 1 and moves[0][3].size == stop - start and moves[0][3].flags.c_contiguous
            if straight:  # the whole block goes to one place: no copy
                data = moves[0][3].reshape(-1).view(np.uint8)
                self._read_block(entry, stored, index, start, data, verify)
            else:
                data = self._buffer((stop - start) * storage.itemsize)
                self._read_block(entry, stored, index, start, data, verify)
                elements = data.view(storage)
                for box, offset, common, goal in moves:
                    goal[...] = elements[offset : offset + _size(box)].reshape(_shape(box))[within(common, box)]
            copied += sum(goal.size for *_, goal in moves)
        return copied

    def _read_block(
        self, entry: TensorEntry, stored: StoredSlice, index: int, start: int, data: np.ndarray, verify: bool
    ) -> None:
        """Fill `data` with block `index` of a stored slice, which begins `start` elements into it, and check it."""
        file = self.manifest.files[stored.file]
        path = self.folder / file.name
        offset = stored.offset + start * STORAGE[entry.dtype].itemsize
        descriptor, view = self._files.descriptor(path), memoryview(data)
        if not verify:
            read_into(descriptor, view, offset, path)
            return
        digest = xxhash.xxh3_64()
        for begin in range(0, len(view), CHUNK_BYTES):
            chunk = view[begin : begin + CHUNK_BYTES]
            read_into(descriptor, chunk, offset + begin, path)
            digest.update(chunk)
        where = f"{path}: {entry.slice_of(stored).label} at byte {offset}"
        check_block(digest.hexdigest(), stored.checksums[index], where)

    def _buffer(self, num_bytes: int) -> np.ndarray:
        """Scratch memory for one block, used again and again."""
        if len(self._block) < num_bytes:
            self._block = np.empty(num_bytes, np.uint8)
        return self._block[:num_bytes]

    def _check_folder(self) -> None:
        expected = {file.name for file in self.manifest.files} | {MANIFEST}
        try:
            strangers = sorted(set(os.listdir(self.folder)) - expected)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be read ({error.strerror})") from None
        if strangers:
            raise CheckpointError(f"{self.folder / strangers[0]} is no file of this checkpoint: move it away")
        for file in self.manifest.files:
            self._check_file(file)

    def _check_file(self, file: FileEntry) -> None:
        path = self.folder / file.name
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if size != file.size:
                raise CheckpointError(
                    f"{path} has {size} bytes instead of {file.size}: it is damaged or another save's"
                )
            check_header(descriptor, file, path)
        finally:
            os.close(descriptor)


def check_block(actual: str, expected: str, where: str) -> None:
    """Raises CheckpointError, naming `where`, unless the checksums of a block are the same."""
    if actual != expected:
        raise CheckpointError(f"{where} is damaged: its checksum is wrong")


def check_header(descriptor: int, file: FileEntry, path: Path) -> None:
    """Raises CheckpointError unless the safetensors header is the one that was written."""
    digest, offset = xxhash.xxh3_64(), 0
    buffer = np.empty(min(file.header_bytes, BLOCK_BYTES), np.uint8)
    while offset < file.header_bytes:
        data = buffer[: file.header_bytes - offset]
        read_into(descriptor, memoryview(data), offset, path)
        digest.update(data)
        offset += len(data)
    if digest.hexdigest() != file.header_checksum:
        raise CheckpointError(f"{path} is damaged or of another save: the checksum of its header is wrong")


def touching(entry: TensorEntry, boxes: Sequence[Box]) -> list[StoredSlice]:
    """Stored slices whose box meets one of the boxes."""
    starts, stops = entry.bounds
    touched = np.zeros(len(entry.slices), bool)
    for box in boxes:
        edges = np.array(box, np.int64).reshape(len(box), 2)
        touched |= ((starts < edges[:, 1]) & (stops > edges[:, 0])).all(axis=1)
    return [entry.slices[index] for index in np.flatnonzero(touched)]


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _size(box: Box) -> int:
    size = 1
    for start, stop in box:
        size *= stop - start
    return size
