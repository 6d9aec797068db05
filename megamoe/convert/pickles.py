"""Files of torch.save, opened without running anything in them: where each tensor lies, and nothing unpickled but data.

Only torch's weights-only unpickler reads them. To the types that it knows we add the few harmless classes that the old
formats carry beside their weights; all but argparse.Namespace become an `Inert` that does nothing. Any other class is
refused by name. The tensors are mapped, not loaded: from the map we learn at which byte of the file each begins, and
from then on bytes are read by pread, with neither torch nor the map. So a source can be sent to other processes.
"""

import argparse
import bisect
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamoe.checkpoint.slices import MAX_DIMS, STORAGE, Box, volume, whole_box
from megamoe.convert.foreign import ForeignTensor, open_foreign
from megamoe.convert.weights_only import load_weights_only
from megamoe.errors import ConversionError

if TYPE_CHECKING:
    import torch

# What fairseq, Megatron and DeepSpeed put beside weights: settings, enumerations, the state of numpy's generator.
HARMLESS = (
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "megatron.core.enums.ModelType",
    "megatron.model.enums.ModelType",
    "megatron.model.enums.PositionEmbeddingType",
    "megatron.enums.PositionEmbeddingType",
)
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip file: its last two fields are lengths


class Inert:
    """Stands for an object of a class that is not here: what it was made from and its state, as data."""

    def __new__(cls, *args: Any) -> "Inert":
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any) -> None:
        """The arguments were kept by __new__."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: its record [position, position + record_bytes) and how its elements lie in that record."""

    path: str
    position: int
    record_bytes: int
    crc: int
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    first: int  # element of the record

    @property
    def fills_record(self) -> bool:
        return self.first == 0 and _row_major(self.shape) == self.strides and self.num_bytes == self.record_bytes

    @property
    def num_bytes(self) -> int:
        return volume(whole_box(self.shape)) * STORAGE[self.dtype].itemsize


@dataclass(frozen=True)
class TorchFile:
    """What one file holds: `content` is its dicts, lists, numbers and texts, with a `Stored` for each tensor."""

    path: Path
    content: Any


def open_file(path: Path, harmless: Sequence[str] = HARMLESS) -> TorchFile:
    """Open a file of torch.save (the zip format, torch 1.6 and later); no weight is read.

    harmless: the classes that may stand beside the tensors, besides argparse.Namespace.
    Raises ConversionError, naming the file, where it is damaged, of the older format, or holds another class.
    """
    records = _records(path)
    with records.file:
        content = _load(path, harmless)
        places = _Places(path, records)
        return TorchFile(path, _with_places(content, places, ""))


def flat_tensors(tree: Any, where: str, prefix: str = "") -> dict[str, Stored]:
    """The tensors of nested dicts by dotted name. Raises ConversionError for anything else but empty dicts and None."""
    found: dict[str, Stored] = {}
    if not isinstance(tree, Mapping):
        raise ConversionError(f"{where} should hold tensors by name, but has {type(tree).__name__} at {prefix!r}")
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = flat_tensors(value, where, f"{name}.") if isinstance(value, Mapping) else {}
        if isinstance(value, Stored):
            inner = {name: value}
        elif not isinstance(value, Mapping) and value is not None:
            raise ConversionError(f"{where} should hold tensors by name, but {name} is {type(value).__name__}")
        for twice in inner.keys() & found.keys():
            raise ConversionError(f"{where} holds {twice} twice")
        found |= inner
    return found


