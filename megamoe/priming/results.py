"""What a priming leaves on disk: parts as they are done, from which a rerun goes on, and the result. No torch."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamoe.checkpoint.files import replace_file
from megamoe.checkpoint.outputs import writing
from megamoe.checkpoint.reader import Checkpoint
from megamoe.errors import OutputError
from megamoe.inference.identity import model_digest
from megamoe.runs.json_lines import append_json_line, read_json_lines

FORMAT = "megamoe-priming-1"
MAX_BYTES = 1 << 28  # of what may be a result: more is not read to find out


@dataclass(frozen=True)
class Part:
    """One pass over a task's examples. `identity` stands for all that its numbers depend on."""

    task: str
    num_shots: int
    draw: int
    identity: str

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.task, self.num_shots, self.draw, self.identity


def model_identity(checkpoint: Path) -> dict[str, Any]:
    """Step, and a digest of the model's settings and weights, the same wherever the checkpoint lies."""
    with Checkpoint.open(checkpoint) as opened:
        manifest = opened.manifest
    return {"step": manifest.step, "digest": model_digest(manifest)}


def digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()[:32]


def parts_path(out: Path) -> Path:
    """Where the parts of a result lie."""
    return out.with_name(out.name + ".parts.jsonl")


def read_parts(out: Path | None) -> dict[tuple[str, int, int, str], dict[str, Any]]:
    """Parts that are done, by key; torn lines, and parts of something else, do no harm."""
    found = {}
    for line in [] if out is None else read_json_lines(parts_path(out)):
        values = [line.get(key) for key in ("task", "num_shots", "draw", "identity", "examples")]
        if [type(value) for value in values] == [str, int, int, str, list]:
            found[line["task"], line["num_shots"], line["draw"], line["identity"]] = line
    return found


def write_part(out: Path | None, part: Part, content: Mapping[str, Any]) -> dict[str, Any]:
    """Append a part; returns it as it will be read. Raises OutputError."""
    line = {
        "task": part.task, "num_shots": part.num_shots, "draw": part.draw, "identity": part.identity, **content
    }  # fmt: skip
    if out is not None:
        with writing(parts_path(out)):
            append_json_line(parts_path(out), line, durable=True)
    return json.loads(json.dumps(line))


def write_whole(path: Path, text: str) -> None:
    """As one act: readers see the old or the new content. Raises OutputError."""
    with writing(path):
        replace_file(path, text.encode())


def check_outputs(out: Path | None, samples: Path | None) -> None:
    """Before hours of work. Raises OutputError where a file cannot be written, or is there and not of a priming."""
    for path in filter(None, (out, samples)):
        if path.is_dir():
            raise OutputError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise OutputError(f"cannot write {path}: the folder {path.parent} is read-only")
    if out is not None:
        if samples is not None and samples.resolve() in (out.resolve(), parts_path(out.resolve())):
            raise OutputError(f"--samples {samples} would take the place of what --out {out} keeps: name another file")
        _check_ours(out, "results of a priming", "--out", _is_result)
    if samples is not None:
        _check_ours(samples, "samples of a priming", "--samples", _is_samples)


def _check_ours(path: Path, what: str, option: str, is_ours: Callable[[Path], bool]) -> None:
    try:
        if not path.exists() or (path.is_file() and is_ours(path)):
            return
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror}): choose another {option}") from None
    except (ValueError, RecursionError):
        pass
    raise OutputError(f"{path} holds no {what}: choose another {option}, or move it away")


def _is_result(path: Path) -> bool:
    if path.stat().st_size > MAX_BYTES:
        return False
    tree = json.loads(path.read_bytes())
    return isinstance(tree, dict) and tree.get("format") == FORMAT


def _is_samples(path: Path) -> bool:
    with path.open("rb") as file:
        tree = json.loads(file.readline(MAX_BYTES))
    return isinstance(tree, dict) and {"task", "num_shots", "draw", "number", "scores"} <= tree.keys()


def sample_lines(parts: Sequence[Mapping[str, Any]]) -> str:
    """A line an example: task, shots, draw, where it stands, the scores of its choices, prediction, right ones."""
    lines = []
    for part in parts:
        head = {key: part[key] for key in ("task", "num_shots", "draw")}
        lines += [json.dumps(head | example, ensure_ascii=False) for example in part["examples"]]
    return "".join(f"{line}\n" for line in lines)
