"""What a checkpoint holds, and how two of them differ: tensor by tensor, in windows, whatever their layouts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import STORAGE

_WINDOW_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs: `reason` where it cannot be compared, else elements and the largest difference."""

    kind: str
    name: str
    reason: str | None
    num_different: int
    largest: float | None  # None: every difference involves NaN or infinity, or there is nothing to compare


def differences(
    one: Checkpoint, other: Checkpoint, *, kinds: tuple[str, ...] = (), progress: Callable[[int], None] | None = None
) -> Iterator[TensorDifference]:
    """Tensors of `kinds` (() for all) that are not equal to the bit, in the order of the manifests.

    `progress` is called with the bytes of each window of one of the two. Raises CheckpointError for damage.
    """
    ours, theirs = one.manifest.tensors, other.manifest.tensors
    for key in dict.fromkeys([*ours, *theirs]):
        if kinds and key[0] not in kinds:
            continue
        mine, its = ours.get(key), theirs.get(key)
        if mine is None or its is None:
            yield TensorDifference(*key, f"only in {(one if its is None else other).folder}", 0, None)
        elif (mine.shape, mine.dtype) != (its.shape, its.dtype):
            reason = f"{mine.dtype} {list(mine.shape)} and {its.dtype} {list(its.shape)}"
            yield TensorDifference(*key, reason, 0, None)
        else:
            num_different, largest = _compare(one, other, mine, progress)
            if num_different:
                yield TensorDifference(*key, None, num_different, largest)


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, value there, value here) of settings that differ; None where one has no such key."""
    ours, theirs = dict(_flat(one)), dict(_flat(other))
    return [
        (key, ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` shows, as JSON has it; "kinds" adds tensors up."""
    manifest = checkpoint.manifest
    kinds: dict[str, dict[str, Any]] = {}
    for (kind, _), entry in manifest.tensors.items():
        row = kinds.setdefault(
            kind, {"num_tensors": 0, "num_elements": 0, "num_bytes": 0, "num_slices": 0, "dtypes": []}
        )
        row["num_tensors"] += 1
        row["num_elements"] += entry.whole.num_elements
        row["num_bytes"] += entry.whole.num_bytes
        row["num_slices"] += len(entry.slices)
        row["dtypes"] = sorted({*row["dtypes"], entry.dtype})
    return {
        "folder": str(checkpoint.folder),
        "step": manifest.step,
        "save_id": manifest.save_id,
        "state": manifest.state,
        "layout": manifest.layout,
        "versions": manifest.versions,
        "config_hash": manifest.config_hash,
        "num_files": len(manifest.files),
        "num_bytes": sum(file.size for file in manifest.files),
        "kinds": kinds,
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compare(
    one: Checkpoint, other: Checkpoint, entry: TensorEntry, progress: Callable[[int], None] | None
) -> tuple[int, float | None]:
    """Elements whose bits differ, and the largest finite difference among them."""
    whole, storage = entry.whole, STORAGE[entry.dtype]
    size = min(_WINDOW_ELEMENTS, whole.num_elements)
    mine, its = np.empty(size, storage), np.empty(size, storage)
    bits = np.dtype(f"u{storage.itemsize}")
    num_different, largest = 0, None
    for first in range(0, whole.num_elements, size):
        window = whole.part(first, min(first + size, whole.num_elements))
        ours, theirs = mine[: window.num_elements], its[: window.num_elements]
        one.read(window, ours)
        other.read(window, theirs)
        different = np.flatnonzero(ours.view(bits) != theirs.view(bits))
        if len(different):
            num_different += len(different)
            with np.errstate(all="ignore"):
                gaps = np.abs(_values(ours[different], entry.dtype) - _values(theirs[different], entry.dtype))
            gaps = gaps[np.isfinite(gaps)]
            if len(gaps):
                largest = max(largest or 0.0, float(gaps.max()))
        if progress is not None:
            progress(window.num_bytes)
    return num_different, largest


def _values(stored: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values of stored elements; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F16":
        stored = stored.view(np.float16)
    return stored.astype(np.float64)
