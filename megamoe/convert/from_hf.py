"""From another format's tensors to a megamoe checkpoint, by a proved table, in memory that does not grow.

Each process writes whole files of the checkpoint. A thread reads the next block of theirs while one is written.
"""

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megamoe.checkpoint import faults
from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.commit import fresh_state, library_versions, merge, read_part, write_manifest
from megamoe.checkpoint.files import open_regular, read_into, replace_file
from megamoe.checkpoint.folders import LATEST, checkpoint_name
from megamoe.checkpoint.manifest import MANIFEST, Part
from megamoe.checkpoint.outputs import check_places, check_room, growing, put_in_place, writing
from megamoe.checkpoint.reader import Checkpoint, check_block, check_header
from megamoe.checkpoint.slices import STORAGE, Slice, boxes_of, volume, whole_box
from megamoe.checkpoint.writer import Blocks, Save, part_name, write_streams
from megamoe.config.loading import dump_yaml
from megamoe.convert import regions
from megamoe.convert.casts import cast, check_cast
from megamoe.convert.claims import check_tasks
from megamoe.convert.foreign import Source, folder_fingerprint, open_source
from megamoe.convert.links import Conversion, Link, Ours, check_names
from megamoe.convert.places import (
    REPORT,
    VERIFICATION,
    check_extras,
    plan_id_of,
    write_extras,
    write_small,
    write_verification,
)
from megamoe.convert.regions import Fetcher, Region, element_name
from megamoe.convert.to_hf import DTYPES, largest_turn_bytes, num_workers_for
from megamoe.convert.workers import BytesDone, Task, ahead, batches, run_tasks
from megamoe.errors import CheckpointError, ConversionError

FILE_BYTES = 5_000_000_000
_NUM_FILES = 8  # of a small model: what processes share
_SMALLEST_FILE_BYTES = 64 << 20
_BATCH_BYTES = 1 << 20
_STEP = 0


@dataclass(frozen=True)
class _Import:
    """What every process works on."""

    source: Source
    conversion: Conversion
    regions: Mapping[Ours, Region]
    folder: Path  # the checkpoint's, being written
    save_id: str


def import_(
    source_folder: Path,
    out: Path,
    conversion: Conversion,
    *,
    dtype: str | None = None,
    source: Source | None = None,
    files: Mapping[str, bytes] | None = None,
    workers: int | None = None,
    progress: Callable[[BytesDone], None] | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
    file_bytes: int = FILE_BYTES,
) -> dict[str, Any]:
    """Write their model as the run folder `out`, whose one checkpoint, of step 0, holds the weights alone.

    dtype: "fp32", "bf16", "fp16", or None: as theirs, fp32 where several meet in one tensor. Balance biases are fp32.
    source: what reads `source_folder`; None: a Hugging Face folder. The caller closes what it gives. files: small
    files by name, such as a tokenizer's. workers, progress, and a death on the way: as in `to_hf.export`. Returns what
    `conversion.json` says. Raises ConversionError for a table that does not fit or a damaged source.
    """
    files = files or {}
    check_places([source_folder], out)
    check_extras(files, {REPORT, VERIFICATION, "checkpoints", "config.yaml"})
    conversion.prove()
    fingerprint = folder_fingerprint(source_folder)
    opened = source or open_source(source_folder)
    try:
        _check_theirs(opened, conversion, source_folder)
        wanted = _regions(conversion, opened, None if dtype is None else DTYPES[dtype])
        dealt = _deal_out(wanted, file_bytes)
        plan_id = _plan_id(fingerprint, conversion, dealt)
        with growing(out, f"convert-{plan_id}") as partial:
            folder = partial / "checkpoints" / checkpoint_name(_STEP)
            job = _Import(opened, conversion, wanted, folder, f"import-{plan_id}")
            checksum, num_read = _write_checkpoint(job, dealt, workers, progress)
            if folder_fingerprint(source_folder) != fingerprint:
                raise ConversionError(f"{source_folder} has changed while it was read: convert it again")
            report = _report(source_folder, fingerprint, conversion, wanted, checksum, num_read, folder)
            with writing(partial):
                write_small(folder.parent / LATEST, f"{folder.name}\n".encode())
                write_small(partial / "config.yaml", dump_yaml(conversion.config).encode())
            write_extras(partial, files)
            with writing(partial / REPORT):
                replace_file(partial / REPORT, (json.dumps(report, indent=1) + "\n").encode())
            faults.reach("report-written")
            write_verification(partial, folder, check)
            put_in_place(partial, out, keep=lambda name: not name.startswith("."))
    finally:
        if source is None:
            opened.close()
    return report


def _check_theirs(source: Source, conversion: Conversion, folder: Path) -> None:
    check_names(conversion.theirs, source.tensors, str(folder))
    for name, shape in conversion.theirs.items():
        if source.tensors[name].shape != tuple(shape):
            found = list(source.tensors[name].shape)
            raise ConversionError(f"{folder} holds {name} of shape {found}, the table of {list(shape)}")


