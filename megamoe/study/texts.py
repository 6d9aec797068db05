"""What the runs of a study are trained on, by content: a path may come to hold another text. No torch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.data.indexed import bin_path, idx_path
from megamoe.errors import ConfigError
from megamoe.study.ladder import StudyRun

RECORD = "texts.json"
_NUM_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


def check_texts(runs: Sequence[StudyRun], folder: Path) -> None:
    """Hold the corpora of runs that are to be trained to those that others of the study have met; keep what is new.

    Raises ConfigError where a path holds another text than then, or the record cannot be written. Of corpora that are
    not there nothing is said: training does that.
    """
    path = folder / RECORD
    known = _read(path)
    found = dict(known)
    for prefix in dict.fromkeys(prefix for run in runs for prefix in _prefixes(run)):
        if (own := fingerprint(prefix)) is None:
            continue
        if found.setdefault(prefix, own) != own:
            raise ConfigError(
                f"{prefix} is not the text that other runs in {folder} were trained on: restore it, choose another "
                "--out, or remove that folder"
            )
    if found != known:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}): choose another folder with --out"
            ) from None


def fingerprint(prefix: str) -> str | None:
    """Of an indexed dataset: the sizes of its files and blocks of them, evenly spaced; None where it is not there.

    As quick for a terabyte as for a megabyte.
    """
    digest = hashlib.sha256()
    try:
        for path in (idx_path(prefix), bin_path(prefix)):
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                digest.update(f"{size} ".encode())
                for number in range(_NUM_BLOCKS):
                    file.seek(number * max(0, size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
                    digest.update(file.read(_BLOCK_BYTES))
    except OSError:
        return None
    return digest.hexdigest()


def _prefixes(run: StudyRun) -> list[str]:
    data = run.config.data
    return [corpus.path for corpus in (*data.train, *data.valid)]


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
