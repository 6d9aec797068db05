"""Regions of a megamoe checkpoint, of any size and order, from blocks that are read and checked once.

A block has one checksum, so it is read whole however little of it is wanted. Those last used are kept: neighbours in
the other format mostly come from the same.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import xxhash

from megamoe.checkpoint.files import CHUNK_BYTES, OpenFiles, read_into
from megamoe.checkpoint.manifest import StoredSlice, TensorEntry
from megamoe.checkpoint.reader import Checkpoint, check_block, touching
from megamoe.checkpoint.slices import STORAGE, Box, Slice, boxes_of, intersection, volume, within
from megamoe.convert.regions import flat_range

_AHEAD_BYTES = 8 << 20  # that the disk reads on while we hash
_Key = tuple[int, int]  # number of the file, first byte


class BlockReader:
    """Reads slices of a checkpoint through a cache of whole blocks. For one thread of one process."""

    def __init__(self, checkpoint: Checkpoint, cache_bytes: int) -> None:
        self._checkpoint = checkpoint
        self._blocks: OrderedDict[_Key, np.ndarray] = OrderedDict()
        self._num_kept = max(1, cache_bytes // checkpoint.manifest.block_bytes)
        self._files = OpenFiles()
        self.num_read_bytes = 0

    def read(self, target: Slice) -> np.ndarray:
        """[target.num_elements] as stored, not to be written to: it may be part of a block.

        Raises CheckpointError naming file and tensor for a damaged block.
        """
        entry = self._checkpoint.entry(target.kind, target.name)
        boxes = target.boxes()
        if len(boxes) == 1 and (found := self._in_one_block(entry, boxes[0][0])) is not None:
            return found
        out = np.empty(target.num_elements, STORAGE[entry.dtype])
        filled = 0
        for box, offset in boxes:
            goal = out[offset : offset + volume(box)].reshape(tuple(stop - start for start, stop in box))
            for stored in touching(entry, [box]):
                filled += self._copy(entry, stored, box, goal)
        assert filled == target.num_elements, target.label  # a manifest that was read covers every element once
        return out

    def close(self) -> None:
        self._files.close()

    def _in_one_block(self, entry: TensorEntry, box: Box) -> np.ndarray | None:
        """The elements of a box where they lie, if that is in one stretch of one block; else None."""
        stored_there = touching(entry, [box])
        if len(stored_there) != 1 or intersection(stored_there[0].box, box) != box:
            return None
        stored, per_block = stored_there[0], self._checkpoint.manifest.block_bytes // STORAGE[entry.dtype].itemsize
        first, last = (edge - stored.first for edge in flat_range(box, stored.box))
        index = first // per_block
        if last - first != volume(box) or first < 0 or last > min((index + 1) * per_block, stored.last - stored.first):
            return None
        return self._block(entry, stored, index)[first - index * per_block : last - index * per_block]

    def _copy(self, entry: TensorEntry, stored: StoredSlice, box: Box, goal: np.ndarray) -> int:
        """Copy what `stored` holds of `box` to `goal`, an array of its shape; returns the number of elements."""
        common = intersection(stored.box, box)
        if common is None:
            return 0
        whole_first, whole_last = flat_range(common, stored.box)
        first, last = max(whole_first, stored.first), min(whole_last, stored.last)
        copied = 0
        per_block = self._checkpoint.manifest.block_bytes // STORAGE[entry.dtype].itemsize
        for index, begin, end in _block_ranges(stored, first, last, per_block):
            block = self._block(entry, stored, index)
            if whole_last - whole_first == volume(common) and goal.flags.c_contiguous and common == box:
                start, stop = max(begin, first), min(end, last)  # in one stretch on both sides
                goal.reshape(-1)[start - whole_first : stop - whole_first] = block[start - begin : stop - begin]
                copied += stop - start
                continue
            for inner, offset in boxes_of(stored.box, begin, end):
                part = intersection(inner, box)
                if part is not None:
                    values = block[offset : offset + volume(inner)].reshape(tuple(b - a for a, b in inner))
                    goal[within(part, box)] = values[within(part, inner)]
                    copied += volume(part)
        return copied

    def _block(self, entry: TensorEntry, stored: StoredSlice, index: int) -> np.ndarray:
        """The elements of block `index` of a stored slice, checked."""
        block_bytes, storage = self._checkpoint.manifest.block_bytes, STORAGE[entry.dtype]
        key = (stored.file, stored.offset + index * block_bytes)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key].view(storage)
        size = min(block_bytes, (stored.last - stored.first) * storage.itemsize - index * block_bytes)
        free = self._blocks.popitem(last=False)[1] if len(self._blocks) >= self._num_kept else None
        # Used again unless somebody still looks into it; 2: this name, and the argument of the call.
        is_free = free is not None and len(free) == size and sys.getrefcount(free) == 2
        memory = free if is_free else None
        del free  # before there is another
        memory = np.empty(size, np.uint8) if memory is None else memory
        file = self._checkpoint.manifest.files[stored.file]
        path, digest, view = self._checkpoint.folder / file.name, xxhash.xxh3_64(), memoryview(memory)
        descriptor = self._files.descriptor(path)
        for begin in range(0, size, CHUNK_BYTES):
            if begin % (_AHEAD_BYTES // 2) == 0:
                os.posix_fadvise(descriptor, key[1] + begin, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            chunk = view[begin : begin + CHUNK_BYTES]
            read_into(descriptor, chunk, key[1] + begin, path)
            digest.update(chunk)
        self.num_read_bytes += size
        where = f"{path}: {entry.slice_of(stored).label} at byte {key[1]}"
        check_block(digest.hexdigest(), stored.checksums[index], where)
        self._blocks[key] = memory
        return memory.view(storage)


def _block_ranges(stored: StoredSlice, first: int, last: int, per_block: int) -> Iterator[tuple[int, int, int]]:
    """(number, first element, last) of the blocks of a stored slice that hold any of [first, last) of its box."""
    if first >= last:
        return
    for index in range((first - stored.first) // per_block, (last - 1 - stored.first) // per_block + 1):
        begin = stored.first + index * per_block
        yield index, begin, min(begin + per_block, stored.last)
