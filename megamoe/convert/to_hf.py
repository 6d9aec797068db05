"""From a megamoe checkpoint to a folder of safetensors shards, by a proved table, in memory that does not grow.

Each process writes whole shards. A thread reads and checks our blocks, ahead of the writing by two windows.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.checkpoint import faults
from megamoe.checkpoint.commit import library_versions
from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.outputs import check_places, check_room, growing, put_in_place, writing
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import Slice, whole_box
from megamoe.convert.blocks import BlockReader
from megamoe.convert.casts import cast, check_cast
from megamoe.convert.foreign import INDEX, SINGLE
from megamoe.convert.links import Conversion, Link, Ours, check_names
from megamoe.convert.places import REPORT, VERIFICATION, check_extras, plan_id_of, write_extras, write_verification
from megamoe.convert.regions import Fetcher, Part, Region, Window, element_name, in_order_of_source
from megamoe.convert.shards import (
    SHARD_BYTES,
    Record,
    Shard,
    is_whole,
    plan_shards,
    read_record,
    small_files,
    write_record,
    write_shard,
)
from megamoe.convert.workers import BytesDone, Task, ahead, batches, run_tasks
from megamoe.errors import ConversionError

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
WINDOW_BYTES = 4 << 20
CACHE_BYTES = 96 << 20  # of our blocks, shared out among the processes
LARGE_TURN_BYTES = 32 << 20  # what is transposed and larger than this, is so by one process alone
MAX_WORKERS = 4
_MODEL_KINDS = ("weight", "balance_bias")


@dataclass(frozen=True)
class _Reading:
    """Where the tensors of ours are read, by their key in the table: whole, with kind and dtype; and what is wanted."""

    checkpoint: Checkpoint
    slices: Mapping[Ours, Slice]
    dtype: str


def export(
    checkpoint_folder: Path,
    out: Path,
    conversion: Conversion,
    *,
    dtype: str,
    files: Mapping[str, bytes] | None = None,
    workers: int | None = None,
    progress: Callable[[BytesDone], None] | None = None,
    check: Callable[[Path], Mapping[str, Any]] | None = None,
    shard_bytes: int = SHARD_BYTES,
    with_holes: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint as `out`; returns what `conversion.json` there says.

    dtype: "fp32", "bf16" or "fp16"; balance biases stay fp32. Where stored weights are of another dtype and masters
    are there, those are read. files: small files by name, such as config.json. workers: processes; 0 for none besides
    this one. check: looks at the folder before it has its name; its answer is kept as verification.json. `out` appears
    when it is complete; the same call after a death goes on from the last finished shard.
    Raises ConversionError for a table that does not fit, CheckpointError for a damaged checkpoint.
    """
    files = files or {}
    check_places([checkpoint_folder], out)
    check_extras(files, {REPORT, VERIFICATION, INDEX, SINGLE})
    conversion.prove()
    with Checkpoint.open(checkpoint_folder) as checkpoint:
        reading = _reading(checkpoint, conversion, DTYPES[dtype])
        shards = plan_shards(_regions(conversion, DTYPES[dtype]), shard_bytes)
        plan_id = _plan_id(checkpoint, conversion, reading, shards)
        with growing(out, f"convert-{plan_id}") as partial:
            records = _write_shards(partial, shards, reading, plan_id, workers, progress, with_holes)
            report = _report(checkpoint, conversion, reading, dtype, shards, records)
            write_extras(partial, {**files, **small_files(shards)})
            with writing(partial / REPORT):
                replace_file(partial / REPORT, (json.dumps(report, indent=1) + "\n").encode())
            faults.reach("report-written")
            write_verification(partial, partial, check)
            put_in_place(partial, out, keep=lambda name: not name.startswith("."))
    return report


def num_workers_for(workers: int | None, largest_turn_bytes: int) -> int:
    """Processes to start: as asked, else as many as there are cores, up to 4; one where much is transposed at once."""
    wanted = min(len(os.sched_getaffinity(0)), MAX_WORKERS) if workers is None else workers
    return min(wanted, 1) if largest_turn_bytes > LARGE_TURN_BYTES else wanted


