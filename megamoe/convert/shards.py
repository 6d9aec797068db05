"""Safetensors files as Hugging Face folders have them: which tensor lies in which, and one of them written as a stream.

A file takes its name when all of it is on the disk; then a small sealed record says so, with a checksum of each tensor.
Whoever goes on later believes a file only after reading it and finding those checksums.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megamoe.checkpoint import faults
from megamoe.checkpoint.files import CHUNK_BYTES, WRITING, read_into, read_small, replace_file, sync_folder
from megamoe.checkpoint.outputs import writing
from megamoe.checkpoint.slices import STORAGE
from megamoe.checkpoint.strict_json import checksum, seal, unseal
from megamoe.convert.foreign import INDEX, SINGLE
from megamoe.convert.regions import Region, Window
from megamoe.errors import CheckpointError

SHARD_BYTES = 5_000_000_000  # as `save_pretrained` has it: 5 GB
_MAX_RECORD_BYTES = 1 << 28
_READ_BYTES = 8 << 20

POINTS = (  # of `megamoe.checkpoint.faults`, that a shard comes by
    "shard-opened",
    "shard-header",
    "shard-window",  # once for every window
    "shard-written",
    "shard-synced",
    "shard-renamed",
    "record-written",
    "record-synced",
    "record-renamed",
    "shard-recorded",
)


@dataclass(frozen=True)
class Shard:
    """One file: its name and its tensors, in the order in which their bytes lie there."""

    file: str
    regions: tuple[Region, ...]

    @property
    def num_bytes(self) -> int:
        return sum(region.num_bytes for region in self.regions)

    def header(self) -> bytes:
        """The length in 8 bytes, then JSON, padded to a multiple of 8."""
        tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for region, offset in zip(self.regions, self.offsets(), strict=True):
            ends = [offset, offset + region.num_bytes]
            tree[region.name] = {"dtype": region.dtype, "shape": list(region.shape), "data_offsets": ends}
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def offsets(self) -> list[int]:
        """Where each tensor begins, counted from the end of the header."""
        return [int(end) for end in np.cumsum([0, *(region.num_bytes for region in self.regions)])[:-1]]


@dataclass(frozen=True)
class Record:
    """What a finished shard is: checksums are xxh3_64 of the header and of the bytes of each tensor."""

    file: str
    size: int
    header_checksum: str
    checksums: dict[str, str]  # by name of the tensor
    num_read_bytes: int  # of the source

    def to_bytes(self, plan_id: str) -> bytes:
        return seal({"plan": plan_id, **vars(self)})


def plan_shards(regions: Iterable[Region], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Regions in their order, dealt to files of at most `shard_bytes`; a larger tensor has a file to itself.

    One file is called `model.safetensors` and needs no index, as transformers has it.
    """
    groups: list[list[Region]] = [[]]
    size = 0
    for region in regions:
        if groups[-1] and size + region.num_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(region)
        size += region.num_bytes
    if len(groups) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    # Wide items first: then every tensor of the file is aligned for whoever maps it.
    ordered = [sorted(group, key=lambda region: -STORAGE[region.dtype].itemsize) for group in groups]
    return [Shard(name, tuple(group)) for name, group in zip(names, ordered, strict=True)]


def index_bytes(shards: Sequence[Shard]) -> bytes:
    """`model.safetensors.index.json`."""
    weight_map = {region.name: shard.file for shard in shards for region in shard.regions}
    total_size = sum(shard.num_bytes for shard in shards)
    tree = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(tree, indent=2) + "\n").encode()


def small_files(shards: Sequence[Shard]) -> dict[str, bytes]:
    return {INDEX: index_bytes(shards)} if len(shards) > 1 else {}


