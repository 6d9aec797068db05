"""From what every rank has written to one checkpoint, or to none. Ranks meet in the folder, with no collectives.

Order is everything: files are flushed before the part that names them, parts before the manifest, the manifest before
the folder gets its name, the name before `latest`. A death at any point leaves the older checkpoints in force, or the
new one; `recover` finishes what was begun.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megamoe import __version__
from megamoe.checkpoint import faults
from megamoe.checkpoint.files import read_small, replace_file, saving, sync_folder
from megamoe.checkpoint.folders import (
    LATEST,
    NEXT,
    checkpoint_name,
    hidden_name,
    prune,
    recover,
    remove_tree,
    set_latest,
    sweep,
)
from megamoe.checkpoint.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    Part,
    StoredSlice,
    TensorEntry,
)
from megamoe.checkpoint.slices import PARAMETER_KINDS
from megamoe.checkpoint.writer import part_name
from megamoe.config.schema import Config
from megamoe.errors import CheckpointError, SaveError
from megamoe.topology.parameters import param_table

_LONGEST_POLL_SECONDS = 0.25


def begin(root: Path, step: int, save_id: str) -> Path:
    """The folder that the ranks write save `save_id` of `step` into; made if it is not there. Any rank may call it.

    A save id is new for every save and the same on all ranks. Raises SaveError when the folder cannot be made.
    """
    partial = root / hidden_name(step, save_id, "partial")
    with saving(partial):
        partial.mkdir(parents=True, exist_ok=True)
    faults.reach("begin-made")
    return partial


def fresh_state() -> dict[str, Any]:
    """What a checkpoint says beside its tensors where no step was taken: that of weights alone."""
    return {
        "step": 0, "samples": 0, "tokens": 0, "skipped_steps": 0, "optimizer_steps": 0, "guard": None,
        "loss_scaler": None, "monitoring_run_id": None,
    }  # fmt: skip


def report_failure(partial: Path, rank: int, message: str) -> None:
    """Tell `commit` that this rank cannot write its part. Never raises: on a full disk an empty report is left."""
    try:
        with open(partial / f"rank_{rank:05d}.failed", "w", encoding="utf-8", errors="replace") as file:
            file.write(message)
    except OSError:
        pass


def commit(
    root: Path,
    partial: Path,
    *,
    num_ranks: int,
    step: int,
    save_id: str,
    state: dict[str, Any],
    config: dict[str, Any],
    layout: dict[str, Any],
    keep_last: int,
    keep_every_steps: int | None,
    timeout_seconds: float,
    is_cancelled: Callable[[], bool] = lambda: False,
    keep_best: Sequence[int] = (),
) -> Path:
    """Wait for every rank's part, make one checkpoint of them, put it in force, remove old ones. One rank calls it.

    `config` is the resolved configuration, whose parameter table says what must be there; {} for tensors of no model.
    `keep_best`: see `megamoe.checkpoint.folders.prune`.
    Returns the checkpoint's folder. Raises SaveError, naming the rank and the reason, when a rank failed or did not
    report in time, when the slices do not make up every tensor, or when the disk refuses: the partial folder is then
    removed and older checkpoints are whole.
    """
    final = root / checkpoint_name(step)
    try:
        with saving(root):
            faults.reach("commit-started")
            recover(root)
            parts = _gather(partial, num_ranks, step, save_id, timeout_seconds, is_cancelled)
            faults.reach("commit-gathered")
            manifest = merge(parts, state=state, config=config, layout=layout)
            write_manifest(partial, manifest)
            _put_in_force(root, partial, final, save_id)
    except CheckpointError as error:
        _take_back(root, partial)
        message = str(error)
        raise (error if isinstance(error, SaveError) else SaveError(f"step {step} was not saved: {message}")) from None
    with contextlib.suppress(OSError):  # the new checkpoint is in force; the next save tries again
        prune(
            root, newest_step=step, save_id=save_id, keep_last=keep_last, keep_every_steps=keep_every_steps,
            keep_best=keep_best,
        )  # fmt: skip
    sweep(root)
    return final


def merge(
    parts: Sequence[Part],
    *,
    state: dict[str, Any],
    config: dict[str, Any],
    layout: dict[str, Any],
    versions: dict[str, str] | None = None,
) -> Manifest:
    """One manifest of every rank's part; `versions` default to those of here and now.

    Raises CheckpointError where parts contradict each other.
    """
    files: list[FileEntry] = []
    heads: dict[tuple[str, str], TensorEntry] = {}
    slices: dict[tuple[str, str], list[StoredSlice]] = {}
    for part in parts:
        for entry in part.tensors:
            key = (entry.kind, entry.name)
            head = heads.setdefault(key, entry)
            if (head.shape, head.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"rank {part.rank} has {entry.kind} {entry.name} as {entry.dtype} {list(entry.shape)}, "
                    f"another rank as {head.dtype} {list(head.shape)}"
                )
            slices.setdefault(key, []).extend(
                StoredSlice(s.file + len(files), s.offset, s.box, s.first, s.last, s.checksums) for s in entry.slices
            )
        files += part.files
    tensors = {key: TensorEntry(*key, head.dtype, head.shape, tuple(slices[key])) for key, head in heads.items()}
    return Manifest(
        save_id=parts[0].save_id,
        step=parts[0].step,
        state=state,
        config=config,
        layout=layout,
        versions=library_versions() if versions is None else versions,
        parameters=promised_parameters(config, tensors),
        files=tuple(files),
        tensors=tensors,
        block_bytes=parts[0].block_bytes,
    )


def promised_parameters(
    config: dict[str, Any], tensors: dict[tuple[str, str], TensorEntry]
) -> dict[str, tuple[int, ...]]:
    """The parameter table's names and shapes; without a configuration those that the tensors have."""
    if not config:
        return {name: entry.shape for (kind, name), entry in tensors.items() if kind in PARAMETER_KINDS}
    resolved = Config.model_validate(config)
    return {parameter.name: parameter.shape for parameter in param_table(resolved.model, resolved.moe)}