def largest_turn_bytes(links: Iterable[Link]) -> int:
    """The most that any link has to hold, as fp32, to transpose it."""
    largest = 0
    for link in links:
        if link.view is not None:
            kept = next((axis for axis, place in enumerate(link.order) if axis != place), len(link.order))
            largest = max(largest, int(np.prod(link.view[kept:], dtype=np.int64)) * 4)
    return largest


def _reading(checkpoint: Checkpoint, conversion: Conversion, dtype: str) -> _Reading:
    tensors = checkpoint.manifest.tensors
    found = {key for key in tensors if key[0] in _MODEL_KINDS}
    check_names(map(" ".join, conversion.ours), map(" ".join, found), str(checkpoint.folder))
    slices = {}
    for key, shape in conversion.ours.items():
        entry = tensors[key]
        master = tensors.get(("master", key[1])) if key[0] == "weight" else None
        if entry.dtype != dtype and master is not None:
            entry = master
        if entry.shape != tuple(shape):
            raise ConversionError(
                f"{checkpoint.folder} holds {' '.join(key)} of shape {list(entry.shape)}, the table of {list(shape)}"
            )
        check_cast(f"{entry.kind} {entry.name}", entry.dtype, _dtype_of(key, dtype))
        slices[key] = entry.whole
    return _Reading(checkpoint, slices, dtype)


def _regions(conversion: Conversion, dtype: str) -> list[Region]:
    """Their tensors, in the table's order."""
    parts: dict[str, list[Part]] = defaultdict(list)
    dtypes: dict[str, set[str]] = defaultdict(set)
    for link in conversion.links:
        parts[link.theirs].append(Part(link.their_box, link))
        dtypes[link.theirs].add(_dtype_of(link.ours, dtype))
    for constant in conversion.constants:
        parts[constant.theirs].append(Part(whole_box(conversion.theirs[constant.theirs]), constant.value))
        dtypes[constant.theirs].add(dtype)
    for duplicate in conversion.duplicates:
        one, other = conversion.theirs[duplicate.theirs], conversion.theirs[duplicate.original]
        if tuple(one) != tuple(other):
            raise ConversionError(f"{duplicate.theirs} repeats {duplicate.original}, which has another shape")
        parts[duplicate.theirs], dtypes[duplicate.theirs] = parts[duplicate.original], dtypes[duplicate.original]
    for name, found in dtypes.items():
        if len(found) > 1:
            raise ConversionError(f"{name} is made of balance biases, which stay fp32, and of weights in {dtype}")
    return [
        Region(name, tuple(shape), next(iter(dtypes[name])), tuple(parts[name]))
        for name, shape in conversion.theirs.items()
    ]


def _plan_id(checkpoint: Checkpoint, conversion: Conversion, reading: _Reading, shards: list[Shard]) -> str:
    rows = [checkpoint.manifest.checksum, *((key, piece.kind, piece.dtype) for key, piece in reading.slices.items())]
    headers = [(shard.file, shard.header()) for shard in shards]
    return plan_id_of([*rows, *headers, *conversion.links, *conversion.constants, *conversion.duplicates])


def _write_shards(
    partial: Path,
    shards: list[Shard],
    reading: _Reading,
    plan_id: str,
    workers: int | None,
    progress: Callable[[BytesDone], None] | None,
    with_holes: bool,
) -> list[Record]:
    links = (link for shard in shards for region in shard.regions for link in _links_of(region))
    num_workers = num_workers_for(workers, largest_turn_bytes(links))
    finished = _finished(partial, shards, plan_id)
    if not with_holes:
        check_room(partial, sum(shard.num_bytes for shard in shards if shard.file not in finished))
    cache_bytes = CACHE_BYTES // max(1, min(num_workers, len(shards)))

    def task(shard: Shard) -> Task:
        def run(say: Callable[[int], None]) -> dict[str, Any]:
            record = finished.get(shard.file)
            if record is not None and _is_whole(partial, shard, record, say):
                return vars(record)
            reader = BlockReader(reading.checkpoint, cache_bytes)
            try:
                checksums = write_shard(partial, shard, _windows(shard, reading, reader, say), with_holes=with_holes)
            finally:
                reader.close()
            write_record(partial, shard, plan_id, checksums, reader.num_read_bytes)
            return vars(read_record(partial, shard, plan_id))

        return Task(str(partial / shard.file), run)

    total = sum(shard.num_bytes for shard in shards)
    tasks = [task(shard) for shard in shards]
    results = run_tasks(tasks, num_workers=num_workers, num_total_bytes=total, progress=progress)
    return [Record(**tree) for tree in results]