def _regions(conversion: Conversion, source: Source, dtype: str | None) -> dict[Ours, Region]:
    """Our tensors, in the table's order."""
    parts: dict[Ours, list[regions.Part]] = defaultdict(list)
    dtypes: dict[Ours, set[str]] = defaultdict(set)
    for link in conversion.links:
        parts[link.ours].append(regions.Part(link.our_box, link))
        dtypes[link.ours].add(source.tensors[link.theirs].dtype)
    for padding in conversion.paddings:
        parts[padding.ours].append(regions.Part(padding.our_box, 0.0))
    found = {}
    for key, shape in conversion.ours.items():
        theirs = dtypes[key]
        wanted = "F32" if key[0] == "balance_bias" else dtype
        if wanted is None:
            wanted = next(iter(theirs)) if len(theirs) == 1 and theirs <= set(DTYPES.values()) else "F32"
        for one in theirs:
            check_cast(f"what {key[1]} is made of", one, wanted)
        found[key] = Region(key[1], tuple(shape), wanted, tuple(parts[key]))
    return found


def _deal_out(wanted: Mapping[Ours, Region], file_bytes: int) -> list[list[Slice]]:
    """For every file of weights its slices: runs of the model, cut where a file is full. Biases go with the first."""
    weights = {key: region for key, region in wanted.items() if key[0] == "weight"}
    total = sum(region.num_bytes for region in weights.values())
    room_bytes = min(file_bytes, max(-(-total // _NUM_FILES), _SMALLEST_FILE_BYTES))
    room_bytes = max(room_bytes, manifests.BLOCK_BYTES)
    files: list[list[Slice]] = [[]]
    left = room_bytes
    for key, region in wanted.items():
        box, item_bytes = whole_box(region.shape), STORAGE[region.dtype].itemsize
        if key[0] != "weight":
            files[0].append(Slice(*key, region.dtype, region.shape, box, 0, region.num_elements))
            continue
        first = 0
        while first < region.num_elements:
            if left < min(manifests.BLOCK_BYTES, (region.num_elements - first) * item_bytes):
                files.append([])
                left = room_bytes
            # Whole blocks only, so that no file ends in the middle of one.
            room = max(left // manifests.BLOCK_BYTES, 1) * manifests.BLOCK_BYTES // item_bytes
            last = region.num_elements if (region.num_elements - first) * item_bytes <= left else first + room
            files[-1].append(Slice(*key, region.dtype, region.shape, box, first, last))
            left -= (last - first) * item_bytes
            first = last
    return files


def _plan_id(fingerprint: str, conversion: Conversion, dealt: list[list[Slice]]) -> str:
    rows = [fingerprint, conversion.config.model_dump(mode="json"), manifests.BLOCK_BYTES]
    items = (*conversion.links, *conversion.constants, *conversion.duplicates, *conversion.paddings)
    return plan_id_of([*rows, *items, *(tuple(slices) for slices in dealt)])


def _write_checkpoint(
    job: _Import, dealt: list[list[Slice]], workers: int | None, progress: Callable[[BytesDone], None] | None
) -> tuple[str, int]:
    """Write the checkpoint's folder, or find that it is written; returns the manifest's checksum and bytes read."""
    finished = _finished_manifest(job)
    if finished is not None:
        return finished, 0
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    left = [slices for rank, slices in enumerate(dealt) if not (job.folder / part_name(rank)).exists()]
    check_room(job.folder, sum(piece.num_bytes for slices in left for piece in slices))
    tasks = [_file_task(job, rank, slices) for rank, slices in enumerate(dealt)]
    checks = check_tasks(job.source, job.conversion)
    num_workers = num_workers_for(workers, largest_turn_bytes(job.conversion.links))
    total = sum(piece.num_bytes for slices in dealt for piece in slices) + sum(check.num_bytes for check in checks)
    everything = [*(check.task for check in checks), *tasks]
    results = run_tasks(everything, num_workers=num_workers, num_total_bytes=total, progress=progress)
    with writing(job.folder):
        parts = [read_part(job.folder, rank, _STEP, job.save_id) for rank in range(len(dealt))]
        config = job.conversion.config.model_dump(mode="json")
        manifest = merge(parts, state=fresh_state(), config=config, layout=_layout())
        write_manifest(job.folder, manifest)
        data = (job.folder / MANIFEST).read_bytes()
    return xxhash.xxh3_64_hexdigest(data), sum(results)


def _layout() -> dict[str, Any]:
    return {"num_ranks": 1}  # of no run: no layout has random states to go on from


def _finished_manifest(job: _Import) -> str | None:
    """The checksum of the manifest that an earlier run has completed, if all that it speaks of is whole."""
    path = job.folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = manifests.Manifest.read(job.folder)
        if manifest.save_id != job.save_id:
            raise CheckpointError(f"{path} is of another import")
        with writing(job.folder):  # that run died while it removed what the manifest now says
            for name in os.listdir(job.folder):
                if name.startswith(("rank_", ".")):
                    os.unlink(job.folder / name)
        with Checkpoint.open(job.folder) as checkpoint:
            checkpoint.verify()
        return manifest.checksum
    except CheckpointError:
        shutil.rmtree(job.folder, ignore_errors=True)
        return None


def _file_task(job: _Import, rank: int, slices: list[Slice]) -> Task:
    def run(say: Callable[[int], None]) -> int:
        if (job.folder / part_name(rank)).exists() and _is_whole(job, rank, slices, say):
            return 0
        num_read = [0]
        with writing(job.folder):
            save = Save(job.folder, rank, job.save_id, _STEP)
            write_streams(save, _streams(job, slices, say, num_read))
        return num_read[0]

    return Task(f"rank {rank} of {job.folder}", run)


def _streams(
    job: _Import, slices: list[Slice], say: Callable[[int], None], num_read: list[int]
) -> list[tuple[Slice, Blocks]]:
    """The bytes of every slice, read ahead across the slices in the order in which the writer takes them."""
    # As `write_streams` orders them: by kind, wide items first.
    ordered = sorted(slices, key=lambda piece: (piece.kind, -STORAGE[piece.dtype].itemsize))
    made = batches(_windows(job, ordered, num_read), lambda window: window[1].nbytes, _BATCH_BYTES)
    windows = (window for batch in ahead(made, 2) for window in batch)

    def blocks(piece: Slice) -> Iterator[memoryview]:
        done = 0
        while done < piece.num_elements:
            label, values = next(windows)
            assert label is piece, piece.label
            yield memoryview(values.view(np.uint8))
            done += len(values)
            say(values.nbytes)

    return [(piece, lambda piece=piece: blocks(piece)) for piece in ordered]


def _windows(job: _Import, ordered: list[Slice], num_read: list[int]) -> Iterator[tuple[Slice, np.ndarray]]:
    def read(link: Link, first: int, last: int) -> np.ndarray:
        found = []
        for box, _ in boxes_of(link.their_box, first, last):
            found.append(job.source.read(link.theirs, box).reshape(-1))
            num_read[0] += found[-1].nbytes
            assert len(found[-1]) == volume(box)
        return found[0] if len(found) == 1 else np.concatenate(found)

    fetcher = Fetcher(read, to_theirs=False, window_elements=manifests.BLOCK_BYTES // 4)

    def fetch(link: Link, first: int, last: int) -> np.ndarray:
        name = lambda number: element_name(link.ours[1], link.our_box, first + number)  # noqa: E731
        theirs = job.source.tensors[link.theirs].dtype
        return cast(fetcher(link, first, last), theirs, job.regions[link.ours].dtype, name)

    for piece in ordered:
        region = job.regions[piece.kind, piece.name]
        step = manifests.BLOCK_BYTES // STORAGE[piece.dtype].itemsize
        for first in range(piece.first, piece.last, step):
            yield piece, region.window(first, min(first + step, piece.last), fetch)


def _is_whole(job: _Import, rank: int, slices: list[Slice], say: Callable[[int], None]) -> bool:
    """Whether the files that a rank of an earlier run reported are on the disk as it wrote them."""
    num_bytes = 0
    try:
        part = read_part(job.folder, rank, _STEP, job.save_id)
        for size in _verify(job.folder, part):
            num_bytes += size
            say(size)
        return num_bytes == sum(piece.num_bytes for piece in slices)
    except CheckpointError:
        say(-num_bytes)
        return False


def _verify(folder: Path, part: Part) -> Iterator[int]:
    """Bytes of each block, compared with its checksum. Raises CheckpointError for damage."""
    buffer = np.empty(part.block_bytes, np.uint8)
    for number, file in enumerate(part.files):
        path = folder / file.name
        descriptor = open_regular(path)
        try:
            if os.fstat(descriptor).st_size != file.size:
                raise CheckpointError(f"{path} is damaged")
            check_header(descriptor, file, path)
            for entry in part.tensors:
                for stored in entry.slices:
                    if stored.file != number:
                        continue
                    size = (stored.last - stored.first) * STORAGE[entry.dtype].itemsize
                    for index, start in enumerate(range(0, size, part.block_bytes)):
                        data = buffer[: min(part.block_bytes, size - start)]
                        read_into(descriptor, memoryview(data), stored.offset + start, path)
                        check_block(xxhash.xxh3_64_hexdigest(data), stored.checksums[index], str(path))
                        yield len(data)
        finally:
            os.close(descriptor)


def _report(
    source_folder: Path,
    fingerprint: str,
    conversion: Conversion,
    wanted: Mapping[Ours, Region],
    checksum: str,
    num_read: int,
    folder: Path,
) -> dict[str, Any]:
    notes = list(conversion.notes)
    notes += [f"{item.ours[1]} {list(item.our_box)} is zero: {item.reason}" for item in conversion.paddings]
    return {
        "direction": "to megamoe",
        "source": {"folder": str(source_folder), "fingerprint": fingerprint},
        "manifest_checksum": checksum,
        "dtypes": sorted({region.dtype for region in wanted.values()}),
        "notes": notes,
        "versions": library_versions(),
        "num_bytes_read": num_read,
        "num_bytes_written": sum(file.stat().st_size for file in folder.iterdir() if file.suffix == ".safetensors"),
    }
