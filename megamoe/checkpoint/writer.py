"""What one rank writes: a safetensors file for each kind, then its part of the manifest. No collectives."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megamoe.checkpoint import faults, manifest
from megamoe.checkpoint.files import CHUNK_BYTES, replace_file, saving, sync_folder, write_all
from megamoe.checkpoint.manifest import FileEntry, Part, StoredSlice, TensorEntry
from megamoe.checkpoint.slices import STORAGE, Slice
from megamoe.checkpoint.strict_json import checksum
from megamoe.errors import SaveError

# The bytes of a slice, whole blocks first to last; the memory of one may be used again for the next.
Blocks = Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class Save:
    """Which save, and where: the same for every file of a rank."""

    partial: Path
    rank: int
    save_id: str
    step: int


def write_rank(
    partial: Path, *, rank: int, save_id: str, step: int, slices: Sequence[tuple[Slice, np.ndarray]]
) -> None:
    """Write the slices that this rank owns into the partial folder, then report them to `commit`.

    Arrays are contiguous and in host memory; their bytes are written as they lie, hashed on the way, block by block,
    with no further copy. A file's fsync comes before the report that names it. Raises SaveError when the disk refuses,
    CheckpointError for arrays that do not fit their slices.
    """
    sources = []
    for piece, array in slices:
        piece.check()
        if array.nbytes != piece.num_bytes or not array.flags.c_contiguous:
            raise SaveError(f"{piece.kind} {piece.label} needs {piece.num_bytes} contiguous bytes, not {array.nbytes}")
        sources.append((piece, _blocks_of(array)))
    write_streams(Save(partial, rank, save_id, step), sources)


def write_streams(save: Save, sources: Sequence[tuple[Slice, Blocks]]) -> None:
    """As `write_rank`, with bytes that are made while they are written."""
    files: list[FileEntry] = []
    entries: dict[tuple[str, str], TensorEntry] = {}
    by_kind = sorted(sources, key=lambda source: source[0].kind)
    for kind, group in itertools.groupby(by_kind, key=lambda source: source[0].kind):
        # Wide items first: then every tensor of the file is aligned for whoever maps it.
        ordered = sorted(group, key=lambda source: -STORAGE[source[0].dtype].itemsize)
        file, stored = _write_file(save, kind, ordered, number=len(files))
        files.append(file)
        for (piece, _), one in zip(ordered, stored, strict=True):
            key = (piece.kind, piece.name)
            slices = (*entries[key].slices, one) if key in entries else (one,)
            entries[key] = TensorEntry(piece.kind, piece.name, piece.dtype, piece.shape, slices)
    block_bytes = manifest.BLOCK_BYTES
    part = Part(save.rank, save.save_id, save.step, block_bytes, tuple(files), tuple(entries.values()))
    with saving(save.partial):
        replace_file(save.partial / part_name(save.rank), part.to_bytes(), point="part")
        sync_folder(save.partial)
        faults.reach("part-folder-synced")


def part_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _blocks_of(array: np.ndarray) -> Blocks:
    def blocks() -> Iterator[memoryview]:
        data = memoryview(array.reshape(-1).view(np.uint8))
        for start in range(0, len(data), manifest.BLOCK_BYTES):
            yield data[start : start + manifest.BLOCK_BYTES]

    return blocks


def _write_file(
    save: Save, kind: str, sources: Sequence[tuple[Slice, Blocks]], *, number: int
) -> tuple[FileEntry, list[StoredSlice]]:
    path = save.partial / f"{kind}_rank_{save.rank:05d}.safetensors"
    header = _header(save, kind, [piece for piece, _ in sources])
    offset, stored = len(header), []
    with saving(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            faults.reach("file-opened")
            write_all(descriptor, memoryview(header))
            faults.reach("file-header")
            for piece, blocks in sources:
                checksums, position = [], offset
                for block in blocks():
                    checksums.append(_write_block(descriptor, block))
                    # Linux begins to write the block to the disk now, so that the fsync at the end has little to do.
                    os.posix_fadvise(descriptor, position, len(block), os.POSIX_FADV_DONTNEED)
                    position += len(block)
                    faults.reach("file-block")
                stored.append(StoredSlice(number, offset, piece.box, piece.first, piece.last, tuple(checksums)))
                offset += piece.num_bytes
            faults.reach("file-written")
            os.fsync(descriptor)
            faults.reach("file-synced")
        except OSError:
            with contextlib.suppress(OSError):  # on a full disk: room for the report of what went wrong
                os.unlink(path)
            raise
        finally:
            os.close(descriptor)
    return FileEntry(path.name, offset, len(header), checksum(header)), stored


def _write_block(descriptor: int, block: memoryview) -> str:
    """Write one block; returns its checksum."""
    digest = xxhash.xxh3_64()
    for start in range(0, len(block), CHUNK_BYTES):
        chunk = block[start : start + CHUNK_BYTES]
        digest.update(chunk)
        write_all(descriptor, chunk)
    return digest.hexdigest()


def _header(save: Save, kind: str, pieces: Sequence[Slice]) -> bytes:
    """A safetensors header: its length in 8 bytes, then JSON, padded to a multiple of 8."""
    tree: dict[str, object] = {
        "__metadata__": {
            "format": manifest.FORMAT,
            "version": str(manifest.VERSION),
            "save_id": save.save_id,
            "step": str(save.step),
            "kind": kind,
            "rank": str(save.rank),
        }
    }
    offset = 0
    for piece in pieces:
        if piece.label in tree:
            raise SaveError(f"{piece.kind} {piece.label} was given twice to rank {save.rank}")
        end = offset + piece.num_bytes
        tree[piece.label] = {"dtype": piece.dtype, "shape": [piece.num_elements], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