def _windows(shard: Shard, reading: _Reading, reader: BlockReader, say: Callable[[int], None]) -> Iterator[Window]:
    def read(link: Link, first: int, last: int) -> np.ndarray:
        whole = reading.slices[link.ours]
        return reader.read(replace(whole, box=link.our_box, first=first, last=last))

    fetcher = Fetcher(read, to_theirs=True, window_elements=WINDOW_BYTES // 4)

    def fetch(link: Link, first: int, last: int) -> np.ndarray:
        stored, wanted = reading.slices[link.ours].dtype, _dtype_of(link.ours, reading.dtype)
        name = lambda number: element_name(link.theirs, link.their_box, first + number)  # noqa: E731
        return cast(fetcher(link, first, last), stored, wanted, name)

    windows = in_order_of_source(shard.regions, fetch, WINDOW_BYTES)
    for batch in ahead(batches(windows, lambda window: window.values.nbytes, WINDOW_BYTES), 3):
        yield from batch
        say(sum(window.values.nbytes for window in batch))


def _dtype_of(ours: Ours, dtype: str) -> str:
    """A router's bias is not rounded: the choice of experts hangs on it."""
    return "F32" if ours[0] == "balance_bias" else dtype


def _links_of(region: Region) -> list[Link]:
    return [part.filler for part in region.parts if isinstance(part.filler, Link)]


def _is_whole(partial: Path, shard: Shard, record: Record, say: Callable[[int], None]) -> bool:
    num_bytes, verdict = 0, False
    for step in is_whole(partial, shard, record.checksums):
        if isinstance(step, bool):
            verdict = step
        else:
            num_bytes += step
            say(step)
    if not verdict:
        say(-num_bytes)  # it is all to be written again
    return verdict


def _finished(partial: Path, shards: list[Shard], plan_id: str) -> dict[str, Record]:
    """Records of an earlier run; the report has them all, if it was written and the records were already removed."""
    found = {shard.file: record for shard in shards if (record := read_record(partial, shard, plan_id)) is not None}
    try:
        report = json.loads((partial / REPORT).read_text(encoding="utf-8"))
        by_file: dict[str, dict[str, str]] = defaultdict(dict)
        for name, tensor in report["tensors"].items():
            by_file[tensor["file"]][name] = tensor["xxh3_64"]
        for shard in shards:
            if shard.file not in found and shard.file in report["files"]:
                found[shard.file] = Record(
                    checksums=by_file[shard.file], file=shard.file, **report["files"][shard.file]
                )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {
        shard.file: found[shard.file]
        for shard in shards
        if shard.file in found and found[shard.file].checksums.keys() == {region.name for region in shard.regions}
    }


def _report(
    checkpoint: Checkpoint,
    conversion: Conversion,
    reading: _Reading,
    dtype: str,
    shards: list[Shard],
    records: list[Record],
) -> dict[str, Any]:
    manifest = checkpoint.manifest
    notes = list(conversion.notes)
    if any(piece.kind == "master" for piece in reading.slices.values()):
        notes.append("written from the fp32 masters, which are exact, not from the 16-bit weights")
    notes += [
        f"{padding.ours[1]} {list(padding.our_box)} is left out: {padding.reason}" for padding in conversion.paddings
    ]
    tensors = {
        region.name: {
            "file": shard.file,
            "dtype": region.dtype,
            "shape": list(region.shape),
            "xxh3_64": record.checksums[region.name],
        }
        for shard, record in zip(shards, records, strict=True)
        for region in shard.regions
    }
    return {
        "direction": "megamoe to Hugging Face",
        "source": {
            "folder": str(checkpoint.folder),
            "step": manifest.step,
            "save_id": manifest.save_id,
            "manifest_checksum": manifest.checksum,
        },
        "dtype": dtype,
        "notes": notes,
        "versions": library_versions(),
        "num_bytes_read": sum(record.num_read_bytes for record in records),
        "num_bytes_written": sum(record.size for record in records),
        "files": {
            record.file: {key: value for key, value in asdict(record).items() if key not in ("file", "checksums")}
            for record in records
        },
        "tensors": dict(sorted(tensors.items())),
    }
