"""The manifest: every tensor of a checkpoint and where each of its slices lies, the state beside them, checksums.

Reading is strict: what parses here is whole, consistent in itself, and points nowhere but into its own folder. The
format is described in docs/checkpoints.md.
"""

import gc
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megamoe.checkpoint import strict_json
from megamoe.checkpoint.coverage import check_coverage
from megamoe.checkpoint.files import read_small
from megamoe.checkpoint.frozen import frozen_parameters
from megamoe.checkpoint.slices import MAX_BYTES, PARAMETER_KINDS, STORAGE, Slice, check_shape
from megamoe.checkpoint.stored_slices import FileEntry, SliceReader, StoredSlice, check_hex, check_integer
from megamoe.errors import CheckpointError

FORMAT, VERSION = "megamoe-checkpoint", 1
MANIFEST = "manifest.json"
BLOCK_BYTES = 16 << 20  # of a slice's bytes under one checksum
MAX_BLOCK_BYTES = 64 << 20
MAX_MANIFEST_BYTES = 2 << 30

_FILE_NAME = re.compile(r"[a-z0-9_]{1,64}_rank_[0-9]{5,9}\.safetensors")
_SAVE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,512}")
_KEYS = (
    "format", "version", "save_id", "step", "block_bytes", "layout", "config", "config_hash", "versions", "state",
    "parameters", "files", "tensors",
)  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One global tensor; its slices hold every element exactly once."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[StoredSlice, ...]

    @cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of the boxes of all slices, [slices, dimensions] each."""
        edges = np.array([stored.box for stored in self.slices], np.int64).reshape(len(self.slices), -1, 2)
        return edges[:, :, 0], edges[:, :, 1]

    @property
    def content(self) -> tuple[Any, ...]:
        """What it holds, wherever its slices lie: the same in all copies of it."""
        slices = [(stored.box, stored.first, stored.last, stored.checksums) for stored in self.slices]
        return self.name, self.dtype, self.shape, slices

    @property
    def whole(self) -> Slice:
        box = tuple((0, size) for size in self.shape)
        last = int(np.prod(self.shape, dtype=np.int64))
        return Slice(self.kind, self.name, self.dtype, self.shape, box, 0, last)

    def slice_of(self, stored: StoredSlice) -> Slice:
        return Slice(self.kind, self.name, self.dtype, self.shape, stored.box, stored.first, stored.last)


@dataclass(frozen=True)
class Part:
    """What one rank has written: its part of a manifest."""

    rank: int
    save_id: str
    step: int
    block_bytes: int
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    def to_bytes(self) -> bytes:
        tree = {"rank": self.rank, "save_id": self.save_id, "step": self.step, "block_bytes": self.block_bytes}
        return strict_json.seal(tree | _entries_tree(self.files, self.tensors))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Part":
        tree = strict_json.unseal(data, where)
        _require_keys(tree, ("rank", "save_id", "step", "block_bytes", "files", "tensors"), where)
        block_bytes = check_integer(tree["block_bytes"], "block_bytes", where, 8, MAX_BLOCK_BYTES)
        files, tensors = _parse_entries(tree, block_bytes, where)
        rank = check_integer(tree["rank"], "rank", where, 0, MAX_BYTES)
        step = check_integer(tree["step"], "step", where, 0, MAX_BYTES)
        return cls(rank, _save_id(tree["save_id"], where), step, block_bytes, files, tensors)


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint. Dicts are as JSON has them; `parameters` is what the parameter kinds must hold, by name."""

    save_id: str
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Any]
    versions: dict[str, str]
    parameters: dict[str, tuple[int, ...]]
    files: tuple[FileEntry, ...]
    tensors: dict[tuple[str, str], TensorEntry]
    block_bytes: int = BLOCK_BYTES
    checksum: str = field(default="", compare=False)  # of the file it was read from

    @property
    def config_hash(self) -> str:
        return config_hash(self.config)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits of the step and of what every tensor holds: copies of one state have the same, whoever wrote them."""
        digest = xxhash.xxh3_64(f"{self.step}".encode())
        for entry in self.tensors.values():
            digest.update(repr((entry.kind, entry.content)).encode())
        return digest.intdigest() >> 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors it holds, in order."""
        return tuple(dict.fromkeys(kind for kind, _ in self.tensors))

    def to_bytes(self) -> bytes:
        tree = {
            "format": FORMAT,
            "version": VERSION,
            "save_id": self.save_id,
            "step": self.step,
            "block_bytes": self.block_bytes,
            "layout": self.layout,
            "config": self.config,
            "config_hash": self.config_hash,
            "versions": self.versions,
            "state": self.state,
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
        }
        return strict_json.seal(tree | _entries_tree(self.files, self.tensors.values()))

    @classmethod
    def read(cls, checkpoint: Path) -> "Manifest":
        """That of a checkpoint's folder. Raises CheckpointError where it is missing or damaged."""
        path = checkpoint / MANIFEST
        return cls.from_bytes(read_small(path, MAX_MANIFEST_BYTES), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises CheckpointError, beginning with `where`, for anything but a whole and consistent manifest."""
        with _collector_at_rest():
            return cls._from_bytes(data, where)

    @classmethod
    def _from_bytes(cls, data: bytes, where: str) -> "Manifest":
        tree = strict_json.unseal(data, where)
        if tree.get("format") != FORMAT or tree.get("version") != VERSION:
            raise CheckpointError(
                f"{where} is of format {str(tree.get('format'))[:40]!r} version {str(tree.get('version'))[:40]}: "
                f"this megamoe reads {FORMAT!r} version {VERSION}"
            )
        _require_keys(tree, _KEYS, where)
        for key in ("layout", "config", "versions", "state", "parameters"):
            if not isinstance(tree[key], dict):
                raise CheckpointError(f'{where} is damaged: "{key}" is no object')
        if tree["config_hash"] != config_hash(tree["config"]):
            raise CheckpointError(f"{where} is damaged: config_hash is not that of its config")
        block_bytes = check_integer(tree["block_bytes"], "block_bytes", where, 8, MAX_BLOCK_BYTES)
        files, tensors = _parse_entries(tree, block_bytes, where)
        parameters = {
            name: _shape(shape, f"{where}: parameter {name[:200]}", 1) for name, shape in tree["parameters"].items()
        }
        manifest = cls(
            _save_id(tree["save_id"], where), check_integer(tree["step"], "step", where, 0, MAX_BYTES), tree["state"],
            tree["config"], tree["layout"], tree["versions"], parameters, files,
            {(entry.kind, entry.name): entry for entry in tensors}, block_bytes, strict_json.checksum(data),
        )  # fmt: skip
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Raises CheckpointError unless every tensor is there, whole, and the files hold the slices and no more."""
        check_promises(self.parameters, self.tensors, where, frozen_parameters(self.config))
        _check_files_are_filled(self.files, self.tensors.values(), where)
        for entry in self.tensors.values():
            pieces = ((stored.box, stored.first, stored.last) for stored in entry.slices)
            check_coverage(f"{entry.kind} {entry.name} in {where}", entry.shape, pieces)


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    """Millions of lists without a cycle among them: looking for one takes longer than reading them."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def config_hash(config: Mapping[str, Any]) -> str:
    """xxh3_128, as 32 hex digits, of the configuration as compact JSON with sorted keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def check_promises(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[tuple[str, str], TensorEntry],
    where: str,
    frozen: Collection[str] = (),
) -> None:
    """Raises CheckpointError naming a parameter that a kind lacks, has of another shape, or has unasked. `frozen`
    parameters have weights and nothing else."""
    for kind in PARAMETER_KINDS:
        present = {name: entry.shape for (k, name), entry in tensors.items() if k == kind}
        if not present:
            continue
        for name in parameters.keys() | present.keys():
            if name in frozen and kind != "weight" and name not in present:
                continue
            if name not in present:
                raise CheckpointError(f"{kind} {name} is missing in {where}")
            if name not in parameters:
                raise CheckpointError(f"{kind} {name} in {where} is no parameter of the model")
            if parameters[name] != present[name]:
                raise CheckpointError(
                    f"{kind} {name} in {where} has shape {list(present[name])}, the parameter {list(parameters[name])}"
                )


def _check_files_are_filled(files: Sequence[FileEntry], tensors: Iterable[TensorEntry], where: str) -> None:
    """Slices lie side by side from the header to the end of each file: no byte is without a checksum."""
    rows = [
        (stored.file, stored.offset, (stored.last - stored.first) * STORAGE[entry.dtype].itemsize)
        for entry in tensors
        for stored in entry.slices
    ]
    spans = np.array(rows, np.int64).reshape(-1, 3)
    spans = spans[np.lexsort((spans[:, 1], spans[:, 0]))]
    limits = np.searchsorted(spans[:, 0], np.arange(len(files) + 1))
    for number, file in enumerate(files):
        own = spans[limits[number] : limits[number + 1]]
        ends = np.concatenate([[file.header_bytes], own[:, 1] + own[:, 2]])
        if ends[-1] != file.size or (own[:, 1] != ends[:-1]).any():
            raise CheckpointError(f"{where} is damaged: the slices in {file.name} overlap or leave bytes over")


def _entries_tree(files: Iterable[FileEntry], tensors: Iterable[TensorEntry]) -> dict[str, Any]:
    """ "files" and "tensors" as JSON; a slice is [file, offset, box, first, last, checksums]."""
    return {
        "files": [
            {"name": f.name, "size": f.size, "header_bytes": f.header_bytes, "header_checksum": f.header_checksum}
            for f in files
        ],
        "tensors": [
            {
                "kind": entry.kind,
                "name": entry.name,
                "dtype": entry.dtype,
                "shape": entry.shape,
                "slices": [(s.file, s.offset, s.box, s.first, s.last, s.checksums) for s in entry.slices],
            }
            for entry in tensors
        ],
    }


def _parse_entries(
    tree: dict[str, Any], block_bytes: int, where: str
) -> tuple[tuple[FileEntry, ...], tuple[TensorEntry, ...]]:
    if not isinstance(tree["files"], list) or not isinstance(tree["tensors"], list):
        raise CheckpointError(f"{where} is damaged: its files or tensors are no list")
    if block_bytes % 8:
        raise CheckpointError(f"{where} is damaged: block_bytes {block_bytes} is no multiple of 8")
    files = tuple(_file(item, where) for item in tree["files"])
    tensors = tuple(_tensor(item, files, block_bytes, where) for item in tree["tensors"])
    _require_unique([file.name for file in files], "file", where)
    _require_unique([f"{entry.kind} {entry.name}" for entry in tensors], "tensor", where)
    return files, tensors


def _file(item: Any, where: str) -> FileEntry:
    _require_keys(item, ("name", "size", "header_bytes", "header_checksum"), where)
    name = check_file_name(item["name"], where)
    size = check_integer(item["size"], f"the size of {name}", where, 8, MAX_BYTES)
    header = check_integer(item["header_bytes"], f"the header of {name}", where, 8, size)
    return FileEntry(name, size, header, check_hex(item["header_checksum"], where))


def check_file_name(name: Any, where: str) -> str:
    """Raises CheckpointError for a name that could be anything but a tensor file inside the folder."""
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise CheckpointError(f"{where} names the file {str(name)[:200]!r}: only plain tensor file names are read")
    return name


def _tensor(item: Any, files: Sequence[FileEntry], block_bytes: int, where: str) -> TensorEntry:
    _require_keys(item, ("kind", "name", "dtype", "shape", "slices"), where)
    kind, name, dtype = item["kind"], item["name"], item["dtype"]
    for value, pattern in ((kind, _KIND), (name, _NAME)):
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise CheckpointError(f"{where} is damaged: {str(value)[:200]!r} is no name of a tensor or kind")
    what = f"{where}: {kind} {name}"
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise CheckpointError(f"{what} has the unknown dtype {str(dtype)[:40]!r}")
    shape = _shape(item["shape"], what, STORAGE[dtype].itemsize)
    if not isinstance(item["slices"], list):
        raise CheckpointError(f"{what} has no list of slices")
    reader = SliceReader(kind, name, dtype, shape, files, block_bytes, where)
    return TensorEntry(kind, name, dtype, shape, reader.read(item["slices"]))


def _require_keys(item: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(item, dict) or set(item) != set(keys):
        raise CheckpointError(f"{where} is damaged: an entry has other keys than {', '.join(keys)}")


def _require_unique(names: Sequence[str], what: str, where: str) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        twice = next(name for name in names if name in seen or seen.add(name))
        raise CheckpointError(f"{where} is damaged: {what} {twice} stands there twice")


def _save_id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _SAVE_ID.fullmatch(value):
        raise CheckpointError(f"{where}: {str(value)[:80]!r} is no save id: use letters, digits, - and _")
    return value


def _shape(value: Any, what: str, item_bytes: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int for size in value):
        raise CheckpointError(f"{what} has the impossible shape {str(value)[:200]}")
    shape = tuple(value)
    check_shape(what, shape, item_bytes)
    return shape