def open_bins(paths: Iterable[Path]) -> "StoredSource":
    """Files that hold nothing but tensors by name: `pytorch_model.bin` and its kind.

    Raises ConversionError, naming the file, for anything else in one, or for a name in two.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        for name, place in flat_tensors(open_file(path, harmless=()).content, str(path)).items():
            if name in found:
                raise ConversionError(f"{name} is in {found[name].path} and in {path}: remove one of them")
            found[name] = place
    return StoredSource(found)


class StoredSource:
    """A `Source` of tensors that lie in any number of torch files."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        """Raises ConversionError for a tensor of a dtype or shape that weights do not have."""
        for name, place in stored.items():
            if place.dtype not in STORAGE or not place.record_bytes or len(place.shape) > MAX_DIMS:
                is_odd = place.dtype in STORAGE
                what = f"the impossible shape {list(place.shape)}" if is_odd else f"dtype {place.dtype}"
                raise ConversionError(f"{place.path}: {name} has {what}, which no weight has")
        self._stored = dict(stored)
        self.tensors = {name: ForeignTensor(place.dtype, place.shape) for name, place in stored.items()}

    def read(self, name: str, box: Box) -> np.ndarray:
        """Raises ConversionError where the file has become shorter, or a tensor read whole has another checksum."""
        if name not in self._stored:
            raise ConversionError(f"there is no tensor {name}")
        place = self._stored[name]
        descriptor = open_foreign(Path(place.path))
        try:
            return _read_box(descriptor, name, place, box)
        finally:
            os.close(descriptor)

    def file_of(self, name: str) -> Path:
        return Path(self._stored[name].path)

    def checksum(self, name: str) -> int:
        """CRC-32 of the record that holds the tensor, as the file states it."""
        return self._stored[name].crc

    def close(self) -> None:
        """Nothing stays open between two reads."""


def _load(path: Path, harmless: Sequence[str]) -> Any:
    try:
        return load_weights_only(path, [argparse.Namespace, *((Inert, name) for name in harmless)])
    except Exception as error:  # the unpickler's own, and whatever damaged bytes lead to
        refused = re.search(r"GLOBAL +(\S+)", str(error))
        if refused:
            raise ConversionError(
                f"{path} holds the class or function {refused[1]}, which is not among the few that are harmless: "
                "nothing in it was run; save the file anew with plain dicts, lists and tensors"
            ) from None
        text = " ".join(str(error).split())
        raise ConversionError(f"{path} cannot be read by torch's weights-only unpickler: {text[:300]}") from None


@dataclass(frozen=True)
class _Records:
    """The members of a zip file: where the data of each begins, ascending, and its bytes and checksum."""

    file: Any
    starts: tuple[int, ...]
    members: tuple[zipfile.ZipInfo, ...]


def _records(path: Path) -> _Records:
    """The stored members of the zip. Raises ConversionError where the file is no such zip or its end is missing."""
    file = open(open_foreign(path), "rb")  # noqa: SIM115 - open_file closes it
    try:
        if file.read(4) != b"PK\x03\x04":
            raise ConversionError(f"{path} is no file of torch 1.6 or later: load and save it anew with such a torch")
        found = []
        for member in zipfile.ZipFile(file).infolist():
            file.seek(member.header_offset)
            fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ConversionError(f"{path} is compressed, which torch.save never does")
            found.append((member.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1], member))
    except (zipfile.BadZipFile, struct.error, EOFError, OSError):
        file.close()
        raise ConversionError(f"{path} is cut short or damaged: its list of records cannot be read") from None
    except ConversionError:
        file.close()
        raise
    found.sort(key=lambda item: item[0])
    return _Records(file, tuple(start for start, _ in found), tuple(member for _, member in found))


class _Places:
    """Turns a mapped tensor into its place in the file."""

    def __init__(self, path: Path, records: _Records) -> None:
        self._path, self._records = path, records
        self._mappings = _mappings(path)

    def of(self, tensor: "torch.Tensor", name: str) -> Stored:
        import torch

        dtypes = {
            torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8",
        }  # fmt: skip
        dtype = dtypes.get(tensor.dtype, str(tensor.dtype))
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ConversionError(f"{self._path}: {name} is sparse or quantized, which no format of weights uses")
        if tensor.numel() == 0:
            return Stored(str(self._path), 0, 0, 0, dtype, shape, _row_major(shape), 0)
        address = tensor.untyped_storage().data_ptr()
        index = bisect.bisect_right([start for start, _, _ in self._mappings], address) - 1
        start, stop, offset = self._mappings[index] if index >= 0 else (0, 0, 0)
        position = address - start + offset
        at = bisect.bisect_left(self._records.starts, position)
        if not start <= address < stop or at == len(self._records.starts) or self._records.starts[at] != position:
            raise ConversionError(f"{self._path}: {name} does not lie where a record of the file begins")
        member = self._records.members[at]
        last = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if (last + 1) * tensor.element_size() > member.file_size:
            raise ConversionError(f"{self._path}: {name} is larger than its record")
        return Stored(
            str(self._path), position, member.file_size, member.CRC, dtype, shape,
            strides if _row_major(shape) != _without_ones(shape, strides) else _row_major(shape),
            tensor.storage_offset(),
        )  # fmt: skip


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """(first address, last, offset in the file) of this process's mappings of files named like `path`, ascending."""
    found, name = [], os.path.basename(os.path.realpath(path))
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        raise ConversionError("files of torch.save can only be converted on Linux, where /proc/self/maps is") from None
    for line in lines:
        if name not in line:
            continue
        addresses, _, offset = line.split()[:3]
        start, stop = (int(address, 16) for address in addresses.split("-"))
        found.append((start, stop, int(offset, 16)))
    return found


