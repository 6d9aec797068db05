"""The small files of a conversion's output, and what tells one conversion from another."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megamoe import __version__
from megamoe.checkpoint import outputs
from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.outputs import writing
from megamoe.errors import ConversionError

VERIFICATION = "verification.json"  # how the logits of both sides were compared
REPORT = "conversion.json"  # figures and checksums of what was done, in the folder that it made
POINTS = ("report-written", *outputs.POINTS)  # of `megamoe.checkpoint.faults`


def plan_id_of(items: Iterable[object]) -> str:
    """The same exactly for runs that are to make the same output of the same source: xxh3_64 of what they work by."""
    digest = xxhash.xxh3_64(__version__.encode())
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()


def write_small(path: Path, data: bytes) -> None:
    """A small file, flushed. Parent folders are made. OSErrors pass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_extras(folder: Path, files: Mapping[str, bytes]) -> None:
    """Small files of the caller's, such as config.json, by their names within the folder."""
    for name, data in files.items():
        with writing(folder / name):
            write_small(folder / name, data)


def check_extras(files: Mapping[str, bytes], taken: set[str]) -> None:
    for name in files:
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or parts[0] in taken or name.endswith(".safetensors"):
            raise ConversionError(f"{name!r} cannot be one of the small files: it is the conversion's own or outside")


def write_verification(partial: Path, made: Path, check: Callable[[Path], Mapping[str, Any]] | None) -> None:
    """Have `check` look at what was made before it has its final name, and keep its answer in the folder."""
    if check is None:
        return
    answer = check(made)
    with writing(partial / VERIFICATION):
        replace_file(partial / VERIFICATION, (json.dumps(answer, indent=1) + "\n").encode())
