"""Checkpoints of others, read in place: names, dtypes and shapes at once, elements by the box, nothing held.

Their safetensors files carry no checksums. What can be found wrong in them is: a header that is no strict JSON, tensors
that overlap, leave a gap or end elsewhere than the file, a shard that is missing or left over, an index that says
otherwise than the files. A changed bit of a number cannot be.
"""

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from megamoe.checkpoint.files import OpenFiles, read_into
from megamoe.checkpoint.slices import MAX_BYTES, MAX_DIMS, STORAGE, Box, volume
from megamoe.checkpoint.strict_json import loads
from megamoe.errors import CheckpointError, ConversionError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BIN_INDEX, BIN_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
MAX_HEADER_BYTES = 100_000_000  # as safetensors' own readers have it
MAX_INDEX_BYTES = 1 << 30
_GAP_BYTES = 1 << 16  # runs of a box that lie nearer than this are read together
_SPAN_BYTES = 8 << 20  # of such reading at a time
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A tensor of theirs: safetensors' name of the dtype, and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


class Source(Protocol):
    """Their checkpoint, open for reading. A process that was forked off reads on by itself; threads take turns."""

    tensors: Mapping[str, ForeignTensor]

    def read(self, name: str, box: Box) -> np.ndarray:
        """The elements of a box: contiguous, of its shape, bits as `STORAGE` holds them (16-bit floats as uint16).

        Raises ConversionError naming the file where it cannot be read or ends early.
        """

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    offset: int  # bytes from the beginning of the file


class SafetensorsSource:
    """A `Source` of one safetensors file, or of the files that an index names."""

    def __init__(self, paths: list[Path]) -> None:
        """Raises ConversionError, naming the file, for anything but whole files with tensors of different names."""
        self.tensors: dict[str, ForeignTensor] = {}
        self._places: dict[str, _Place] = {}
        self._files = OpenFiles(open_foreign)
        for path in paths:
            for name, tensor, offset in read_header(path):
                if name in self.tensors:
                    raise ConversionError(f"{name} is in {self._places[name].path} and in {path}: remove one of them")
                self.tensors[name], self._places[name] = tensor, _Place(path, offset)

    def file_of(self, name: str) -> Path:
        return self._places[name].path

    def read(self, name: str, box: Box) -> np.ndarray:
        tensor, place = self.tensors[name], self._places[name]
        storage, descriptor = STORAGE[tensor.dtype], self._files.descriptor(place.path)

        def fill(out: np.ndarray, first: int) -> None:
            data = memoryview(out.reshape(-1).view(np.uint8))
            try:
                read_into(descriptor, data, place.offset + first * storage.itemsize, place.path)
            except CheckpointError as error:
                raise ConversionError(str(error)) from None

        return read_box(tensor.shape, box, storage, fill)

    def close(self) -> None:
        self._files.close()


def open_source(path: Path) -> Source:
    """The model in a Hugging Face folder, or in one file: safetensors, else `.bin` through the weights-only loader.

    Raises ConversionError, naming the file, for what is missing, left over, damaged, or no tensors.
    """
    if path.is_dir():
        for index, single, kind in ((INDEX, SINGLE, "safetensors"), (BIN_INDEX, BIN_SINGLE, "bin")):
            has_index, has_single = (path / index).exists(), (path / single).exists()
            if has_index and has_single:
                raise ConversionError(f"{path} has {index} and {single}: which of them is meant? Remove the other")
            if has_index:
                return _open_indexed(path, index, kind)
            if has_single:
                _refuse_strangers(path, {single}, kind)
                return _open_files([path / single], kind)
        raise ConversionError(f"{path} has none of {INDEX}, {SINGLE}, {BIN_INDEX}, {BIN_SINGLE}: no model is there")
    kind = path.suffix.removeprefix(".")
    if kind not in ("safetensors", "bin"):
        raise ConversionError(f"{path} is no folder and no .safetensors or .bin file")
    return _open_files([path], kind)