def _with_places(tree: Any, places: _Places, name: str) -> Any:
    import torch

    if isinstance(tree, torch.Tensor):
        return places.of(tree, name)
    if isinstance(tree, Mapping):
        return {key: _with_places(value, places, f"{name}.{key}".lstrip(".")) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_with_places(value, places, f"{name}[{i}]") for i, value in enumerate(tree))
    return tree


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _without_ones(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, those of dimensions of size 1 (which mean nothing) as they are in row-major order."""
    usual = _row_major(shape)
    return tuple(u if size == 1 else s for size, s, u in zip(shape, strides, usual, strict=True))


def _read_box(descriptor: int, name: str, place: Stored, box: Box) -> np.ndarray:
    """The region as a new row-major array."""
    if len(box) != len(place.shape) or not all(
        0 <= start < stop <= size for (start, stop), size in zip(box, place.shape, strict=True)
    ):
        raise ConversionError(f"{name} of shape {list(place.shape)} has no region {list(box)}")
    dtype, sizes = STORAGE[place.dtype], tuple(stop - start for start, stop in box)
    begin = place.first + sum(start * step for (start, _), step in zip(box, place.strides, strict=True))
    if place.strides != _row_major(place.shape):  # a transposed or repeated view: read its span, then turn it
        span = 1 + sum((size - 1) * step for size, step in zip(sizes, place.strides, strict=True))
        flat = np.empty(span, dtype)
        _fill(descriptor, name, place, begin, flat)
        steps = tuple(step * dtype.itemsize for step in place.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, sizes, steps, writeable=False))
    values = np.empty(sizes, dtype)
    for index, first in _runs(sizes, place, begin):
        _fill(descriptor, name, place, first, values[index])
    if place.fills_record and sizes == place.shape and zlib.crc32(values.reshape(-1).view(np.uint8)) != place.crc:
        raise ConversionError(f"{place.path} is damaged: {name} does not have the checksum that the file states")
    return values


def _runs(sizes: tuple[int, ...], place: Stored, begin: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Index of each part of the region that lies in one piece, with the element it begins at."""
    outer = len(sizes)
    while outer and (outer == len(sizes) or sizes[outer] == place.shape[outer]):
        outer -= 1
    for index in np.ndindex(*sizes[:outer]):
        yield index, begin + sum(i * step for i, step in zip(index, place.strides, strict=False))


def _fill(descriptor: int, name: str, place: Stored, first: int, values: np.ndarray) -> None:
    """Read values.size elements of the record, from element `first`, into the contiguous `values`."""
    raw = memoryview(values.reshape(-1).view(np.uint8))
    position = place.position + first * values.dtype.itemsize
    while raw:
        count = os.preadv(descriptor, [raw], position)
        if count == 0:
            raise ConversionError(f"{place.path} is cut short: it ends inside {name}")
        raw, position = raw[count:], position + count