def library_versions() -> dict[str, str]:
    """Versions of what a checkpoint's numbers came from."""
    versions = {"megamoe": __version__}
    for name in ("torch", "deepspeed", "megatron-core", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def write_manifest(partial: Path, manifest: Manifest) -> None:
    """Check the manifest as a reader would and make it the last file of `partial`. OSErrors pass."""
    path = partial / MANIFEST
    data = manifest.to_bytes()
    Manifest.from_bytes(data, str(path))
    for file in manifest.files:
        if (partial / file.name).stat().st_size != file.size:
            raise CheckpointError(f"{partial / file.name} has not the {file.size} bytes that its rank wrote")
    replace_file(path, data, point="manifest")
    for name in os.listdir(partial):
        if name.startswith(("rank_", ".rank_")):
            os.unlink(partial / name)
    faults.reach("parts-removed")
    sync_folder(partial)
    faults.reach("manifest-folder-synced")


def read_part(partial: Path, rank: int, step: int, save_id: str) -> Part:
    """A rank's report. Raises CheckpointError when it is damaged or of another save."""
    path = partial / part_name(rank)
    part = Part.from_bytes(read_small(path, MAX_MANIFEST_BYTES), str(path))
    if (part.rank, part.step, part.save_id) != (rank, step, save_id):
        raise CheckpointError(f"{path} is of rank {part.rank}, step {part.step}, save {part.save_id}")
    return part


def _gather(
    partial: Path, num_ranks: int, step: int, save_id: str, timeout_seconds: float, is_cancelled: Callable[[], bool]
) -> list[Part]:
    """Every rank's part, in order of rank; waits for those that are not there yet."""
    give_up = time.monotonic() + timeout_seconds
    pause_seconds = 0.001
    missing = set(range(num_ranks))
    while True:
        names = set(os.listdir(partial))
        for rank in range(num_ranks):
            if f"rank_{rank:05d}.failed" in names:
                report = (partial / f"rank_{rank:05d}.failed").read_text(encoding="utf-8", errors="replace").strip()
                reason = report or "it could not write why, its disk may be full"
                raise SaveError(f"step {step} was not saved: rank {rank} failed: {reason}")
        missing = {rank for rank in missing if part_name(rank) not in names}
        if not missing:
            return [read_part(partial, rank, step, save_id) for rank in range(num_ranks)]
        if is_cancelled():
            raise SaveError(f"step {step} was not saved: the save was cancelled before rank {min(missing)} had written")
        if time.monotonic() > give_up:
            raise SaveError(
                f"step {step} was not saved: rank {min(missing)} did not finish writing within {timeout_seconds:g} s "
                f"({len(missing)} of {num_ranks} ranks are missing)"
            )
        time.sleep(pause_seconds)
        pause_seconds = min(2 * pause_seconds, _LONGEST_POLL_SECONDS)


def _put_in_force(root: Path, partial: Path, final: Path, save_id: str) -> None:
    """Give the complete folder its name, then `latest`. OSErrors pass."""
    replace_file(root / NEXT, f"{final.name} {save_id}\n".encode())
    sync_folder(root)
    sync_folder(root.parent)  # a first save has made `root` itself
    faults.reach("next-renamed")
    aside = root / f".{final.name}.{save_id}.aside"
    if final.exists():
        os.rename(final, aside)
        faults.reach("aside-renamed")
    os.rename(partial, final)
    faults.reach("folder-renamed")
    sync_folder(root)
    faults.reach("root-synced")
    try:
        set_latest(root, final.name)
        os.unlink(root / NEXT)
    except OSError as error:
        raise SaveError(
            f"{final} is complete, but {root / LATEST} could not be replaced ({error.strerror}): the next start will"
        ) from None
    remove_tree(aside)
    faults.reach("aside-removed")


def _take_back(root: Path, partial: Path) -> None:
    """Undo a failed save as far as the disk allows; the rest is for the next `recover`."""
    remove_tree(partial)
    with contextlib.suppress(OSError, SaveError):
        recover(root)
