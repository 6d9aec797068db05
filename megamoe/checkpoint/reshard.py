"""Rewrite a checkpoint as another layout's ranks would have written it, one window of one slice in memory at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

from megamoe.checkpoint import manifest as manifests
from megamoe.checkpoint.commit import merge, read_part, write_manifest
from megamoe.checkpoint.layouts import holders, layout_of, same_streams, slices_by_rank
from megamoe.checkpoint.manifest import TensorEntry
from megamoe.checkpoint.outputs import check_places, growing, put_in_place, writing
from megamoe.checkpoint.reader import Checkpoint
from megamoe.checkpoint.slices import STORAGE, Slice
from megamoe.checkpoint.strict_json import dumps
from megamoe.checkpoint.writer import Blocks, Save, part_name, write_streams
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError

WINDOW_BYTES = 64 << 20
MODEL_KINDS = ("weight", "balance_bias")


def reshard(
    source: Path,
    out: Path,
    *,
    config: Config,
    num_ranks: int,
    weights_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the checkpoint `source` anew as `out`, as `num_ranks` ranks laid out by `config.parallel` would.

    config: that of the source, with other values under `parallel`. weights_only: weights and balance biases, nothing of
    the optimizer. Random states go along where only the ZeRO stage changes: under another layout they mean nothing.
    `out` appears when it is complete; a run that was killed goes on with the first rank that is not. Every block read
    is checked. Raises ConfigError for an `out` that exists or lies in the source, TopologyError for a layout that does
    not fit, CheckpointError for a damaged source, OutputError when the disk refuses or another process writes there.
    """
    check_places([source], out)
    with Checkpoint.open(source) as checkpoint:
        old = checkpoint.manifest
        layout = old.layout | layout_of(config, num_ranks)
        entries = _chosen(checkpoint, weights_only, same_streams(old.layout, layout))
        by_rank = slices_by_rank(entries, holders(config, num_ranks), num_ranks)
        plan = dumps([old.checksum, layout, weights_only, manifests.BLOCK_BYTES])
        save_id = f"reshard-{xxhash.xxh3_64_hexdigest(plan.encode())}"
        with growing(out, save_id) as partial, writing(partial):
            (partial / manifests.MANIFEST).unlink(missing_ok=True)  # of a run that died when it was nearly done
            parts = []
            for rank, slices in enumerate(by_rank):
                if not (partial / part_name(rank)).exists():
                    streams = [(piece, _windows(checkpoint, piece, progress)) for piece in slices]
                    write_streams(Save(partial, rank, save_id, old.step), streams)
                elif progress is not None:
                    progress(sum(piece.num_bytes for piece in slices))
                parts.append(read_part(partial, rank, old.step, save_id))
            tree = config.model_dump(mode="json")
            write_manifest(partial, merge(parts, state=old.state, config=tree, layout=layout, versions=old.versions))
            put_in_place(partial, out)
    return out


def num_bytes_to_write(checkpoint: Checkpoint, *, weights_only: bool) -> int:
    """For a progress bar."""
    return sum(entry.whole.num_bytes for entry in _chosen(checkpoint, weights_only, True))


def _chosen(checkpoint: Checkpoint, weights_only: bool, with_random: bool) -> list[TensorEntry]:
    entries = checkpoint.manifest.tensors.values()
    if weights_only:
        return [entry for entry in entries if entry.kind in MODEL_KINDS]
    return [entry for entry in entries if with_random or entry.kind != "random"]


def _windows(checkpoint: Checkpoint, piece: Slice, progress: Callable[[int], None] | None) -> Blocks:
    """The bytes of a slice, block by block, read in windows that are checked before they are handed on."""

    def blocks() -> Iterator[memoryview]:
        storage, block_bytes = STORAGE[piece.dtype], manifests.BLOCK_BYTES
        step = max(1, WINDOW_BYTES // block_bytes) * block_bytes // storage.itemsize
        window = np.empty(min(step, piece.num_elements), storage)
        for first in range(0, piece.num_elements, step):
            last = min(first + step, piece.num_elements)
            checkpoint.read(piece.part(first, last), window[: last - first])
            data = memoryview(window[: last - first].view(np.uint8))
            for start in range(0, len(data), block_bytes):
                yield data[start : start + block_bytes]
            if progress is not None:
                progress(len(data))

    return blocks


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration in a manifest. Raises CheckpointError where it is not one that this megamoe knows."""
    try:
        return Config.model_validate_json(dumps(checkpoint.manifest.config), strict=True)
    except ValueError as error:
        problem = str(error).replace("\n", " ")[:200]
        raise CheckpointError(f"{checkpoint.folder} has a configuration this megamoe cannot read: {problem}") from None
