"""The folder of a run's checkpoints: names, which of them are complete, what a crash can leave behind.

step_00000100/                     a complete checkpoint: it got this name when all of it was on disk
latest                             a text file with the name of the newest
.step_00000200.<save id>.partial   being written
.step_00000100.<save id>.aside     an older checkpoint of a step that is just being saved again
.step_00000050.<save id>.removed   on its way out
latest.next                        which save is about to take its name
"""

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megamoe.checkpoint import faults
from megamoe.checkpoint.files import read_small, replace_file, saving, sync_folder, temporary_name
from megamoe.checkpoint.manifest import MANIFEST, MAX_MANIFEST_BYTES
from megamoe.checkpoint.strict_json import loads, unseal
from megamoe.errors import CheckpointError, ConfigError

LATEST, NEXT = "latest", "latest.next"
FINETUNE_RECORD = "finetune.json"  # in a run's folder: which checkpoint of a fine-tuning is the best
_PREFIX = "step_"
_HIDDEN = re.compile(r"\.(step_[0-9]{8,})\.([A-Za-z0-9_-]{1,64})\.(partial|aside|removed)")


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name; None for any other name."""
    digits = name.removeprefix(_PREFIX)
    return int(digits) if name.startswith(_PREFIX) and digits.isdecimal() and digits.isascii() else None


def hidden_name(step: int, save_id: str, role: str) -> str:
    return f".{checkpoint_name(step)}.{save_id}.{role}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Checkpoints with a manifest, best first: the one that `latest` names, older ones, then newer ones.

    Newer ones than `latest` are of a run that was taken back to an earlier step. Without a usable `latest` the newest
    comes first. That they are undamaged is for `Checkpoint.open` to say.
    """
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{root} cannot be read ({error.strerror})") from None
    steps = {name: step for name in names if (step := step_of(name)) is not None and (root / name / MANIFEST).exists()}
    newest_first = sorted(steps, key=lambda name: steps[name], reverse=True)
    latest = latest_name(root)
    if latest in steps:
        newest_first.sort(key=lambda name: steps[name] > steps[latest])
    return [root / name for name in newest_first]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's newest. Raises ConfigError where there is none."""
    if (path / MANIFEST).exists() or (step_of(path.resolve().name) is not None and path.is_dir()):
        return path
    for root in (path, path / "checkpoints"):
        found = complete_checkpoints(root)
        if found:
            return found[0]
    raise ConfigError(f"{path} is no checkpoint, and no folder with checkpoints")


def best_checkpoint(run: Path) -> Path:
    """The checkpoint of a fine-tuning's best validation. Raises ConfigError where its folder names none that is there.
    """
    record = run / FINETUNE_RECORD
    try:
        step = loads(read_small(record, MAX_MANIFEST_BYTES), str(record))["best_step"]
        found = run / "checkpoints" / checkpoint_name(step)
    except (CheckpointError, KeyError, TypeError, ValueError):
        raise ConfigError(
            f"no {record} names a best checkpoint: --best is for the folder of a fine-tuning that validated and has "
            "ended; else name a checkpoint's folder"
        ) from None
    if not (found / MANIFEST).exists():
        raise ConfigError(f"{found}, the best checkpoint by {record}, is not there any more: name another one's folder")
    return found


def latest_name(root: Path) -> str | None:
    """What `latest` says, or None. Not checked."""
    return _read_word(root / LATEST)


def recover(root: Path) -> list[str]:
    """Put right what a death inside a commit left behind; returns what was done, in words. One rank calls it.

    An older checkpoint that stood aside comes back if its successor never got the name; a save that did get its name
    becomes `latest`. Raises SaveError when the folder cannot be changed.
    """
    done = []
    with saving(root):
        for name in sorted(os.listdir(root)) if root.is_dir() else []:
            match = _HIDDEN.fullmatch(name)
            if match and match[3] == "aside" and not (root / match[1]).exists():
                os.rename(root / name, root / match[1])
                sync_folder(root)
                done.append(f"{match[1]} was being saved again when the run died: the older one is back")
        announced = _read_word(root / NEXT)
        if announced is not None:
            step_name, _, save_id = announced.partition(" ")
            if step_of(step_name) is not None and _save_id_of(root / step_name) == save_id:
                set_latest(root, step_name)
                done.append(f"{step_name} was complete when the run died: it is the latest")
            os.unlink(root / NEXT)
    return done


def set_latest(root: Path, name: str) -> None:
    """Replace `latest` as one act. OSErrors pass."""
    replace_file(root / LATEST, f"{name}\n".encode())
    faults.reach("latest-renamed")
    sync_folder(root)
    faults.reach("latest-synced")


def prune(
    root: Path,
    *,
    newest_step: int,
    save_id: str,
    keep_last: int,
    keep_every_steps: int | None,
    keep_best: Sequence[int] = (),
) -> None:
    """Remove old checkpoints up to `newest_step`, but the last ones and every m-th. OSErrors pass.

    Of the steps in `keep_best`, the best last, the last one that has a checkpoint keeps it: a better one may have
    failed to be saved.
    Later ones are of a run that was taken back: they are not counted, and stay until that step is saved again.
    """
    steps = sorted(step for name in os.listdir(root) if (step := step_of(name)) is not None and step <= newest_step)
    best = next((step for step in reversed(keep_best) if step in steps), None)
    for step in steps[:-keep_last]:
        if step == best:
            continue
        if keep_every_steps is not None and step % keep_every_steps == 0:
            continue
        # Under its name it is always whole: the name goes first.
        removed = root / hidden_name(step, save_id, "removed")
        os.rename(root / checkpoint_name(step), removed)
        sync_folder(root)
        faults.reach("prune-renamed")
        remove_tree(removed)
        faults.reach("prune-removed")


def sweep(root: Path, *, keep: str | None = None) -> None:
    """Remove what earlier saves left half-written or half-removed, except the entry named `keep`. Never raises."""
    try:
        names = os.listdir(root)
    except OSError:
        return
    for name in names:
        match = _HIDDEN.fullmatch(name)
        if match and name != keep and (match[3] != "aside" or (root / match[1]).exists()):
            remove_tree(root / name)
    for name in (LATEST, NEXT):
        with contextlib.suppress(OSError):
            temporary_name(root / name).unlink(missing_ok=True)
    faults.reach("swept")


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours. What cannot be removed stays for the next sweep; a link is removed, not followed."""
    if folder.is_symlink():
        with contextlib.suppress(OSError):
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _save_id_of(folder: Path) -> str | None:
    try:
        tree = unseal(read_small(folder / MANIFEST, MAX_MANIFEST_BYTES), str(folder / MANIFEST))
    except CheckpointError:
        return None
    return tree.get("save_id")


def _read_word(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")[:200].strip() or None
    except OSError:
        return None