def folder_fingerprint(path: Path) -> str:
    """Changes when a file at or under `path` changes its name, size or time: what a resumed import must still find."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    rows = []
    for file in files:
        status = file.stat()
        rows.append([str(file.relative_to(path)), status.st_size, status.st_mtime_ns])
    return xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())


def read_header(path: Path) -> list[tuple[str, ForeignTensor, int]]:
    """(name, tensor, byte where it begins) of every tensor of a safetensors file, in order of the bytes.

    Raises ConversionError unless the header is strict and the tensors fill the file from its end to theirs.
    """
    descriptor = open_foreign(path)
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(_read(descriptor, path, 0, 8), "little") if size >= 8 else -1
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise ConversionError(f"{path} is no whole safetensors file: its header does not fit into its {size} bytes")
        tree = _parse(_read(descriptor, path, 8, length), path)
    finally:
        os.close(descriptor)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ConversionError(f"{path}: its __metadata__ is no table of strings")
    spans = sorted((_span(name, item, path) for name, item in tree.items()), key=lambda span: span[2:])
    end = 0
    for name, _, first, last in spans:
        if first != end:
            raise ConversionError(f"{path}: {name} begins at byte {first} of the tensors, but {end} were before it")
        end = last
    if 8 + length + end != size:
        raise ConversionError(f"{path} has {size} bytes, its header speaks of {8 + length + end}: it is truncated")
    return [(name, tensor, 8 + length + first) for name, tensor, first, _ in spans]


def read_box(shape: tuple[int, ...], box: Box, storage: np.dtype, fill: Any) -> np.ndarray:
    """A box of a tensor of `shape` that lies in row-major order, by `fill(out, first)`, which reads the elements from
    number `first` of the tensor on. A box of whole rows is one read; short runs are read with what lies between."""
    if len(box) != len(shape) or not all(0 <= a < b <= n for (a, b), n in zip(box, shape, strict=False)):
        raise ValueError(f"no box {box} in a tensor of shape {shape}")
    out = np.empty(tuple(stop - start for start, stop in box), storage)
    # From `run` on the box is full: elements of one row of it lie together.
    run = next((dim for dim in range(len(shape), 0, -1) if box[dim - 1] != (0, shape[dim - 1])), 0)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    if run <= 1 or volume(box[: run - 1]) == 1:
        fill(out, first)
        return out
    rows, outer = out.reshape(-1, volume(box[run - 1 :])), box[: run - 1]
    row_stride = strides[run - 2]
    inner = outer[-1][1] - outer[-1][0]  # rows at an equal distance
    near = (row_stride - rows.shape[1]) * storage.itemsize <= _GAP_BYTES
    step = max(1, _SPAN_BYTES // (row_stride * storage.itemsize)) if near else 1
    for group, corner in enumerate(np.ndindex(*(stop - start for start, stop in outer[:-1]))):
        start = first + sum(c * stride for c, stride in zip(corner, strides, strict=False))
        for row in range(0, inner, step):
            count = min(step, inner - row)
            goal = rows[group * inner + row : group * inner + row + count]
            if count == 1:
                fill(goal, start + row * row_stride)
                continue
            span = np.empty((count - 1) * row_stride + rows.shape[1], storage)
            fill(span, start + row * row_stride)
            size = span.itemsize
            goal[...] = np.lib.stride_tricks.as_strided(span, goal.shape, (row_stride * size, size))
    return out


def open_foreign(path: Path) -> int:
    """A descriptor for reading a plain file; links are followed, hubs' caches are made of them."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing: the model is incomplete") from None
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConversionError(f"{path} is no plain file")
    return descriptor


def _open_indexed(folder: Path, index: str, kind: str) -> Source:
    descriptor = open_foreign(folder / index)
    try:
        size = os.fstat(descriptor).st_size
        if size > MAX_INDEX_BYTES:
            raise ConversionError(f"{folder / index} is larger than any index: {size} bytes")
        tree = _parse(_read(descriptor, folder / index, 0, size), folder / index)
    finally:
        os.close(descriptor)
    weight_map = tree.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{folder / index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or not file.endswith(f".{kind}"):
            raise ConversionError(f"{folder / index} puts {name} into {str(file)[:100]!r}, which is no file beside it")
    files = sorted(set(weight_map.values()))
    _refuse_strangers(folder, set(files), kind)
    source = _open_files([folder / file for file in files], kind)
    for name in weight_map.keys() | source.tensors.keys():
        if name not in source.tensors:
            raise ConversionError(f"{name} is not in {folder / weight_map[name]}, where {index} has it")
        if source.file_of(name).name != weight_map.get(name):
            raise ConversionError(f"{name} is in {source.file_of(name)}, but {index} says {weight_map.get(name)}")
    return source


def _open_files(paths: list[Path], kind: str) -> Any:
    if kind == "safetensors":
        return SafetensorsSource(paths)
    from megamoe.convert.pickles import open_bins  # which builds on this file

    return open_bins(paths)


def _refuse_strangers(folder: Path, named: set[str], kind: str) -> None:
    """Shards of another export in the same folder. Other files, such as `consolidated.*`, are none of ours."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    for name in sorted(os.listdir(folder)):
        if name.startswith(stem) and name.endswith(f".{kind}") and name not in named:
            raise ConversionError(f"{folder / name} is left over: nothing names it; remove it, or the other model")


def _span(name: str, item: Any, path: Path) -> tuple[str, ForeignTensor, int, int]:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{path}: {name[:200]} is no dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if dtype not in STORAGE:
        raise ConversionError(f"{path}: {name} has dtype {str(dtype)[:40]!r}, which is not one of {', '.join(STORAGE)}")
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(number) is int and 0 <= number <= MAX_BYTES for number in numbers) or len(offsets) != 2:
        raise ConversionError(f"{path}: {name} has a shape or offsets that are no lists of sizes")
    if len(shape) > MAX_DIMS or 0 in shape:
        raise ConversionError(f"{path}: {name} has the impossible shape {str(shape)[:100]}")
    tensor = ForeignTensor(dtype, tuple(shape))
    if tensor.num_bytes != offsets[1] - offsets[0]:
        raise ConversionError(f"{path}: {name} of shape {shape} has {offsets[1] - offsets[0]} bytes")
    return name, tensor, offsets[0], offsets[1]


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        tree = loads(data, str(path))
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(tree, dict):
        raise ConversionError(f"{path} is damaged: it holds no JSON object")
    return tree


def _read(descriptor: int, path: Path, offset: int, size: int) -> bytes:
    data = bytearray(size)
    try:
        read_into(descriptor, memoryview(data), offset, path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from None
    return bytes(data)