def write_shard(folder: Path, shard: Shard, windows: Iterator[Window], *, with_holes: bool = False) -> dict[str, str]:
    """Write the file, flush it, give it its name; returns the checksum of each tensor.

    windows: every element of every region once, and those of each region in order. with_holes: where a window is all
    zeros the file gets a hole. Raises ConversionError when the disk refuses: the half file is then removed.
    """
    header, offsets = shard.header(), shard.offsets()
    path = folder / shard.file
    temporary = path.with_name(f".{path.name}{WRITING}")
    digests = [xxhash.xxh3_64() for _ in shard.regions]
    done = [0] * len(shard.regions)
    size = len(header) + shard.num_bytes
    with writing(path, remove=temporary):
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            faults.reach("shard-opened")
            _write_at(descriptor, memoryview(header), 0)
            faults.reach("shard-header")
            for number, first, values in windows:
                assert first == done[number], shard.regions[number].name
                done[number] += len(values)
                at = len(header) + offsets[number] + first * values.itemsize
                _write_window(descriptor, values, at, digests[number], with_holes)
                faults.reach("shard-window")
            assert done == [region.num_elements for region in shard.regions], shard.file
            if with_holes:
                os.ftruncate(descriptor, size)
            faults.reach("shard-written")
            os.fsync(descriptor)
            assert os.fstat(descriptor).st_size == size, shard.file
            faults.reach("shard-synced")
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        faults.reach("shard-renamed")
    return {region.name: digest.hexdigest() for region, digest in zip(shard.regions, digests, strict=True)}


def write_record(folder: Path, shard: Shard, plan_id: str, checksums: dict[str, str], num_read_bytes: int) -> None:
    """Say that the shard is finished, so that it lasts."""
    header = shard.header()
    record = Record(shard.file, len(header) + shard.num_bytes, checksum(header), checksums, num_read_bytes)
    with writing(folder):
        sync_folder(folder)  # the shard's name comes before the record that speaks of it
        replace_file(record_path(folder, shard), record.to_bytes(plan_id), point="record")
        sync_folder(folder)
        faults.reach("shard-recorded")


def record_path(folder: Path, shard: Shard) -> Path:
    return folder / f".{shard.file}.record"


def read_record(folder: Path, shard: Shard, plan_id: str) -> Record | None:
    """The record of a finished shard of this plan; None where there is none that is whole."""
    path = record_path(folder, shard)
    try:
        tree = unseal(read_small(path, _MAX_RECORD_BYTES), str(path))
        if tree.pop("plan") != plan_id:
            return None
        record = Record(**tree)
    except (CheckpointError, KeyError, TypeError):
        return None
    header = shard.header()
    expected = (shard.file, len(header) + shard.num_bytes, checksum(header))
    if (record.file, record.size, record.header_checksum) != expected:
        return None
    return record if set(record.checksums) == {region.name for region in shard.regions} else None


def is_whole(folder: Path, shard: Shard, checksums: dict[str, str]) -> Iterator[int | bool]:
    """Reads a finished shard: yields the number of bytes of each stretch, at last whether all is as recorded."""
    path, header = folder / shard.file, shard.header()
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        found = bytearray(len(header))
        read_into(descriptor, memoryview(found), 0, path)
        good = found == header and os.fstat(descriptor).st_size == len(header) + shard.num_bytes
        buffer = memoryview(np.empty(_READ_BYTES, np.uint8))
        for region, offset in zip(shard.regions, shard.offsets(), strict=True):
            if not good:
                break
            digest = xxhash.xxh3_64()
            for start in range(0, region.num_bytes, _READ_BYTES):
                data = buffer[: min(_READ_BYTES, region.num_bytes - start)]
                read_into(descriptor, data, len(header) + offset + start, path)
                digest.update(data)
                yield len(data)
            good = digest.hexdigest() == checksums[region.name]
    except CheckpointError:
        good = False
    finally:
        os.close(descriptor)
    yield good


def _write_window(descriptor: int, values: np.ndarray, at: int, digest: Any, with_holes: bool) -> None:
    data = memoryview(values.view(np.uint8))
    is_hole = with_holes and not values.any()
    for start in range(0, len(data), CHUNK_BYTES):  # hashed and copied while it is in the core's cache
        chunk = data[start : start + CHUNK_BYTES]
        digest.update(chunk)
        if not is_hole:
            _write_at(descriptor, chunk, at + start)
    # Linux begins to write the window to the disk now, so that the fsync at the end has little to do.
    os.posix_fadvise(descriptor, at, len(data), os.POSIX_FADV_DONTNEED)


def _write_at(descriptor: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, at)
        data, at = data[count:], at + count
